"""The clipped policy loss on the sampled token and on the candidates (the DistRL objective).

    rho_t(v) = pi(v | s_t) / pi_old(v | s_t)
    l(rho, A) = -min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)
    L_tok  = sum_t w_t l(rho_t(y_t), A_t)
    L_dist = sum_t w'_t sum_{v in C_t} pi_old(v | s_t) l(rho_t(v), A_TD_t(v))
    L = L_tok + alpha L_dist + kl_coef sum_t w_t KL_t - entropy_coef sum_t w_t H_t

alpha = 0 leaves GRPO (with token advantages); the weights hold the aggregation (`branch_weights`). Logarithms of ratios
are bounded by LOG_RATIO_LIMIT from above: a term is constant beyond it.
"""

import torch
from torch import Tensor

from ipvrm_core.reference.logprobs import entropy, gather_ids, head_logits, log_softmax
from ipvrm_core.types import LOG_RATIO_LIMIT, PolicyBatch, PolicyLossConfig, PolicyLossOutput


def ppo_terms(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """l = -min(rho A, clip(rho) A), elementwise; returns (l, clipped), `clipped` where the loss has no gradient in rho.

    dual_clip c caps l at c |A| for A < 0: there l = min(-min(rho A, clip(rho) A), -c A).
    """
    ratio = bounded_exp(log_ratio)
    plain = -ratio * advantages
    bounded = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    loss = torch.maximum(plain, bounded)
    clipped = bounded > plain
    if dual_clip is not None:
        cap = -dual_clip * advantages
        over = (advantages < 0) & (loss > cap)
        loss, clipped = torch.where(over, cap, loss), clipped | over
    return loss, clipped


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp(min(x, LOG_RATIO_LIMIT)), which has no gradient where x is beyond."""
    return log_ratio.clamp(max=LOG_RATIO_LIMIT).exp()


def k3(log_ratio: Tensor) -> Tensor:
    """exp(x) - 1 - x >= 0: the low-variance estimate of KL(p || q) from samples of p, with x = log q - log p.

    Constant from LOG_RATIO_LIMIT on.
    """
    return bounded_exp(log_ratio) - 1 - log_ratio.clamp(max=LOG_RATIO_LIMIT)


def distrl_loss_from_logits(
    logits_NV: Tensor, batch: PolicyBatch, config: PolicyLossConfig | None = None
) -> PolicyLossOutput:
    """L above, with its gradient by autograd. logits [N, V]; batch rows [N]; one slot or alpha = 0 leaves L_tok."""
    config = config or PolicyLossConfig()
    temperature = config.temperature if batch.temperatures_N is None else batch.temperatures_N
    logp_NV = log_softmax(logits_NV.masked_fill(batch.masked_N[:, None], 0.0), temperature, config.softcap)
    wide = logp_NV.dtype
    token_w, candidate_w = batch.token_weights_N.to(wide), batch.candidate_weights_N.to(wide)
    live_N = token_w != 0  # rows masked out (weight 0) may hold anything: 0 * inf must not reach the sums

    logp_NS = gather_ids(logp_NV, batch.ids_NS)
    old_NS = logp_NS.detach() if batch.old_logprobs_NS is None else batch.old_logprobs_NS.to(wide)
    advantages_NS = batch.advantages_NS.to(wide)
    logp_N = logp_NS[:, 0]
    log_ratio_N = torch.where(live_N, logp_N - old_NS[:, 0], 0.0)
    loss_N, clipped_N = ppo_terms(
        log_ratio_N,
        torch.where(live_N, advantages_NS[:, 0], 0.0),
        config.clip_low,
        config.clip_high,
        config.dual_clip,
    )
    valid_NK = (batch.ids_NS[:, 1:] >= 0) & (candidate_w != 0)[:, None]
    mass_NK = torch.where(valid_NK, old_NS[:, 1:].exp(), 0.0) * candidate_w[:, None]
    loss_NK, clipped_NK = ppo_terms(
        torch.where(valid_NK, (logp_NS - old_NS)[:, 1:], 0.0),
        torch.where(valid_NK, advantages_NS[:, 1:], 0.0),
        config.candidate_clip_low,
        config.candidate_clip_high,
        config.candidate_dual_clip,
    )
    entropy_N = torch.where(live_N, entropy(logp_NV), 0.0)
    sampled, dist = (token_w * loss_N).sum(), (mass_NK * loss_NK).sum()
    loss = sampled + config.alpha * dist
    kl_ref = loss.new_zeros(())
    if batch.ref_logprobs_N is not None:
        kl_N = k3(torch.where(live_N, batch.ref_logprobs_N.to(wide) - logp_N, 0.0))
        kl_ref = (token_w * (bounded_exp(log_ratio_N) * kl_N if config.kl_ratio else kl_N)).sum()
    elif config.kl_coef:
        raise ValueError("kl_coef > 0 needs batch.ref_logprobs_N; got None")
    if config.kl_coef:
        loss = loss + config.kl_coef * kl_ref
    mean_entropy = (token_w * entropy_N).sum()
    if config.entropy_coef:
        loss = loss - config.entropy_coef * mean_entropy
    metrics = {
        "loss_sampled": sampled,
        "loss_candidates": dist,
        "clip_fraction": (token_w * clipped_N).sum(),
        "candidate_clip_fraction": (mass_NK * clipped_NK).sum(),
        "ratio": (token_w * bounded_exp(log_ratio_N)).sum(),
        "kl_old": (token_w * k3(log_ratio_N)).sum(),
        "kl_ref": kl_ref,
        "entropy": mean_entropy,
    }
    return PolicyLossOutput(loss, {name: value.detach() for name, value in metrics.items()})


def distrl_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    batch: PolicyBatch,
    config: PolicyLossConfig | None = None,
    *,
    bias_V: Tensor | None = None,
) -> PolicyLossOutput:
    """`distrl_loss_from_logits` of z = h W^T + b."""
    hidden_ND = hidden_ND.masked_fill(batch.masked_N[:, None], 0.0)  # 0 * NaN would reach dW
    return distrl_loss_from_logits(head_logits(hidden_ND, weight_VD, bias_V), batch, config)
