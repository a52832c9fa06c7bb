"""The candidate rule in one pass over the logits. Nothing of size [N, V] is kept or sorted.

The row work finds the tokens that reach P_min; the rest of the rule (the cap, the forced sampled token, the order)
works on [n, k].

Shape letters: N rows, n rows of one chunk, V vocabulary, K candidate slots, k slots of the search.
"""

import math

import torch
from torch import Tensor

from ipvrm_core.fused.head import wide_dtype
from ipvrm_core.fused.rows import row_work
from ipvrm_core.fused.transform import LogitTransform
from ipvrm_core.reference.candidates import candidate_slots, log_threshold

_NO_ID = torch.iinfo(torch.int64).max  # sorts behind every token id


def _slots(p_min: float, vocabulary: int, top_k: int | None, keep_sampled: bool) -> tuple[int, int]:
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
    max_buffer_bytes: int,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of types.Candidates: ids [N, S], log-probs [N, S], counts [N], entropy [N].

    hidden [N, D], weight [V, D], bias [V]; with weight=None `hidden` is x [N, V]. sampled_ids [N] int64, exclude [N]
    bool. The rule is that of reference.candidates. No gradient.
    """
    work = row_work(triton, hidden, weight, bias, LogitTransform(temperature, temperatures, softcap), max_buffer_bytes)
    k, K = _slots(p_min, work.head.V, top_k, keep_sampled)
    N, wide = work.head.N, work.head.wide
    ids_NS = sampled_ids.new_empty(N, 1 + K)
    logprobs_NS = hidden.new_empty(N, 1 + K, dtype=wide)
    entropy_N = hidden.new_empty(N, dtype=wide)
    ids_NS[:, 0] = sampled_ids
    for rows, x_nV in work.head.chunks():
        ids_nk, logp_nk, sampled_n, entropy_N[rows] = work.candidates(
            rows, x_nV, sampled_ids[rows], k, log_threshold(p_min, strict)
        )
        forced_n1 = sampled_ids[rows, None] if keep_sampled else None
        ids_nk, logp_nk = _finish_rule(
            ids_nk, logp_nk, top_k, forced_n1, sampled_n, None if exclude is None else exclude[rows, None]
        )
        ids_NS[rows, 1:], logprobs_NS[rows, 1:], logprobs_NS[rows, 0] = ids_nk[:, :K], logp_nk[:, :K], sampled_n
    padding_NS = ids_NS == _NO_ID
    ids_NS.masked_fill_(padding_NS, -1)
    return ids_NS, logprobs_NS.masked_fill_(padding_NS, 0.0), (~padding_NS)[:, 1:].sum(-1), entropy_N


def _finish_rule(
    ids_nk: Tensor,
    logp_nk: Tensor,
    top_k: int | None,
    forced_n1: Tensor | None,
    sampled_n: Tensor,
    exclude_n1: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The cap, the forced token, the exclusion; then ascending ids, with _NO_ID behind them."""
    if top_k is not None:
        # Ids ascend, so the stable sort resolves equal probabilities by the smaller id.
        best_nk = logp_nk.masked_fill(ids_nk < 0, -math.inf).argsort(dim=-1, descending=True, stable=True)[:, :top_k]
        ids_nk = torch.full_like(ids_nk, -1).scatter_(1, best_nk, ids_nk.gather(1, best_nk))
    if forced_n1 is not None:
        present_n1 = (ids_nk == forced_n1).any(-1, keepdim=True)
        ids_nk = torch.cat([ids_nk, forced_n1.masked_fill(present_n1, -1)], dim=1)
        logp_nk = torch.cat([logp_nk, sampled_n[:, None]], dim=1)
    absent_nk = ids_nk < 0 if exclude_n1 is None else (ids_nk < 0) | exclude_n1
    ids_nk, order_nk = ids_nk.masked_fill(absent_nk, _NO_ID).sort(dim=-1)
    return ids_nk, logp_nk.gather(1, order_nk)


@select_candidates.register_fake
def _(hidden, weight, bias, sampled_ids, exclude, p_min, strict, top_k, keep_sampled, *settings):
    N, V = hidden.shape[0], (hidden.shape[1] if weight is None else weight.shape[0])
    K = _slots(p_min, V, top_k, keep_sampled)[1]
    ids_NS, counts_N = sampled_ids.new_empty(N, 1 + K), sampled_ids.new_empty(N)
    logprobs_NS = hidden.new_empty(N, 1 + K, dtype=wide_dtype(hidden, weight, bias))
    return ids_NS, logprobs_NS, counts_N, logprobs_NS.new_empty(N)
