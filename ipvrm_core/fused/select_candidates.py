"""The candidate rule in one pass over the logits. Nothing of size [N, V] is kept or sorted.

The row work finds the tokens that reach P_min; the rest of the rule (the cap, the forced sampled token, the order)
works on [n, k].

Shape letters: N rows, n rows of one chunk, V vocabulary, K candidate slots, k slots of the search.
"""

import math
from functools import partial

import torch
from torch import Tensor

from ipvrm_core.fused.head import wide_dtype
from ipvrm_core.fused.rows import Found, row_work
from ipvrm_core.fused.shard import unpacked
from ipvrm_core.fused.transform import LogitTransform
from ipvrm_core.reference.candidates import candidate_slots, log_threshold

_NO_ID = torch.iinfo(torch.int64).max  # sorts behind every token id


def slots(p_min: float, vocabulary: int, top_k: int | None, keep_sampled: bool) -> tuple[int, int]:
    """(k, K): how many tokens can reach P_min, and the width of the result. Both at most V."""
    found, given = candidate_slots(p_min), candidate_slots(p_min, top_k=top_k, keep_sampled=keep_sampled)
    return min(found, vocabulary), min(given, vocabulary)


@torch.library.custom_op("ipvrm::select_candidates", mutates_args=())
def select_candidates(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sampled_ids: Tensor,
    exclude: Tensor | None,
    p_min: float,
    strict: bool,
    top_k: int | None,
    keep_sampled: bool,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
    shard: str,
    max_buffer_bytes: int,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of types.Candidates: ids [N, S], log-probs [N, S], counts [N], entropy [N].

    hidden [N, D], weight [V, D], bias [V]; with weight=None `hidden` is x [N, V]. sampled_ids [N] int64, exclude [N]
    bool. The rule is that of reference.candidates. No gradient.
    """
    transform, part = LogitTransform(temperature, temperatures, softcap), unpacked(shard)
    work = row_work(triton, hidden, weight, bias, transform, max_buffer_bytes, shard=part)
    k, K = slots(p_min, work.head.V if part is None else part.vocabulary, top_k, keep_sampled)
    searched = k if part is None else k * part.ranks
    N, new = work.head.N, partial(hidden.new_empty, dtype=work.head.wide)
    found = sampled_ids.new_empty(N, searched), new(N, searched), new(N), new(N)
    for rows, x_nV in work.head.chunks():
        parts = work.candidates(rows, x_nV, sampled_ids[rows], k, log_threshold(p_min, strict))
        for whole, part in zip(found, parts, strict=True):
            whole[rows] = part
    # The kernels find them in order; torch leaves gaps, and so does a split head.
    return candidates_of(found, sampled_ids, K, triton and part is None, top_k, keep_sampled, exclude)


def candidates_of(
    found: Found,
    sampled_ids: Tensor,
    K: int,
    in_order: bool,
    top_k: int | None,
    keep_sampled: bool,
    exclude: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of types.Candidates by the rest of the rule. in_order: ids ascend, with -1 behind them."""
    ids_Nk, logp_Nk, sampled_N, entropy_N = found
    if not in_order or top_k is not None or keep_sampled or exclude is not None:
        forced_N1 = sampled_ids[:, None] if keep_sampled else None
        exclude_N1 = None if exclude is None else exclude[:, None]
        ids_Nk, logp_Nk = _finish_rule(ids_Nk, logp_Nk, top_k, forced_N1, sampled_N, exclude_N1)
    ids_NS = torch.cat([sampled_ids[:, None], ids_Nk[:, :K]], dim=1)
    padding_NS = ids_NS < 0
    padding_NS[:, 0] = False
    logprobs_NS = torch.cat([sampled_N[:, None], logp_Nk[:, :K]], dim=1).masked_fill_(padding_NS, 0.0)
    return ids_NS, logprobs_NS, (~padding_NS)[:, 1:].sum(-1), entropy_N


def _finish_rule(
    ids_Nk: Tensor,
    logp_Nk: Tensor,
    top_k: int | None,
    forced_N1: Tensor | None,
    sampled_N: Tensor,
    exclude_N1: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The cap, the forced token, the exclusion; then ascending ids, with -1 behind them."""
    if top_k is not None:
        # Ids ascend, so the stable sort resolves equal probabilities by the smaller id.
        best_Nk = logp_Nk.masked_fill(ids_Nk < 0, -math.inf).argsort(dim=-1, descending=True, stable=True)[:, :top_k]
        ids_Nk = torch.full_like(ids_Nk, -1).scatter_(1, best_Nk, ids_Nk.gather(1, best_Nk))
    if forced_N1 is not None:
        present_N1 = (ids_Nk == forced_N1).any(-1, keepdim=True)
        ids_Nk = torch.cat([ids_Nk, forced_N1.masked_fill(present_N1, -1)], dim=1)
        logp_Nk = torch.cat([logp_Nk, sampled_N[:, None]], dim=1)
    absent_Nk = ids_Nk < 0 if exclude_N1 is None else (ids_Nk < 0) | exclude_N1
    ids_Nk, order_Nk = ids_Nk.masked_fill(absent_Nk, _NO_ID).sort(dim=-1)
    return ids_Nk.masked_fill_(ids_Nk == _NO_ID, -1), logp_Nk.gather(1, order_Nk)


@select_candidates.register_fake
def _(hidden, weight, bias, sampled_ids, exclude, p_min, strict, top_k, keep_sampled, *settings):
    N, part = hidden.shape[0], unpacked(settings[3])
    V = (hidden.shape[1] if weight is None else weight.shape[0]) if part is None else part.vocabulary
    K = slots(p_min, V, top_k, keep_sampled)[1]
    ids_NS, counts_N = sampled_ids.new_empty(N, 1 + K), sampled_ids.new_empty(N)
    logprobs_NS = hidden.new_empty(N, 1 + K, dtype=wide_dtype(hidden, weight, bias))
    return ids_NS, logprobs_NS, counts_N, logprobs_NS.new_empty(N)
