"""TD advantages of the whole vocabulary, and the advantages of the sampled tokens.

`process_group`: of torch.distributed, for statistics over the batches of several processes; None: this one alone.
Shape letters: N packed response tokens, B sequences, K candidates, G prompts.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from ipvrm_core.packing import check_cu_seqlens, cu_seqlens_from_lengths, lengths_of, positions
from ipvrm_core.sequences import segments
from ipvrm_core.sequences.groups import Groups, all_reduced, gather, group_index, largest_across
from ipvrm_core.sequences.segments import expand
from ipvrm_core.sequences.torch_segments import moments_within

Outcome = Literal["grpo", "rloo", "reinforce"]
SigmaForm = Literal["std_plus_eps", "floored_std"]
Normalize = Literal["group", "batch"]
CandidateForm = Literal["sigma_v", "clipped", "tanh", "sign", "soft_threshold", "largest", "agreement"]


def td_errors(rm_logprobs: Tensor, old_logprobs: Tensor, beta: float) -> Tensor:
    """delta_t(v) = beta (log pi_phi(v | s_t) - log pi_old(v | s_t)), any shape (paper section 3)."""
    return beta * (rm_logprobs - old_logprobs)


def value_moments(values_N: Tensor) -> Tensor:
    """(count, sum, sum of squares) in float64, [3]. They add up over ranks: all-reduce them, then call `sigma_v`."""
    wide_N = values_N.detach().to(torch.float64)
    return torch.stack([torch.full_like(wide_N.sum(), wide_N.numel()), wide_N.sum(), wide_N.square().sum()])


def sigma_v(moments: Tensor, form: SigmaForm = "std_plus_eps", eps: float = 1e-6) -> Tensor:
    """The scale of the values: population std from `value_moments`, 0-d float64, no gradient.

    std_plus_eps (paper): std + eps.  floored_std (official): max(std, eps).
    """
    if form not in ("std_plus_eps", "floored_std"):
        raise ValueError(f"form must be 'std_plus_eps' or 'floored_std'; got {form!r}")
    count, total, squares = moments.unbind()
    mean = total / count.clamp(min=1)
    std = (squares / count.clamp(min=1) - mean.square()).clamp(min=0).sqrt()
    return std + eps if form == "std_plus_eps" else std.clamp(min=eps)


def td_advantages(delta: Tensor, sigma: Tensor) -> Tensor:
    """A_TD(v) = delta_t(v) / sigma_V, any shape; sigma from `sigma_v` (eps already inside)."""
    return delta / sigma.to(delta.dtype)


def candidate_advantages(delta_NK: Tensor, sigma: Tensor, form: CandidateForm = "sigma_v") -> Tensor:
    """A_TD of the candidates from their TD errors, with x = delta_t(v) / sigma: [N, K] -> [N, K].

    sigma_v (paper): x.  clipped: x within [-1, 1].  tanh: tanh(x).  sign: sign(x).
    soft_threshold: sign(x) max(|x| - 1, 0), so sigma is what an error must exceed.
    largest: delta_t(v) / max_w |delta_t(w)| of the position, within [-1, 1] whatever V's spread; 0 where all are 0.
    All but the first are ours; `agreement_advantages` is not made from sigma. A padded slot must hold 0, and stays 0.
    """
    if form == "largest":
        most_N1 = delta_NK.abs().amax(-1, keepdim=True) if delta_NK.shape[-1] else delta_NK[..., :1]
        return torch.where(most_N1 > 0, delta_NK / torch.where(most_N1 > 0, most_N1, 1.0), 0.0)
    x_NK = td_advantages(delta_NK, sigma)
    if form == "sigma_v":
        return x_NK
    if form == "clipped":
        return x_NK.clamp(-1.0, 1.0)
    if form == "tanh":
        return x_NK.tanh()
    if form == "sign":
        return x_NK.sign()
    if form == "soft_threshold":
        return x_NK - x_NK.clamp(-1.0, 1.0)
    known = [name for name in get_args(CandidateForm) if name != "agreement"]
    raise ValueError(f"form must be one of {', '.join(known)}; got {form!r}")


def agreement_advantages(delta_NK: Tensor, ids_NK: Tensor, old_logprobs_NK: Tensor, beta: float | None) -> Tensor:
    """A(v) = 2 pi_phi(v | s_t) - 1, with log pi_phi = log pi_old + delta / beta: [N, K] -> [N, K]; 0 at padded ids.

    Ours. sum_v pi(v) pi_phi(v) is the probability that policy and reward model choose the same token: its gradient is
    half of this one's. A(v) lies in [-1, 1], and the fixed point is the reward model's most likely token, not pi_phi.
    A position with one candidate has an advantage too: how sure the reward model is of it.
    """
    if beta is None:
        raise ValueError("agreement needs the beta of the TD errors; got None")
    valid_NK = ids_NK >= 0
    return torch.where(valid_NK, 2 * (old_logprobs_NK + delta_NK / beta).exp() - 1, 0.0)


def center_on_candidates(delta_NK: Tensor, ids_NK: Tensor, old_logprobs_NK: Tensor) -> Tensor:
    """delta_t(v) - sum_{w in C_t} pi_old(w) delta_t(w) / sum_{w in C_t} pi_old(w): [N, K] -> [N, K]; 0 at padded ids.

    A baseline per state (ours, not the paper's; off in both presets). Over the whole vocabulary a constant added to
    delta changes nothing, but cut to C_t it moves mass between C_t and the rest; and the mean of delta under pi_old is
    -beta KL(pi_old || pi_phi) <= 0, so without it the candidates as a whole are pushed down in favour of the tail.
    """
    valid_NK = ids_NK >= 0
    mass_NK = torch.where(valid_NK, old_logprobs_NK.exp(), 0.0)
    delta_NK = torch.where(valid_NK, delta_NK, 0.0)
    tiny = torch.finfo(mass_NK.dtype).tiny
    mean_N1 = (mass_NK * delta_NK).sum(-1, keepdim=True) / mass_NK.sum(-1, keepdim=True).clamp(min=tiny)
    return torch.where(valid_NK, delta_NK - mean_N1, 0.0)


def answer_advantages(rewards_B: Tensor, groups_B: Groups, outcome: Outcome, process_group=None) -> Tensor:
    """The advantage of a whole answer, [B]: GRPO, RLOO, or the reward itself (REINFORCE without a baseline)."""
    if outcome == "reinforce":
        return rewards_B
    if outcome not in ("grpo", "rloo"):
        raise ValueError(f"outcome must be 'grpo', 'rloo' or 'reinforce'; got {outcome!r}")
    function = outcome_advantages if outcome == "grpo" else rloo_advantages
    return function(rewards_B, groups_B, process_group)


def outcome_advantages(rewards_B: Tensor, groups_B: Groups, process_group=None) -> Tensor:
    """A = (r - mean_group) / std_group, population std; 0 for a group whose rewards are all equal: [B] (GRPO).

    Integer rewards are taken as float32. groups_B: integers, or a list of uids; across the processes of process_group.
    """
    rewards, groups, own = gather(_floating(rewards_B), groups_B, process_group)
    mean, std = moments_within(rewards, groups)
    uniform = std == 0
    return torch.where(uniform, 0.0, (rewards - mean) / torch.where(uniform, 1.0, std))[own]


def rloo_advantages(rewards_B: Tensor, groups_B: Groups, process_group=None) -> Tensor:
    """A_i = R_i - mean_{j != i} R_j within the group, 0 for a group of one: [B] (RLOO)."""
    rewards, groups, own = gather(_floating(rewards_B), groups_B, process_group)
    total, size = _group_sums(rewards, groups)
    others = (total - rewards) / (size - 1).clamp(min=1)
    return torch.where(size > 1, rewards - others, 0.0)[own]


def _floating(rewards_B: Tensor) -> Tensor:
    return rewards_B if rewards_B.is_floating_point() else rewards_B.to(torch.float32)


def _group_sums(x_B: Tensor, groups_B: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and size of each element's group: [B] -> [B], [B]."""
    index_B = groups_B.unique(return_inverse=True)[1]
    size_G = index_B.bincount().to(torch.promote_types(x_B.dtype, torch.float32))
    total_G = torch.zeros_like(size_G).index_add(0, index_B, x_B.to(size_G.dtype))
    return total_G[index_B].to(x_B.dtype), size_G[index_B].to(x_B.dtype)


def group_normalize(x_N: Tensor, cu_seqlens: Tensor, groups_B: Groups, eps: float = 1e-6, process_group=None) -> Tensor:
    """(x - mean) / (std + eps) over all tokens of a prompt's rollouts, population std: [N] -> [N] (paper GAE).

    groups_B: integers, or a list of uids; across the processes of process_group, then without a gradient.
    """
    check_cu_seqlens(cu_seqlens, len(x_N))
    if process_group is None:
        index_B = group_index(groups_B, len(cu_seqlens) - 1, x_N.device)
        mean_N, std_N = segments.group_moments(x_N, cu_seqlens, index_B)
    else:
        mean_N, std_N = _moments_across(x_N.detach(), cu_seqlens, groups_B, process_group)
    return (x_N - mean_N) / (std_N + eps)


def _moments_across(x_N: Tensor, cu_seqlens: Tensor, groups_B: Groups, process_group) -> tuple[Tensor, Tensor]:
    """`group_moments` over several processes, in two rounds: the mean first, then the deviations from it."""
    lengths_B = lengths_of(cu_seqlens).double()

    def mean_over_groups(y_N: Tensor) -> Tensor:
        sums_B2 = torch.stack([segments.segment_sum(y_N, cu_seqlens).double(), lengths_B], dim=1)
        sums, groups, own = gather(sums_B2, groups_B, process_group)
        total, count = _group_sums(sums[:, 0], groups)[0], _group_sums(sums[:, 1], groups)[0]
        return expand((total / count)[own].to(y_N.dtype), cu_seqlens, len(y_N))

    mean_N = mean_over_groups(x_N)
    return mean_N, mean_over_groups((x_N - mean_N).square()).sqrt()


def gae(delta_N: Tensor, cu_seqlens: Tensor, gamma: float = 1.0, lam: float = 1.0) -> Tensor:
    """A_t = sum_{i >= t} (gamma lambda)^(i - t) delta_i within the sequence: [N] -> [N]."""
    check_cu_seqlens(cu_seqlens, len(delta_N))
    return segments.segment_reverse_scan(delta_N, cu_seqlens, gamma * lam)


def whiten(x_N: Tensor, eps: float = 1e-8, process_group=None) -> Tensor:
    """(x - mean) / sqrt(var + eps), unbiased variance over the batch: [N] -> [N]. Fewer than two elements: x - mean."""
    if process_group is None:
        centred_N = x_N - x_N.mean() if len(x_N) else x_N
        if len(x_N) < 2:
            return centred_N
        return centred_N * (x_N.var(unbiased=True) + eps).rsqrt()
    centred_N = x_N - mean_across(x_N, process_group)
    squares, count = _sum_and_count(centred_N.square(), process_group)
    return centred_N if count < 2 else centred_N * (squares / (count - 1) + eps).rsqrt().to(x_N.dtype)


def mean_across(x_N: Tensor, process_group=None) -> Tensor:
    """The mean over all elements of all processes, 0-d."""
    if process_group is None:
        return x_N.mean()
    total, count = _sum_and_count(x_N, process_group)
    return (total / count.clamp(min=1)).to(x_N.dtype)


def _sum_and_count(x_N: Tensor, process_group) -> tuple[Tensor, Tensor]:
    own = torch.stack([x_N.detach().double().sum(), torch.full_like(x_N.sum(), len(x_N), dtype=torch.float64)])
    return all_reduced(own, process_group).unbind()


def process_advantages(
    delta_N: Tensor,
    cu_seqlens: Tensor,
    groups_B: Groups,
    *,
    normalize: Normalize,
    sigma: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 1.0,
    process_group=None,
) -> Tensor:
    """A_GAE of the sampled tokens from their TD errors: [N] -> [N].

    group (paper): GAE of `group_normalize`d errors. batch (official): GAE of (delta - batch mean) / sigma_V, whitened
    over the batch. Add it to the outcome advantage with a coefficient (1.0 and 0.05 in the presets).
    """
    if normalize == "group":
        normalised_N = group_normalize(delta_N, cu_seqlens, groups_B, process_group=process_group)
        return gae(normalised_N, cu_seqlens, gamma, lam)
    if normalize == "batch":
        if sigma is None:
            raise ValueError("normalize='batch' needs sigma (see sigma_v); got None")
        scaled_N = (delta_N - mean_across(delta_N, process_group)) / sigma.to(delta_N.dtype)
        return whiten(gae(scaled_N, cu_seqlens, gamma, lam), process_group=process_group)
    raise ValueError(f"normalize must be 'group' or 'batch'; got {normalize!r}")


def prime_advantages(
    token_rewards_N: Tensor,
    rewards_B: Tensor,
    cu_seqlens: Tensor,
    groups_B: Groups,
    *,
    coef: float = 1.0,
    process_group=None,
) -> Tensor:
    """whiten(RLOO outcome + coef * suffix sum of the RLOO token rewards): [N] -> [N] (PRIME, 2502.01456).

    r_t, divided by the batch's largest |suffix sum|, becomes r_t n/(n-1) - sum_j mean_t(r_j)/(n-1) over the group's n
    answers; the outcome, at the last token, is a constant of the answer after the suffix sum. Groups of one: 0.
    """
    check_cu_seqlens(cu_seqlens, len(token_rewards_N))
    total = len(token_rewards_N)
    suffix_N = segments.segment_reverse_scan(token_rewards_N, cu_seqlens)
    scaled_N = token_rewards_N / (largest_across(suffix_N.abs(), process_group) + 1e-6)
    mean_B = segments.segment_sum(scaled_N, cu_seqlens) / lengths_of(cu_seqlens).clamp(min=1)
    means, groups, own = gather(mean_B, groups_B, process_group)
    total_B, size_B = (x[own] for x in _group_sums(means, groups))
    several_B, others_B = size_B > 1, (size_B - 1).clamp(min=1)
    factor_B, baseline_B = torch.where(several_B, size_B / others_B, 0.0), torch.where(several_B, total_B / others_B, 0)
    process_N = scaled_N * expand(factor_B, cu_seqlens, total) - expand(baseline_B, cu_seqlens, total)
    outcome_B = rloo_advantages(rewards_B, groups_B, process_group).to(scaled_N.dtype)
    advantages_N = expand(outcome_B, cu_seqlens, total) + coef * segments.segment_reverse_scan(process_N, cu_seqlens)
    return whiten(advantages_N, process_group=process_group)


def masked_step_advantages(token_rewards_N: Tensor, cu_seqlens: Tensor, groups_B: Groups, process_group=None) -> Tensor:
    """R_t - mean of R_t over the group's sequences that reach t, R_t = sum_{u <= t} r_u: [N] -> [N].

    The masked step advantage of SPRO (2507.01551, eq. 11 and 12), there with r = beta log pi_theta / pi_ref. Across
    processes the means pass no gradient.
    """
    check_cu_seqlens(cu_seqlens, len(token_rewards_N))
    running_N = segments.segment_cumsum(token_rewards_N, cu_seqlens)
    lengths_A, groups_A, _ = gather(lengths_of(cu_seqlens), groups_B, process_group)
    everyone, _, own = gather(running_N, torch.zeros_like(running_N, dtype=torch.int64), process_group)
    cu, total = cu_seqlens_from_lengths(lengths_A), len(everyone)
    index_A = groups_A.unique(return_inverse=True)[1]
    same_step = expand(index_A, cu, total) * (total + 1) + positions(cu, total)
    return running_N - moments_within(everyone, same_step)[0][own]
