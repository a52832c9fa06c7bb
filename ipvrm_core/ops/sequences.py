"""Values, advantages and reward-model losses of packed sequences, with a choice of backend.

Each function is the one of the same name in reference/, which says the rest; what happens inside a sequence or a group
(sums, scans, moments) runs on the backend. triton: kernels/segments.py and kernels/moments.py. chunked and reference:
the same torch code, which waits for the device and scans in a Python loop. All are differentiable.

Shape letters: N packed response tokens, B sequences, P pairs.
"""

from types import ModuleType

from torch import Tensor

from ipvrm_core.ops import segments as triton_segments
from ipvrm_core.ops.dispatch import resolve
from ipvrm_core.reference import advantages, reward_losses, values
from ipvrm_core.reference import segments as torch_segments


def segments_for(backend: str, x_N: Tensor) -> ModuleType:
    """The module with the segment functions of a backend; see dispatch.py for what it refuses."""
    if x_N.dim() != 1 or not x_N.is_floating_point():
        raise ValueError(f"token values must be floating point [N]; got {x_N.dtype}, shape {tuple(x_N.shape)}")
    return triton_segments if resolve(backend, x_N) == "triton" else torch_segments


def prefix_values(log_ratio_N: Tensor, cu_seqlens: Tensor, beta: float, *, backend: str = "auto") -> Tensor:
    """V_t = beta * sum_{u <= t} q_u, the value after token t = 1..T: [N] -> [N]."""
    return values.prefix_values(log_ratio_N, cu_seqlens, beta, segments=segments_for(backend, log_ratio_N))


def mean_prefix_values(log_ratio_N: Tensor, cu_seqlens: Tensor, beta: float, *, backend: str = "auto") -> Tensor:
    """vbar_t = V_t / t: [N] -> [N]."""
    return values.mean_prefix_values(log_ratio_N, cu_seqlens, beta, segments=segments_for(backend, log_ratio_N))


def gae(delta_N: Tensor, cu_seqlens: Tensor, gamma: float = 1.0, lam: float = 1.0, *, backend: str = "auto") -> Tensor:
    """A_t = sum_{i >= t} (gamma lambda)^(i - t) delta_i within the sequence: [N] -> [N]."""
    return advantages.gae(delta_N, cu_seqlens, gamma, lam, segments=segments_for(backend, delta_N))


def group_normalize(
    x_N: Tensor, cu_seqlens: Tensor, groups_B: Tensor, eps: float = 1e-6, *, backend: str = "auto"
) -> Tensor:
    """(x - mean) / (std + eps) over all tokens of a prompt's rollouts, population std: [N] -> [N]."""
    return advantages.group_normalize(x_N, cu_seqlens, groups_B, eps, segments=segments_for(backend, x_N))


def process_advantages(
    delta_N: Tensor,
    cu_seqlens: Tensor,
    groups_B: Tensor,
    *,
    normalize: advantages.Normalize,
    sigma: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """A_GAE of the sampled tokens: GAE of the errors normalised per group (paper) or batch (official): [N] -> [N]."""
    segments = segments_for(backend, delta_N)
    return advantages.process_advantages(
        delta_N, cu_seqlens, groups_B, normalize=normalize, sigma=sigma, gamma=gamma, lam=lam, segments=segments
    )


def prime_advantages(
    token_rewards_N: Tensor,
    rewards_B: Tensor,
    cu_seqlens: Tensor,
    groups_B: Tensor,
    *,
    coef: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Whitened suffix sums of RLOO process and outcome rewards (PRIME): [N] -> [N]."""
    segments = segments_for(backend, token_rewards_N)
    return advantages.prime_advantages(token_rewards_N, rewards_B, cu_seqlens, groups_B, coef=coef, segments=segments)


def masked_step_advantages(
    token_rewards_N: Tensor, cu_seqlens: Tensor, groups_B: Tensor, *, backend: str = "auto"
) -> Tensor:
    """R_t minus the mean of R_t over the group's sequences that reach t, R the running sum (SPRO): [N] -> [N]."""
    segments = segments_for(backend, token_rewards_N)
    return advantages.masked_step_advantages(token_rewards_N, cu_seqlens, groups_B, segments=segments)


def ipvrm_loss(
    log_ratio_N: Tensor,
    cu_seqlens: Tensor,
    labels_B: Tensor,
    *,
    beta: float = 10.0,
    margin: float = 5.0,
    weighting: reward_losses.Weighting = "uniform",
    boundary_B: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """loss_b = sum_t w_t softplus(-s (vbar_t + V(x)) + m), s = 2 r - 1: [B]."""
    segments = segments_for(backend, log_ratio_N)
    return reward_losses.ipvrm_loss(
        log_ratio_N,
        cu_seqlens,
        labels_B,
        beta=beta,
        margin=margin,
        weighting=weighting,
        boundary_B=boundary_B,
        segments=segments,
    )


def implicit_prm_loss(
    log_ratio_N: Tensor, cu_seqlens: Tensor, labels_B: Tensor, *, beta: float = 0.05, backend: str = "auto"
) -> Tensor:
    """loss_b = BCE-with-logits(beta sum_t q_t, r): [B]."""
    segments = segments_for(backend, log_ratio_N)
    return reward_losses.implicit_prm_loss(log_ratio_N, cu_seqlens, labels_B, beta=beta, segments=segments)


def dpo_reward_loss(
    log_ratio_N: Tensor, cu_seqlens: Tensor, pairs_P2: Tensor, *, beta: float = 0.05, backend: str = "auto"
) -> Tensor:
    """loss_p = -log sigmoid(beta (Q_w - Q_l)), Q = sum_t q_t: [P]. pairs_P2[p] = (winner, loser) sequence numbers."""
    segments = segments_for(backend, log_ratio_N)
    return reward_losses.dpo_reward_loss(log_ratio_N, cu_seqlens, pairs_P2, beta=beta, segments=segments)


def qrm_loss(
    score_N: Tensor,
    cu_seqlens: Tensor,
    pairs_P2: Tensor,
    *,
    beta: float = 0.2,
    margin: float = 2.0,
    backend: str = "auto",
) -> Tensor:
    """loss_p = -log sigmoid(beta (Zbar_w - Zbar_l) - margin), Zbar the mean token score: [P]."""
    segments = segments_for(backend, score_N)
    return reward_losses.qrm_loss(score_N, cu_seqlens, pairs_P2, beta=beta, margin=margin, segments=segments)


def repirl_loss(reward_N: Tensor, cu_seqlens: Tensor, labels_B: Tensor, *, backend: str = "auto") -> Tensor:
    """loss_b = -rbar for experts (label 1), rbar for failed rollouts (label 0), rbar the mean token reward: [B]."""
    return reward_losses.repirl_loss(reward_N, cu_seqlens, labels_B, segments=segments_for(backend, reward_N))


def repirl_weights(
    reward_N: Tensor,
    policy_logprobs_N: Tensor,
    cu_seqlens: Tensor,
    labels_B: Tensor,
    weights_B: Tensor,
    *,
    length: reward_losses.WeightLength = "mean",
    expert_share: reward_losses.ExpertShare = "batch",
    backend: str = "auto",
) -> Tensor:
    """exp(r(tau)) / pi_theta(tau) over its sum for failed rollouts, the experts' share for the others: [B]."""
    return reward_losses.repirl_weights(
        reward_N,
        policy_logprobs_N,
        cu_seqlens,
        labels_B,
        weights_B,
        length=length,
        expert_share=expert_share,
        segments=segments_for(backend, reward_N),
    )
