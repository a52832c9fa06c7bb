"""The candidate set C_t of every row, with the old log-probabilities."""

import torch
from torch import Tensor

from ipvrm_core.dispatch import resolve
from ipvrm_core.fused.select_candidates import select_candidates as fused
from ipvrm_core.fused.shard import VocabularyShard
from ipvrm_core.ops import checks
from ipvrm_core.reference.candidates import select_candidates_from_logits as reference
from ipvrm_core.reference.logprobs import head_logits
from ipvrm_core.types import Candidates


def select_candidates(
    hidden: Tensor,
    weight: Tensor,
    sampled_ids: Tensor,
    p_min: float = 0.1,
    *,
    strict: bool = False,
    top_k: int | None = None,
    keep_sampled: bool = False,
    exclude: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
    shard: VocabularyShard | None = None,
    max_buffer_bytes: int | None = None,
) -> Candidates:
    """C_t = { v : pi(v | s_t) >= P_min } with pi = softmax((h W^T + b) / T) over the full vocabulary; no gradient.

    hidden [N, D], weight [V, D], bias [V], sampled_ids [N] int64 -> Candidates in slots: ids [N, 1 + K], the sampled
    token and then C_t, ascending and padded with -1; log-probs [N, 1 + K] (0 at padding), counts [N], entropy [N]
    (nats). K = floor(1 / P_min), or top_k if that is less, one more with keep_sampled, at most V. N = 0 gives empty
    results.

    strict: > instead of >=. top_k: only the k most probable members, the smaller id first among equals. keep_sampled:
    the sampled token is a member whatever its probability (an id < 0 is none). exclude [N] bool: rows with an empty
    set. temperature: a number, or one a row [N]; softcap c: the logits are first c tanh(x / c).
    A probability within 1e-5 of P_min, relatively, counts as equal to it: a member, and with strict none. Logits that
    come from another product or dtype may differ by more and decide otherwise: store the set.

    shard: weight (and bias) are this rank's part of a head that is split over a process group, `VocabularyShard.of`;
    everything else is equal on all ranks, and so are the results; gradients of weight and bias are those of the part.
    max_buffer_bytes bounds the private [rows, V] buffers, one row at least; None is the device's default.
    Raises ValueError for wrong shapes, dtypes or devices, p_min outside (0, 1], top_k < 0, temperature <= 0 and, on
    CPU, for sampled_ids >= V. Source: the paper, section 3 of its method; the switches are those of its authors' code.
    """
    rule = {"p_min": p_min, "strict": strict, "top_k": top_k, "keep_sampled": keep_sampled, "exclude": exclude}
    return _run(hidden, weight, bias, sampled_ids, rule, temperature, softcap, backend, max_buffer_bytes, shard)


def select_candidates_from_logits(
    logits: Tensor,
    sampled_ids: Tensor,
    p_min: float = 0.1,
    *,
    strict: bool = False,
    top_k: int | None = None,
    keep_sampled: bool = False,
    exclude: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
    max_buffer_bytes: int | None = None,
) -> Candidates:
    """`select_candidates` of given logits [N, V]."""
    rule = {"p_min": p_min, "strict": strict, "top_k": top_k, "keep_sampled": keep_sampled, "exclude": exclude}
    return _run(logits, None, None, sampled_ids, rule, temperature, softcap, backend, max_buffer_bytes)


@torch.no_grad()
def _run(
    hidden, weight, bias, sampled_ids, rule, temperature, softcap, backend, max_buffer_bytes, shard=None
) -> Candidates:
    hidden, weight, bias = checks.local_parts(hidden, weight, bias, shard)
    N, V = checks.check_head(hidden, weight, bias)
    V, packed = checks.checked_shard(shard, backend, V)
    checks.check_ids("sampled_ids", sampled_ids, (N,), V, hidden)
    transform = checks.checked_transform(temperature, softcap, N, hidden)
    checks.check_rule(rule, N, hidden)
    budget = checks.checked_budget(max_buffer_bytes, hidden)
    backend = resolve(backend, hidden, weight, bias)
    if backend == "reference":
        logits = hidden if weight is None else head_logits(hidden, weight, bias)
        rule = rule | {"exclude_N": rule["exclude"], "temperature": temperature, "softcap": softcap}
        del rule["exclude"]
        return reference(logits, sampled_ids, **rule)
    options = rule | transform._asdict() | {"max_buffer_bytes": budget, "triton": backend == "triton"}
    options["shard"] = packed
    options["temperatures"] = options.pop("temperatures_N")
    return Candidates(*fused(hidden, weight, bias, sampled_ids, **options))
