"""A policy loss of one's own at the price of the built-in one."""

import torch
from torch import Tensor

from ipvrm_core.dispatch import resolve
from ipvrm_core.fused.head import wide_dtype
from ipvrm_core.fused.row_loss import RowFunction, RowLoss, called
from ipvrm_core.fused.shard import VocabularyShard
from ipvrm_core.ops import checks
from ipvrm_core.reference.logprobs import head_logits
from ipvrm_core.reference.logprobs import logprobs_from_logits as reference


def row_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    fn: RowFunction,
    *,
    near: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
    shard: VocabularyShard | None = None,
    bfloat16_logits: bool = False,
    max_buffer_bytes: int | None = None,
) -> Tensor:
    """sum over rows of any differentiable function of log pi(id | s), LSE and entropy: 0-d, float32 or float64.

    hidden [N, D], weight [V, D], bias [V], ids [N, K] as in `linear_logprobs`. fn(logprobs, rows) gets the `LogProbs`
    of some rows ([n, K], [n], [n]) and the slice of N that they are, by which it takes its own weights, advantages and
    old log-probs; it returns the sum of their losses, weights included, as a 0-d tensor. It is called once a chunk of
    rows (not at all for N = 0; backend 'reference': once), so rows cannot depend on one another: for the ratio of a
    whole sequence take `linear_logprobs`.

    near [N]: about log pi of ids[:, 0], as the sampler or the old policy has it. With it the Triton kernels visit the
    logits once; results depend on it by their rounding alone, so it may be off, and NaN where nobody knows.

    The gradient flows into hidden, weight and bias, once (no second derivative), and is made in the forward: 2 products
    for a frozen weight, 3 with its gradient, where `linear_logprobs` takes 3 and 4. bfloat16_logits: see `distrl_loss`.

    Raises ValueError as
    `linear_logprobs` does, and where fn returns something else or uses a tensor that requires grad.
    """
    settings = (near, temperature, softcap, backend, max_buffer_bytes, shard, bfloat16_logits)
    return _run(hidden, weight, bias, ids, fn, *settings)


def row_loss_from_logits(
    logits: Tensor,
    ids: Tensor,
    fn: RowFunction,
    *,
    near: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
    max_buffer_bytes: int | None = None,
) -> Tensor:
    """`row_loss` of given logits [N, V], which stay as they are; the gradient is one [N, V] in their dtype."""
    return _run(logits, None, None, ids, fn, near, temperature, softcap, backend, max_buffer_bytes)


def _run(
    hidden,
    weight,
    bias,
    ids,
    fn,
    near,
    temperature,
    softcap,
    backend,
    max_buffer_bytes,
    shard=None,
    bfloat16_logits=False,
) -> Tensor:
    hidden, weight, bias = checks.local_parts(hidden, weight, bias, shard)
    N, V = checks.check_head(hidden, weight, bias)
    V = checks.checked_shard(shard, backend, V)[0]
    checks.check_ids("ids", ids, (N, None), V, hidden)
    checks.check_near(near, N, hidden)
    transform = checks.checked_transform(temperature, softcap, N, hidden)
    budget = checks.checked_budget(max_buffer_bytes, hidden, weight)
    backend = resolve(backend, hidden, weight, bias)
    checks.check_bfloat16_logits(bfloat16_logits, backend, hidden, weight, shard)
    if backend == "reference":
        logits = hidden if weight is None else head_logits(hidden, weight, bias)
        loss = called(fn, reference(logits, ids, temperature=temperature, softcap=softcap), slice(0, N))
        return loss.to(wide_dtype(hidden, weight, bias))
    need = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    settings = (shard, bfloat16_logits, budget, backend == "triton", need)
    return RowLoss.apply(hidden, weight, bias, ids, near, fn, *transform, *settings)
