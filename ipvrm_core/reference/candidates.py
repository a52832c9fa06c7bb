"""The candidate rule: which tokens, besides the sampled one, receive credit."""

import math

import torch
from torch import Tensor

from ipvrm_core.reference.logprobs import entropy, gather_ids, head_logits, log_softmax
from ipvrm_core.types import Candidates

# What float32 may put a log-probability near log P_min off by: some ten roundings of numbers up to 8, 5e-7 each. Within
# it p is taken as equal to P_min, on every backend and in every dtype.
P_MIN_SLACK = 1e-5


def log_threshold(p_min: float, strict: bool = False) -> float:
    """The least log-probability of a member: log P_min - P_MIN_SLACK, or + P_MIN_SLACK where p must exceed P_min."""
    return math.log(p_min) + (P_MIN_SLACK if strict else -P_MIN_SLACK)


def candidate_slots(p_min: float, *, top_k: int | None = None, keep_sampled: bool = False) -> int:
    """K = floor(e^(2 slack) / P_min), for probabilities sum to one; then the top-k cap; one more for a forced token.

    With P_min = 1 only certain tokens qualify. Raises ValueError for p_min outside (0, 1] or top_k < 0.
    """
    if not 0 < p_min <= 1:
        raise ValueError(f"p_min must be in (0, 1]; got {p_min}")
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k must be >= 0 or None; got {top_k}")
    slots = math.floor(math.exp(2 * P_MIN_SLACK) / p_min)  # once for the rule, once for rounding
    return (slots if top_k is None else min(slots, top_k)) + keep_sampled


def select_candidates_from_logits(
    logits_NV: Tensor,
    sampled_ids_N: Tensor,
    p_min: float = 0.1,
    *,
    strict: bool = False,
    top_k: int | None = None,
    keep_sampled: bool = False,
    exclude_N: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> Candidates:
    """C_t = { v : pi_old(v | s_t) >= P_min } (paper section 3; strict: > P_min), and log pi_old on it.

    Compared as log p >= `log_threshold(P_min, strict)`. top_k: only the k most probable of them (equal probabilities:
    the smaller id first). keep_sampled: the sampled token (id >= 0) is a candidate whatever its probability, beyond the
    cap. exclude_N [N] bool: rows with an empty set (the last response token in the `official` preset).
    K = `candidate_slots(...)`, at most V.
    """
    K = min(candidate_slots(p_min, top_k=top_k, keep_sampled=keep_sampled), logits_NV.shape[1])
    logp_NV = log_softmax(logits_NV, temperature, softcap)
    member_NV = logp_NV >= log_threshold(p_min, strict)
    if top_k is not None:
        order_NV = logp_NV.argsort(dim=-1, descending=True, stable=True)
        member_NV = member_NV & torch.zeros_like(member_NV).scatter(1, order_NV[:, :top_k], True)
    if keep_sampled:
        forced_N1 = sampled_ids_N[:, None]
        member_NV = member_NV | torch.zeros_like(member_NV).scatter(1, forced_N1.clamp(min=0), forced_N1 >= 0)
    if exclude_N is not None:
        member_NV = member_NV & ~exclude_N[:, None]
    # Members first, each part in ascending id order: a stable sort of the complement does exactly that.
    ids_NK = (~member_NV).to(torch.int8).argsort(dim=-1, stable=True)[:, :K]
    counts_N = member_NV.sum(-1)
    ids_NK = ids_NK.masked_fill(torch.arange(K, device=ids_NK.device) >= counts_N[:, None], -1)
    ids_NS = torch.cat([sampled_ids_N[:, None], ids_NK], dim=1)
    return Candidates(ids_NS, gather_ids(logp_NV, ids_NS), counts_N, entropy(logp_NV))


def select_candidates(
    hidden_ND: Tensor, weight_VD: Tensor, sampled_ids_N: Tensor, p_min: float = 0.1, *, bias_V=None, **rule
) -> Candidates:
    """`select_candidates_from_logits` of z = h W^T + b."""
    return select_candidates_from_logits(head_logits(hidden_ND, weight_VD, bias_V), sampled_ids_N, p_min, **rule)
