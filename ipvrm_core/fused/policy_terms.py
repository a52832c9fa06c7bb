"""The clipped policy loss row by row, and its derivative with respect to the log-probabilities, written by hand.

With x = log pi - log pi_old, rho = e^x and l = -min(rho A, clip(rho) A):  dl/dx = -rho A, or 0 where l is clipped.
With u = log pi_ref - log pi and k3 = e^u - 1 - u:  dk3/dlog pi = 1 - e^u, and d(rho k3)/dlog pi = -rho u.
x and u are bounded by LOG_RATIO_LIMIT; beyond, the derivatives are 0.

Shape letters: N rows (those of one chunk), S = 1 + K slots: the sampled token, then the candidates.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ipvrm_core.types import LOG_RATIO_LIMIT, METRICS, PolicyBatch, PolicyLossConfig


class PolicyTerms(NamedTuple):
    """Contributions of each row. c = dL/dlog p of the slots, before any upstream factor."""

    metrics_NM: Tensor  # weighted, in the order of types.METRICS
    c_NS: Tensor
    grad_entropy_N: Tensor  # dL/dH


def policy_terms(logprobs_NS: Tensor, entropy_N: Tensor, batch: PolicyBatch, config: PolicyLossConfig) -> PolicyTerms:
    """Rows of L = L_tok + alpha L_dist + kl_coef KL - entropy_coef H. logprobs [N, S] is 0 at padded ids."""
    wide = logprobs_NS.dtype
    weight_N = batch.token_weights_N.to(wide)
    sampled_S = torch.arange(logprobs_NS.shape[1], device=logprobs_NS.device) == 0
    weight_NS = torch.where(sampled_S, weight_N[:, None], batch.candidate_weights_N.to(wide)[:, None])
    # Slots of weight 0 are masked out and may hold anything: 0 * inf must not reach the sums.
    dead_NS = (weight_NS == 0) | (~sampled_S & (batch.ids_NS < 0))
    old_NS = logprobs_NS if batch.old_logprobs_NS is None else batch.old_logprobs_NS.to(wide)
    log_ratio_NS = (logprobs_NS - old_NS).masked_fill(dead_NS, 0.0)
    mass_NS = (weight_NS * old_NS.exp().masked_fill(sampled_S, 1.0)).masked_fill(dead_NS, 0.0)
    advantages_NS = batch.advantages_NS.to(wide).masked_fill(dead_NS, 0.0)
    loss_NS, slope_NS, clipped_NS = clipped_surrogate(log_ratio_NS, advantages_NS, *_clip(sampled_S, wide, config))
    c_NS = mass_NS * slope_NS * _by_slot(sampled_S, 1.0, config.alpha, wide)

    ratio_N, k3_old_N, _ = k3(log_ratio_NS[:, 0])
    kl_N = torch.zeros_like(weight_N)
    if batch.ref_logprobs_N is not None:
        log_ref_N = (batch.ref_logprobs_N.to(wide) - logprobs_NS[:, 0]).masked_fill(weight_N == 0, 0.0)
        _, kl_N, kl_slope_N = k3(log_ref_N)
        if config.kl_ratio:
            flat_N = log_ratio_NS[:, 0] > LOG_RATIO_LIMIT
            kl_N, kl_slope_N = ratio_N * kl_N, ratio_N * (kl_slope_N + kl_N.masked_fill(flat_N, 0.0))
        c_NS[:, 0] += config.kl_coef * weight_N * kl_slope_N
    metrics = {
        "loss_sampled": mass_NS[:, 0] * loss_NS[:, 0],
        "loss_candidates": (mass_NS * loss_NS)[:, 1:].sum(-1),
        "clip_fraction": mass_NS[:, 0] * clipped_NS[:, 0],
        "candidate_clip_fraction": (mass_NS * clipped_NS)[:, 1:].sum(-1),
        "ratio": weight_N * ratio_N,
        "kl_old": weight_N * k3_old_N,
        "kl_ref": weight_N * kl_N,
        "entropy": (weight_N * entropy_N).masked_fill(weight_N == 0, 0.0),
    }
    return PolicyTerms(torch.stack([metrics[name] for name in METRICS], dim=1), c_NS, -config.entropy_coef * weight_N)


def _clip(sampled_S: Tensor, wide: torch.dtype, config: PolicyLossConfig) -> tuple[Tensor, Tensor, Tensor]:
    """(1 - low, 1 + high, cap on negative advantages) of every slot: [S]."""
    pairs = (
        (1 - config.clip_low, 1 - config.candidate_clip_low),
        (1 + config.clip_high, 1 + config.candidate_clip_high),
        (config.dual_clip or torch.inf, config.candidate_dual_clip or torch.inf),
    )
    return tuple(_by_slot(sampled_S, one, other, wide) for one, other in pairs)


def _by_slot(sampled_S: Tensor, one: float, other: float, wide: torch.dtype) -> Tensor:
    """[S]: one number for the sampled token, the other for the candidates."""
    return torch.full_like(sampled_S, other, dtype=wide).masked_fill_(sampled_S, one)


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, low: Tensor, high: Tensor, dual: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(l, dl/dlog_ratio, clipped), elementwise. l is capped at dual |A| where A < 0."""
    ratio = log_ratio.clamp(max=LOG_RATIO_LIMIT).exp()
    # -min over the two branches: only a ratio beyond the bound on the side A pushes to is clipped.
    bound = torch.where(advantages > 0, high, low)
    clipped = torch.where(advantages > 0, ratio > bound, ratio < bound) & (advantages != 0)
    over = (advantages < 0) & (ratio > dual)
    bound, clipped = torch.where(over, dual, bound), clipped | over
    loss = -ratio * advantages
    flat = clipped | (log_ratio > LOG_RATIO_LIMIT)
    return torch.where(clipped, -bound * advantages, loss), loss.masked_fill(flat, 0.0), clipped


def k3(log_ratio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(e^x, e^x - 1 - x, 1 - e^x, which is minus the latter's derivative by x), elementwise."""
    bounded = log_ratio.clamp(max=LOG_RATIO_LIMIT)
    ratio = bounded.exp()
    return ratio, ratio - 1 - bounded, (1 - ratio).masked_fill(log_ratio > LOG_RATIO_LIMIT, 0.0)


def total_loss(metrics: dict[str, Tensor], config: PolicyLossConfig) -> Tensor:
    """L of the summed metrics, 0-d."""
    loss = metrics["loss_sampled"] + config.alpha * metrics["loss_candidates"]
    if config.kl_coef:
        loss = loss + config.kl_coef * metrics["kl_ref"]
    return loss - config.entropy_coef * metrics["entropy"] if config.entropy_coef else loss
