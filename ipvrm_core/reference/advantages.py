"""TD advantages of the whole vocabulary, and the advantages of the sampled tokens.

Shape letters: N packed response tokens, B sequences, K candidates, G prompts (groups are numbered 0..G-1).
"""

from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from ipvrm_core.packing import check_cu_seqlens, lengths_of, positions
from ipvrm_core.reference import segments as torch_segments
from ipvrm_core.reference.segments import expand, moments_within

Outcome = Literal["grpo", "rloo", "reinforce"]
Estimator = Literal["gae", "mc", "td", "prime", "msa", "none"]
SigmaForm = Literal["std_plus_eps", "floored_std"]
Normalize = Literal["group", "batch"]


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


def outcome_advantages(rewards_B: Tensor, groups_B: Tensor) -> Tensor:
    """A = (r - mean_group) / std_group, population std; 0 for a group whose rewards are all equal: [B] (GRPO).

    Integer rewards are taken as float32.
    """
    if not rewards_B.is_floating_point():
        rewards_B = rewards_B.to(torch.float32)
    mean_B, std_B = moments_within(rewards_B, groups_B)
    uniform_B = std_B == 0
    return torch.where(uniform_B, 0.0, (rewards_B - mean_B) / torch.where(uniform_B, 1.0, std_B))


def rloo_advantages(rewards_B: Tensor, groups_B: Tensor) -> Tensor:
    """A_i = R_i - mean_{j != i} R_j within the group, 0 for a group of one: [B] (RLOO)."""
    if not rewards_B.is_floating_point():
        rewards_B = rewards_B.to(torch.float32)
    total_B, size_B = _group_sums(rewards_B, groups_B)
    others_B = (total_B - rewards_B) / (size_B - 1).clamp(min=1)
    return torch.where(size_B > 1, rewards_B - others_B, 0.0)


