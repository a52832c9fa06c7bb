"""Log-probabilities of a softmax head at any ids."""

from torch import Tensor

from ipvrm_core.dispatch import resolve
from ipvrm_core.fused.linear_logprobs import linear_logprobs as fused
from ipvrm_core.fused.shard import VocabularyShard
from ipvrm_core.ops import checks
from ipvrm_core.reference.logprobs import head_logits
from ipvrm_core.reference.logprobs import logprobs_from_logits as reference
from ipvrm_core.types import LogProbs, Truncation


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    near: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    truncation: Truncation | None = None,
    backend: str = "auto",
    shard: VocabularyShard | None = None,
    max_buffer_bytes: int | None = None,
) -> LogProbs:
    """log pi(id | s) = l_id - LSE(l), with l = (h W^T + b) / T; also LSE and the entropy (nats).

    hidden [N, D], weight [V, D], bias [V], ids [N, K] int64 -> LogProbs([N, K], [N], [N]) in float32, or in float64 if
    an input is. An id < 0 is padding: 0 and no gradient. Equal ids in a row add their gradients. N = 0 or K = 0 gives
    empty results. Differentiable in hidden, weight and bias through all three outputs; the backward computes the
    logits again (4 products with a trained head, 3 with a frozen one). temperature: a number, or one a row [N];
    softcap c: the logits are first c tanh(x / c). near [N]: about log pi of ids[:, 0], as a sampler has it, NaN where
    nobody knows; the Triton kernels then need no maximum, and results depend on it by their rounding alone.

    truncation: log-probs, LSE and entropy of the distribution that a sampler draws from, renormalised over the tokens
    that are left; -inf at other ids, with no gradient there. In torch on both backends, and slower: top_p alone sorts
    every row. Not with a shard.

    shard: weight (and bias) are this rank's part of a head that is split over a process group, `VocabularyShard.of`;
    everything else is equal on all ranks, and so are the results; gradients of weight and bias are those of the part.
    max_buffer_bytes bounds the private [rows, V] buffers, one row at least; None is the device's default. Extra memory
    is that, the gradients (float32 for weight), and a float32 weight where halves are upcast (see fused/README.md).
    Raises ValueError for wrong shapes, dtypes or devices, for temperature <= 0 and, on CPU, for ids >= V.
    """
    settings = (temperature, softcap, truncation, backend, max_buffer_bytes, shard)
    return _run(hidden, weight, bias, ids, near, *settings)


def logprobs_from_logits(
    logits: Tensor,
    ids: Tensor,
    *,
    near: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    truncation: Truncation | None = None,
    backend: str = "auto",
    max_buffer_bytes: int | None = None,
) -> LogProbs:
    """`linear_logprobs` of given logits [N, V], which stay as they are; the gradient is one [N, V] in their dtype."""
    return _run(logits, None, None, ids, near, temperature, softcap, truncation, backend, max_buffer_bytes)


def _run(
    hidden, weight, bias, ids, near, temperature, softcap, truncation, backend, max_buffer_bytes, shard=None
) -> LogProbs:
    hidden, weight, bias = checks.local_parts(hidden, weight, bias, shard)
    N, V = checks.check_head(hidden, weight, bias)
    V, packed = checks.checked_shard(shard, backend, V)
    if truncation is not None and shard is not None:
        raise ValueError(f"truncation needs the whole head; got {shard}")
    checks.check_ids("ids", ids, (N, None), V, hidden)
    checks.check_near(near, N, hidden)
    transform = checks.checked_transform(temperature, softcap, N, hidden)
    budget = checks.checked_budget(max_buffer_bytes, hidden, weight)
    backend = resolve(backend, hidden, weight, bias)
    if backend == "reference":
        logits = hidden if weight is None else head_logits(hidden, weight, bias)
        return reference(logits, ids, temperature=temperature, softcap=softcap, truncation=truncation)
    cut = [] if truncation is None else truncation.packed()
    *outputs, _ = fused(hidden, weight, bias, ids, near, *transform, cut, packed, budget, backend == "triton")
    return LogProbs(*outputs)
