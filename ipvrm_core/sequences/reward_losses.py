"""Losses of reward models, one value per sequence (or pair); the caller weighs and sums them.

Shape letters: N packed response tokens, B sequences, P pairs. Implicit ones take q_t = log pi_phi - log pi_ref as
`log_ratio_N`, explicit ones their token scores.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ipvrm_core.packing import check_cu_seqlens, lengths_of, positions
from ipvrm_core.sequences import segments
from ipvrm_core.sequences.segments import expand
from ipvrm_core.sequences.values import mean_prefix_values

Weighting = Literal["uniform", "early", "late"]
WeightLength = Literal["mean", "sum"]
ExpertShare = Literal["batch", "experts"]


def prefix_weights(cu_seqlens: Tensor, total: int, weighting: Weighting, dtype=torch.float32) -> Tensor:
    """Weights over t that sum to one in every sequence: [N].

    uniform: 1/T.  late: t/T over its sum.  early: 1 - t/T over its sum (paper eq. 16-18). With T = 1 `early` would be
    0/0; it is uniform there.
    """
    if weighting not in ("uniform", "early", "late"):
        raise ValueError(f"weighting must be 'uniform', 'early' or 'late'; got {weighting!r}")
    t_N = positions(cu_seqlens, total).to(dtype)
    T_N = expand(lengths_of(cu_seqlens), cu_seqlens, total).to(dtype)
    if weighting == "uniform":
        return 1 / T_N
    if weighting == "late":
        return t_N / (T_N * (T_N + 1) / 2)
    return torch.where(T_N > 1, (T_N - t_N) / (T_N * (T_N - 1) / 2).clamp(min=1), torch.ones_like(T_N))


def ipvrm_loss(
    log_ratio_N: Tensor,
    cu_seqlens: Tensor,
    labels_B: Tensor,
    *,
    beta: float = 10.0,
    margin: float = 5.0,
    weighting: Weighting = "uniform",
    boundary_B: Tensor | None = None,
) -> Tensor:
    """loss_b = sum_t w_t softplus(-s (vbar_t + V(x)) + m), s = 2 r - 1: [B] (paper eq. 9; online eq. 15).

    Written out: softplus(-(vbar_t - m + V(x))) for r = 1 and softplus(vbar_t + m + V(x)) for r = 0.
    boundary_B: V(x) = logit(mu) of `difficulty_boundary` (online), None offline. labels_B in {0, 1}.
    """
    check_cu_seqlens(cu_seqlens, len(log_ratio_N))
    check_labels(labels_B, cu_seqlens)
    total = len(log_ratio_N)
    value_N = mean_prefix_values(log_ratio_N, cu_seqlens, beta)
    if boundary_B is not None:
        value_N = value_N + expand(boundary_B.to(value_N.dtype), cu_seqlens, total)
    sign_N = expand(2 * labels_B.to(value_N.dtype) - 1, cu_seqlens, total)
    weights_N = prefix_weights(cu_seqlens, total, weighting, value_N.dtype)
    return segments.segment_sum(weights_N * F.softplus(margin - sign_N * value_N), cu_seqlens)


def difficulty_boundary(group_mean_B: Tensor) -> Tensor:
    """V(x) = logit(mu), the Adaptive Difficulty Boundary: [B] -> [B] (paper section 4.2).

    Groups with mu in {0, 1} would be infinite. They carry no reward-model loss at all (`dynamic_loss_weights` is 0
    there), so their boundary is returned as 0 instead of a clamped large number.
    """
    mixed_B = (group_mean_B > 0) & (group_mean_B < 1)
    safe_B = torch.where(mixed_B, group_mean_B, 0.5)
    return safe_B.logit()


def dynamic_loss_weights(labels_B: Tensor, group_mean_B: Tensor, scale: Literal["raw", "group"] = "raw") -> Tensor:
    """w = 1 - mu for r = 1, mu for r = 0 (paper); [B], 0 for groups with mu in {0, 1}.

    scale="group" (official code) makes the weights of a group sum to its size: 1/(2 mu) and 1/(2 (1 - mu)).
    """
    if scale not in ("raw", "group"):
        raise ValueError(f"scale must be 'raw' or 'group'; got {scale!r}")
    mixed_B = (group_mean_B > 0) & (group_mean_B < 1)
    mu_B = torch.where(mixed_B, group_mean_B, 0.5)
    positive_B = labels_B > 0
    if scale == "raw":
        weights_B = torch.where(positive_B, 1 - mu_B, mu_B)
    else:
        weights_B = torch.where(positive_B, 0.5 / mu_B, 0.5 / (1 - mu_B))
    return weights_B * mixed_B


def implicit_prm_loss(
    log_ratio_N: Tensor,
    cu_seqlens: Tensor,
    labels_B: Tensor,
    *,
    beta: float = 0.05,
) -> Tensor:
    """loss_b = BCE-with-logits(beta sum_t q_t, r): [B] (Implicit PRM, cross-entropy form; also PRIME's online loss)."""
    check_cu_seqlens(cu_seqlens, len(log_ratio_N))
    check_labels(labels_B, cu_seqlens)
    score_B = beta * segments.segment_sum(log_ratio_N, cu_seqlens)
    return F.binary_cross_entropy_with_logits(score_B, labels_B.to(score_B.dtype), reduction="none")


def dpo_reward_loss(
    log_ratio_N: Tensor,
    cu_seqlens: Tensor,
    pairs_P2: Tensor,
    *,
    beta: float = 0.05,
) -> Tensor:
    """loss_p = -log sigmoid(beta (Q_w - Q_l)), Q = sum_t q_t: [P]. pairs_P2[p] = (winner, loser) sequence numbers."""
    check_cu_seqlens(cu_seqlens, len(log_ratio_N))
    check_pairs(pairs_P2)
    score_B = segments.segment_sum(log_ratio_N, cu_seqlens)
    return -F.logsigmoid(beta * (score_B[pairs_P2[:, 0]] - score_B[pairs_P2[:, 1]]))


def qrm_loss(
    score_N: Tensor,
    cu_seqlens: Tensor,
    pairs_P2: Tensor,
    *,
    beta: float = 0.2,
    margin: float = 2.0,
) -> Tensor:
    """loss_p = -log sigmoid(beta (Zbar_w - Zbar_l) - margin), Zbar the mean token score: [P] (Q-RM, 2505.23363)."""
    check_cu_seqlens(cu_seqlens, len(score_N))
    check_pairs(pairs_P2)
    mean_B = mean_scores(score_N, cu_seqlens)
    return -F.logsigmoid(beta * (mean_B[pairs_P2[:, 0]] - mean_B[pairs_P2[:, 1]]) - margin)


def repirl_loss(reward_N: Tensor, cu_seqlens: Tensor, labels_B: Tensor) -> Tensor:
    """loss_b = -rbar for experts (label 1), rbar for failed rollouts (label 0), rbar the mean token reward: [B].

    Weigh it with `repirl_weights` (rePIRL, 2602.07832).
    """
    check_cu_seqlens(cu_seqlens, len(reward_N))
    check_labels(labels_B, cu_seqlens)
    return (1 - 2 * labels_B.to(reward_N.dtype)) * mean_scores(reward_N, cu_seqlens)


def repirl_weights(
    reward_N: Tensor,
    policy_logprobs_N: Tensor,
    cu_seqlens: Tensor,
    labels_B: Tensor,
    weights_B: Tensor,
    *,
    length: WeightLength = "mean",
    expert_share: ExpertShare = "batch",
) -> Tensor:
    """Failed: exp(r(tau)) / pi_theta(tau) over its sum, from log space; experts: see expert_share. [B], no gradient.

    Takes the whole batch of an optimiser step, for the weights share one normaliser. length: r(tau) and
    log pi_theta(tau) as means over the tokens, or sums. expert_share: "batch" leaves weights_B (1/B), "experts" divides
    by their sum over the experts. Without failed rollouts the policy term is empty, without experts the other one.
    """
    if length not in ("mean", "sum"):
        raise ValueError(f"length must be 'mean' or 'sum'; got {length!r}")
    if expert_share not in ("batch", "experts"):
        raise ValueError(f"expert_share must be 'batch' or 'experts'; got {expert_share!r}")
    check_cu_seqlens(cu_seqlens, len(reward_N))
    check_labels(labels_B, cu_seqlens)
    if policy_logprobs_N.shape != reward_N.shape:
        raise ValueError(
            f"policy_logprobs must be [N] = {tuple(reward_N.shape)}; got shape {tuple(policy_logprobs_N.shape)}"
        )
    difference_N = (reward_N - policy_logprobs_N.to(reward_N.dtype)).detach()
    log_B = mean_scores(difference_N, cu_seqlens)
    if length == "sum":
        log_B = log_B * lengths_of(cu_seqlens)
    expert_B = labels_B > 0
    failed_B = log_B.masked_fill(expert_B, -torch.inf).softmax(0)  # nan without failed rollouts, and then not taken
    expert_weights_B = weights_B.to(log_B.dtype) * expert_B
    if expert_share == "experts":
        expert_weights_B = expert_weights_B / expert_weights_B.sum().clamp(min=torch.finfo(log_B.dtype).tiny)
    return torch.where(expert_B, expert_weights_B, failed_B)


def mean_scores(score_N: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(1/T) sum_t score_t of every sequence, 0 for an empty one: [N] -> [B]."""
    return segments.segment_sum(score_N, cu_seqlens) / lengths_of(cu_seqlens).clamp(min=1)


def check_pairs(pairs_P2: Tensor) -> None:
    """(winner, loser) sequence numbers."""
    if pairs_P2.dim() != 2 or pairs_P2.shape[1] != 2:
        raise ValueError(f"pairs must be [P, 2]; got shape {tuple(pairs_P2.shape)}")


def check_labels(labels_B: Tensor, cu_seqlens: Tensor) -> None:
    """[B] and, on CPU, every value in {0, 1}."""
    if labels_B.shape != (len(cu_seqlens) - 1,):
        raise ValueError(f"labels must be [B] = ({len(cu_seqlens) - 1},); got shape {tuple(labels_B.shape)}")
    if labels_B.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if not ((labels_B == 0) | (labels_B == 1)).all():
        raise ValueError(f"labels must be 0 or 1; got {labels_B.unique().tolist()}")
