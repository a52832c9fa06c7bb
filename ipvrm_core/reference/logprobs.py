"""Log-probabilities of a softmax head at any ids, straight from the definition.

Shape letters: N rows, D hidden size, V vocabulary, K ids a row. Holds [N, V]; the chunked backend does not.
"""

import torch
from einops import einsum
from torch import Tensor

from ipvrm_core.types import LogProbs, Truncation


def head_logits(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """z = h W^T + b: [N, D], [V, D], [V] -> [N, V], in float32 under autocast too (float64 stays float64)."""
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        logits_NV = einsum(hidden_ND.to(wide), weight_VD.to(wide), "n d, v d -> n v")
    return logits_NV if bias_V is None else logits_NV + bias_V.to(wide)


def scaled_logits(logits_NV: Tensor, temperature: float | Tensor = 1.0, softcap: float | None = None) -> Tensor:
    """y_v / T with y = z, or y = c tanh(z / c) for a soft cap c: [N, V] -> [N, V], float32 or wider. T: one, or [N]."""
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    return logits_NV / (temperature[:, None].to(logits_NV.dtype) if isinstance(temperature, Tensor) else temperature)


def log_softmax(logits_NV: Tensor, temperature: float | Tensor = 1.0, softcap: float | None = None) -> Tensor:
    """log pi(v | s) = l_v - log sum_w exp(l_w), l = `scaled_logits`: [N, V] -> [N, V], float32 or wider."""
    return scaled_logits(logits_NV, temperature, softcap).log_softmax(-1)


def truncated(logits_NV: Tensor, truncation: Truncation) -> Tensor:
    """-inf outside the set C of types.Truncation: [N, V] -> [N, V], logits after the temperature."""
    if truncation.min_p is not None:
        p_NV = logits_NV.softmax(-1)
        logits_NV = logits_NV.masked_fill(p_NV < truncation.min_p * p_NV.amax(-1, keepdim=True), -torch.inf)
    descending_NV = logits_NV.sort(-1, descending=True).values
    if truncation.top_k is not None and truncation.top_k < logits_NV.shape[1]:
        least_N1 = descending_NV[:, truncation.top_k - 1, None]
        logits_NV, descending_NV = (x.masked_fill(x < least_N1, -torch.inf) for x in (logits_NV, descending_NV))
    if truncation.top_p is not None and truncation.top_p < 1:
        p_NV = descending_NV.softmax(-1)
        stays_NV = p_NV.cumsum(-1) - p_NV < truncation.top_p  # equal logits: the first of them decides for all
        least_N1 = descending_NV.masked_fill(~stays_NV, torch.inf).amin(-1, keepdim=True)
        logits_NV = logits_NV.masked_fill(logits_NV < least_N1, -torch.inf)
    return logits_NV


def gather_ids(logp_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """log pi at ids; exactly 0 where id < 0 (padding), with no gradient there."""
    picked_NK = logp_NV.gather(1, ids_NK.clamp(min=0))
    return torch.where(ids_NK >= 0, picked_NK, torch.zeros_like(picked_NK))


def entropy(logp_NV: Tensor) -> Tensor:
    """H = -sum_v p_v log p_v (nats): [N, V] -> [N]. A token of probability 0 contributes 0."""
    p_NV = logp_NV.exp()
    return -(p_NV * logp_NV.masked_fill(p_NV == 0, 0.0)).sum(-1)


def logprobs_from_logits(
    logits_NV: Tensor,
    ids_NK: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    truncation: Truncation | None = None,
) -> LogProbs:
    """log pi(id | s), LSE and entropy of every row. [N, V], [N, K] -> LogProbs([N, K], [N], [N]).

    With a truncation all three are those of the distribution over what is left; -inf elsewhere is a constant.
    """
    scaled_NV = scaled_logits(logits_NV, temperature, softcap)
    if truncation is not None:
        scaled_NV = truncated(scaled_NV, truncation)
    logp_NV, lse_N = scaled_NV.log_softmax(-1), scaled_NV.logsumexp(-1)
    logp_NK = gather_ids(logp_NV, ids_NK)
    if truncation is not None:
        logp_NK = torch.where(logp_NK == -torch.inf, -torch.inf, logp_NK)
    return LogProbs(logp_NK, lse_N, entropy(logp_NV))


def linear_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    ids_NK: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    truncation: Truncation | None = None,
) -> LogProbs:
    """`logprobs_from_logits` of z = h W^T + b."""
    logits_NV = head_logits(hidden_ND, weight_VD, bias_V)
    return logprobs_from_logits(logits_NV, ids_NK, temperature=temperature, softcap=softcap, truncation=truncation)
