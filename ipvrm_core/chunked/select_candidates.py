"""The candidate rule in one pass over the logits. Nothing of size [N, V] is kept or sorted.

At most floor(1 / P_min) tokens can have probability >= P_min, and they are the most probable ones: a top-k of each row
holds them all. What remains (the exact threshold, the cap, the forced sampled token, the order) works on [n, k].

Shape letters: N rows, n rows of one chunk, V vocabulary, K candidate slots, k slots of the top-k.
"""

import math

import torch
from torch import Tensor

from ipvrm_core.chunked.head import Head, wide_dtype
from ipvrm_core.chunked.softmax import row_softmax_

_NO_ID = torch.iinfo(torch.int64).max  # sorts behind every token id


def candidate_slots(p_min: float, vocabulary: int, top_k: int | None, keep_sampled: bool) -> tuple[int, int]:
    """(k, K): how many tokens can reach P_min, and the width of the result. Both at most V."""
    members = min(math.floor(1 / p_min * (1 + 1e-12)), vocabulary)  # 1 / (1/3) may come out a hair under 3
    return members, min((members if top_k is None else min(members, top_k)) + keep_sampled, vocabulary)


@torch.library.custom_op("ipvrm::chunked_select_candidates", mutates_args=())
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
    max_buffer_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of types.Candidates: ids [N, K], log-probs [N, K], counts [N], sampled log-prob [N], entropy [N].

    hidden [N, D], weight [V, D], bias [V]; with weight=None `hidden` is the logits [N, V]. sampled_ids [N] int64,
    exclude [N] bool. The rule is that of reference.candidates. No gradient.
    """
    head = Head(hidden, weight, bias, temperature, max_buffer_bytes)
    k, K = candidate_slots(p_min, head.V, top_k, keep_sampled)
    ids_NK = sampled_ids.new_empty(head.N, K)
    logprobs_NK = hidden.new_empty(head.N, K, dtype=head.wide)
    sampled_N, entropy_N = (hidden.new_empty(head.N, dtype=head.wide) for _ in range(2))
    for rows, z_nV in head.chunks():
        sampled_n1 = sampled_ids[rows, None]
        # Ascending ids: the stable sorts below then resolve equal probabilities by the smaller id.
        likely_nk = z_nV.topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values
        softmax = row_softmax_(z_nV, head.scratch, torch.cat([likely_nk, sampled_n1], dim=1))
        sampled_N[rows], entropy_N[rows] = softmax.logprobs_NK[:, k], softmax.entropy_N
        logp_nk = softmax.logprobs_NK[:, :k]
        member_nk = logp_nk > math.log(p_min) if strict else logp_nk >= math.log(p_min)
        if top_k is not None:
            best_nk = logp_nk.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
            member_nk = member_nk & torch.zeros_like(member_nk).scatter_(1, best_nk, True)
        ids_nk = likely_nk.masked_fill(~member_nk, _NO_ID)
        if keep_sampled:
            present_n1 = (ids_nk == sampled_n1).any(-1, keepdim=True) | (sampled_n1 < 0)
            ids_nk = torch.cat([ids_nk, sampled_n1.masked_fill(present_n1, _NO_ID)], dim=1)
        if exclude is not None:
            ids_nk = ids_nk.masked_fill(exclude[rows, None], _NO_ID)
        ids_nk, order_nk = ids_nk.sort(dim=-1)
        ids_NK[rows] = ids_nk[:, :K]
        logprobs_NK[rows] = softmax.logprobs_NK.gather(1, order_nk[:, :K])
    padding_NK = ids_NK == _NO_ID
    ids_NK.masked_fill_(padding_NK, -1)
    return ids_NK, logprobs_NK.masked_fill_(padding_NK, 0.0), (~padding_NK).sum(-1), sampled_N, entropy_N


@select_candidates.register_fake
def _(hidden, weight, bias, sampled_ids, exclude, p_min, strict, top_k, keep_sampled, temperature, max_buffer_bytes):
    N, V = hidden.shape[0], (hidden.shape[1] if weight is None else weight.shape[0])
    K = candidate_slots(p_min, V, top_k, keep_sampled)[1]
    ids_NK, counts_N = sampled_ids.new_empty(N, K), sampled_ids.new_empty(N)
    logprobs_NK = hidden.new_empty(N, K, dtype=wide_dtype(hidden, weight, bias))
    sampled_N, entropy_N = (logprobs_NK.new_empty(N) for _ in range(2))
    return ids_NK, logprobs_NK, counts_N, sampled_N, entropy_N