def _group_sums(x_B: Tensor, groups_B: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and size of each element's group: [B] -> [B], [B]."""
    index_B = groups_B.unique(return_inverse=True)[1]
    size_G = index_B.bincount().to(torch.promote_types(x_B.dtype, torch.float32))
    total_G = torch.zeros_like(size_G).index_add(0, index_B, x_B.to(size_G.dtype))
    return total_G[index_B].to(x_B.dtype), size_G[index_B].to(x_B.dtype)


def group_normalize(
    x_N: Tensor, cu_seqlens: Tensor, groups_B: Tensor, eps: float = 1e-6, *, segments: ModuleType = torch_segments
) -> Tensor:
    """(x - mean) / (std + eps) over all tokens of a prompt's rollouts, population std: [N] -> [N] (paper GAE)."""
    check_cu_seqlens(cu_seqlens, len(x_N))
    check_groups(groups_B, cu_seqlens)
    mean_N, std_N = segments.group_moments(x_N, cu_seqlens, groups_B)
    return (x_N - mean_N) / (std_N + eps)


def gae(
    delta_N: Tensor,
    cu_seqlens: Tensor,
    gamma: float = 1.0,
    lam: float = 1.0,
    *,
    segments: ModuleType = torch_segments,
) -> Tensor:
    """A_t = sum_{i >= t} (gamma lambda)^(i - t) delta_i within the sequence: [N] -> [N]."""
    check_cu_seqlens(cu_seqlens, len(delta_N))
    return segments.segment_reverse_scan(delta_N, cu_seqlens, gamma * lam)


def whiten(x_N: Tensor, eps: float = 1e-8) -> Tensor:
    """(x - mean) / sqrt(var + eps), unbiased variance over the batch: [N] -> [N]. Fewer than two elements: x - mean."""
    centred_N = x_N - x_N.mean() if len(x_N) else x_N
    if len(x_N) < 2:
        return centred_N
    return centred_N * (x_N.var(unbiased=True) + eps).rsqrt()


def process_advantages(
    delta_N: Tensor,
    cu_seqlens: Tensor,
    groups_B: Tensor,
    *,
    normalize: Normalize,
    sigma: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 1.0,
    segments: ModuleType = torch_segments,
) -> Tensor:
    """A_GAE of the sampled tokens from their TD errors: [N] -> [N].

    group (paper): GAE of `group_normalize`d errors. batch (official): GAE of (delta - batch mean) / sigma_V, whitened
    over the batch. Add it to the outcome advantage with a coefficient (1.0 and 0.05 in the presets).
    """
    if normalize == "group":
        normalised_N = group_normalize(delta_N, cu_seqlens, groups_B, segments=segments)
        return gae(normalised_N, cu_seqlens, gamma, lam, segments=segments)
    if normalize == "batch":
        if sigma is None:
            raise ValueError("normalize='batch' needs sigma (see sigma_v); got None")
        scaled_N = (delta_N - delta_N.mean()) / sigma.to(delta_N.dtype)
        return whiten(gae(scaled_N, cu_seqlens, gamma, lam, segments=segments))
    raise ValueError(f"normalize must be 'group' or 'batch'; got {normalize!r}")


def prime_advantages(
    token_rewards_N: Tensor,
    rewards_B: Tensor,
    cu_seqlens: Tensor,
    groups_B: Tensor,
    *,
    coef: float = 1.0,
    segments: ModuleType = torch_segments,
) -> Tensor:
    """whiten(RLOO outcome + coef * suffix sum of the RLOO token rewards): [N] -> [N] (PRIME, 2502.01456).

    r_t, divided by the batch's largest |suffix sum|, becomes r_t n/(n-1) - sum_j mean_t(r_j)/(n-1) over the group's n
    answers; the outcome, at the last token, is a constant of the answer after the suffix sum. Groups of one: 0.
    """
    check_cu_seqlens(cu_seqlens, len(token_rewards_N))
    check_groups(groups_B, cu_seqlens)
    total = len(token_rewards_N)
    largest = segments.segment_reverse_scan(token_rewards_N, cu_seqlens).abs().amax() if total else 0.0
    scaled_N = token_rewards_N / (largest + 1e-6)
    mean_B = segments.segment_sum(scaled_N, cu_seqlens) / lengths_of(cu_seqlens).clamp(min=1)
    total_B, size_B = _group_sums(mean_B, groups_B)
    several_B, others_B = size_B > 1, (size_B - 1).clamp(min=1)
    factor_B, baseline_B = torch.where(several_B, size_B / others_B, 0.0), torch.where(several_B, total_B / others_B, 0)
    process_N = scaled_N * expand(factor_B, cu_seqlens, total) - expand(baseline_B, cu_seqlens, total)
    outcome_B = rloo_advantages(rewards_B, groups_B).to(scaled_N.dtype)
    return whiten(expand(outcome_B, cu_seqlens, total) + coef * segments.segment_reverse_scan(process_N, cu_seqlens))


def masked_step_advantages(
    token_rewards_N: Tensor, cu_seqlens: Tensor, groups_B: Tensor, *, segments: ModuleType = torch_segments
) -> Tensor:
    """R_t - mean of R_t over the group's sequences that reach t, R_t = sum_{u <= t} r_u: [N] -> [N].

    The masked step advantage of SPRO (2507.01551, eq. 11 and 12), there with r = beta log pi_theta / pi_ref.
    """
    check_cu_seqlens(cu_seqlens, len(token_rewards_N))
    check_groups(groups_B, cu_seqlens)
    total = len(token_rewards_N)
    running_N = segments.segment_cumsum(token_rewards_N, cu_seqlens)
    steps_N = positions(cu_seqlens, total)
    index_B = groups_B.unique(return_inverse=True)[1]
    return running_N - moments_within(running_N, expand(index_B, cu_seqlens, total) * (total + 1) + steps_N)[0]


def check_groups(groups_B: Tensor, cu_seqlens: Tensor) -> None:
    """One integer a sequence."""
    B = len(cu_seqlens) - 1
    if groups_B.shape != (B,) or groups_B.is_floating_point():
        raise ValueError(f"groups must be integers [B] = ({B},); got {groups_B.dtype}, shape {tuple(groups_B.shape)}")
