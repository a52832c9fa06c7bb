"""What a user writes without this library: every log-probability of the vocabulary, then autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ipvrm_core import PolicyBatch, PolicyLossConfig


def linear_logprobs(hidden_ND: Tensor, weight_VD: Tensor, ids_NK: Tensor) -> tuple[Tensor]:
    """log pi at ids, [N, K] (padding ids read id 0). Neither LSE nor entropy: less work than the library does."""
    logp_NV = F.linear(hidden_ND, weight_VD).float().log_softmax(-1)
    return (logp_NV.gather(1, ids_NK.clamp(min=0)).masked_fill(ids_NK < 0, 0.0),)


def _clipped(log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def distrl_loss(hidden_ND: Tensor, weight_VD: Tensor, batch: PolicyBatch) -> tuple[Tensor]:
    """L_tok + alpha L_dist at the default settings; no metrics."""
    config = PolicyLossConfig()
    (logp_NK,) = linear_logprobs(hidden_ND, weight_VD, batch.ids_NK)
    sampled_N = _clipped(logp_NK[:, 0] - batch.old_logprobs_N, batch.advantages_N, config.clip_low, config.clip_high)
    candidates_NK = _clipped(
        logp_NK[:, 1:] - batch.candidate_old_logprobs_NK,
        batch.candidate_advantages_NK,
        config.candidate_clip_low,
        config.candidate_clip_high,
    )
    mass_NK = batch.candidate_old_logprobs_NK.exp() * (batch.candidate_ids_NK >= 0) * batch.candidate_weights_N[:, None]
    return ((batch.token_weights_N * sampled_N).sum() + config.alpha * (mass_NK * candidates_NK).sum(),)
