"""What a user writes without this library: every log-probability of the vocabulary, then autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ipvrm_core import PolicyBatch, PolicyLossConfig


def linear_logprobs(hidden_ND: Tensor, weight_VD: Tensor, ids_NK: Tensor) -> tuple[Tensor]:
    """log pi at ids, [N, K] (padding ids read id 0). Neither LSE nor entropy: less work than the library does."""
    return logprobs_from_logits(F.linear(hidden_ND, weight_VD), ids_NK)


def logprobs_from_logits(logits_NV: Tensor, ids_NK: Tensor) -> tuple[Tensor]:
    """`linear_logprobs` of given logits [N, V]."""
    logp_NV = logits_NV.float().log_softmax(-1)
    return (logp_NV.gather(1, ids_NK.clamp(min=0)).masked_fill(ids_NK < 0, 0.0),)


def clipped(log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """-min(rho A, clip(rho) A), elementwise."""
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def sampled_loss(logp_N: Tensor, batch: PolicyBatch) -> Tensor:
    """L_tok at the default settings: the GRPO loss of the sampled tokens."""
    config = PolicyLossConfig()
    old_N, advantages_N = batch.old_logprobs_NS[:, 0], batch.advantages_NS[:, 0]
    loss_N = clipped(logp_N - old_N, advantages_N, config.clip_low, config.clip_high)
    return (batch.token_weights_N * loss_N).sum()


def distrl_loss(hidden_ND: Tensor, weight_VD: Tensor, batch: PolicyBatch) -> tuple[Tensor]:
    """L_tok + alpha L_dist at the default settings; no metrics."""
    return distrl_loss_from_logits(F.linear(hidden_ND, weight_VD), batch)


def distrl_loss_from_logits(logits_NV: Tensor, batch: PolicyBatch) -> tuple[Tensor]:
    """`distrl_loss` of given logits [N, V]."""
    config = PolicyLossConfig()
    (logp_NS,) = logprobs_from_logits(logits_NV, batch.ids_NS)
    old_NK = batch.old_logprobs_NS[:, 1:]
    loss_NK = clipped(
        logp_NS[:, 1:] - old_NK, batch.advantages_NS[:, 1:], config.candidate_clip_low, config.candidate_clip_high
    )
    mass_NK = old_NK.exp() * (batch.ids_NS[:, 1:] >= 0) * batch.candidate_weights_N[:, None]
    return (sampled_loss(logp_NS[:, 0], batch) + config.alpha * (mass_NK * loss_NK).sum(),)
