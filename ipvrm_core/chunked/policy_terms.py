"""The clipped policy loss row by row, and its derivative with respect to the log-probabilities, written by hand.

With x = log pi - log pi_old, rho = e^x and l = -min(rho A, clip(rho) A):  dl/dx = -rho A, or 0 where l is clipped.
With u = log pi_ref - log pi and k3 = e^u - 1 - u:  dk3/dlog pi = 1 - e^u.
x and u are bounded by LOG_RATIO_LIMIT; beyond, the derivatives are 0.

Shape letters: N rows (those of one chunk), K candidates; slot 0 of [N, 1+K] is the sampled token, candidates follow.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ipvrm_core.types import LOG_RATIO_LIMIT, METRICS, PolicyBatch, PolicyLossConfig


class PolicyTerms(NamedTuple):
    """Contributions of each row. c = dL/dlog p of [sampled | candidates], before any upstream factor."""

    metrics_NM: Tensor  # weighted, in the order of types.METRICS
    c_NK: Tensor  # [N, 1+K]
    grad_entropy_N: Tensor  # dL/dH


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(l, dl/dlog_ratio, clipped), elementwise. `dual_clip` c caps l at c |A| where A < 0."""
    ratio = log_ratio.clamp(max=LOG_RATIO_LIMIT).exp()
    loss = -ratio * advantages
    # -min over the two branches: only a ratio beyond the bound on the side A pushes to is clipped.
    bound = torch.full_like(ratio, 1 - clip_low).masked_fill_(advantages > 0, 1 + clip_high)
    clipped = torch.where(advantages > 0, ratio > bound, ratio < bound) & (advantages != 0)
    if dual_clip is not None:
        over = (advantages < 0) & (ratio > dual_clip)
        bound, clipped = bound.masked_fill_(over, dual_clip), clipped | over
    flat = clipped | (log_ratio > LOG_RATIO_LIMIT)
    return torch.where(clipped, -bound * advantages, loss), loss.masked_fill(flat, 0.0), clipped


def k3(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """(e^x - 1 - x, minus its derivative by x), elementwise."""
    bounded = log_ratio.clamp(max=LOG_RATIO_LIMIT)
    return bounded.exp() - 1 - bounded, (1 - bounded.exp()).masked_fill(log_ratio > LOG_RATIO_LIMIT, 0.0)


def policy_terms(logprobs_NK: Tensor, entropy_N: Tensor, batch: PolicyBatch, config: PolicyLossConfig) -> PolicyTerms:
    """Rows of L = L_tok + alpha L_dist + kl_coef KL - entropy_coef H. logprobs [N, 1+K] is 0 at padded ids."""
    wide = logprobs_NK.dtype
    weight_N, candidate_weight_N = batch.token_weights_N.to(wide), batch.candidate_weights_N.to(wide)
    # Rows of weight 0 are masked out and may hold anything: 0 * inf must not reach the sums.
    dead_N = weight_N == 0
    log_ratio_N = (logprobs_NK[:, 0] - batch.old_logprobs_N.to(wide)).masked_fill(dead_N, 0.0)
    loss_N, slope_N, clipped_N = clipped_surrogate(
        log_ratio_N,
        batch.advantages_N.to(wide).masked_fill(dead_N, 0.0),
        config.clip_low,
        config.clip_high,
        config.dual_clip,
    )
    valid_NK = (batch.candidate_ids_NK >= 0) & (candidate_weight_N != 0)[:, None]
    old_NK = batch.candidate_old_logprobs_NK.to(wide).masked_fill(~valid_NK, 0.0)
    mass_NK = (old_NK.exp() * candidate_weight_N[:, None]).masked_fill_(~valid_NK, 0.0)
    loss_NK, slope_NK, clipped_NK = clipped_surrogate(
        (logprobs_NK[:, 1:] - old_NK).masked_fill(~valid_NK, 0.0),
        batch.candidate_advantages_NK.to(wide).masked_fill(~valid_NK, 0.0),
        config.candidate_clip_low,
        config.candidate_clip_high,
        config.candidate_dual_clip,
    )
    k3_ref_N = k3_slope_N = torch.zeros_like(weight_N)
    if batch.ref_logprobs_N is not None:
        k3_ref_N, k3_slope_N = k3((batch.ref_logprobs_N.to(wide) - logprobs_NK[:, 0]).masked_fill(dead_N, 0.0))
    metrics = {
        "loss_sampled": weight_N * loss_N,
        "loss_candidates": (mass_NK * loss_NK).sum(-1),
        "clip_fraction": weight_N * clipped_N,
        "candidate_clip_fraction": (mass_NK * clipped_NK).sum(-1),
        "ratio": weight_N * log_ratio_N.clamp(max=LOG_RATIO_LIMIT).exp(),
        "kl_old": weight_N * k3(log_ratio_N)[0],
        "kl_ref": weight_N * k3_ref_N,
        "entropy": weight_N * entropy_N,
    }
    slope_N = slope_N + config.kl_coef * k3_slope_N if config.kl_coef else slope_N
    c_NK = torch.cat([(weight_N * slope_N)[:, None], config.alpha * mass_NK * slope_NK], dim=1)
    return PolicyTerms(torch.stack([metrics[name] for name in METRICS], dim=1), c_NK, -config.entropy_coef * weight_N)


def total_loss(metrics: dict[str, Tensor], config: PolicyLossConfig) -> Tensor:
    """L of the summed metrics, 0-d."""
    loss = metrics["loss_sampled"] + config.alpha * metrics["loss_candidates"]
    if config.kl_coef:
        loss = loss + config.kl_coef * metrics["kl_ref"]
    return loss - config.entropy_coef * metrics["entropy"] if config.entropy_coef else loss
