"""Log-probabilities, LSE and entropy of a softmax head; the backward computes the logits again.

Shape letters: N rows, n rows of one chunk, D hidden size, V vocabulary, K ids a row.
"""

import torch
from torch import Tensor

from ipvrm_core.fused.head import HeadGradients, empty_gradients, wide_dtype
from ipvrm_core.fused.rows import row_work
from ipvrm_core.fused.shard import unpacked
from ipvrm_core.fused.transform import LogitTransform
from ipvrm_core.types import Truncation


@torch.library.custom_op("ipvrm::linear_logprobs", mutates_args=())
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    ids: Tensor,
    near: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
    truncation: list[float],
    shard: str,
    max_buffer_bytes: int,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log pi(id | s) [N, K], LSE [N] and entropy [N] (nats) of the logits, in float32 or float64, and row statistics.

    hidden [N, D], weight [V, D], bias [V]; with weight=None `hidden` is x [N, V]. ids [N, K] int64, < 0 is padding
    (value 0, no gradient). near [N]: about log pi of ids[:, 0], for the kernels. truncation: `Truncation.packed`.
    Differentiable in hidden, weight and bias through the first three outputs.
    """
    transform = LogitTransform(temperature, temperatures, softcap)
    given = (hidden, weight, bias, transform, max_buffer_bytes)
    work = row_work(triton, *given, near_N=near, shard=unpacked(shard), truncation=Truncation.unpacked(truncation))
    outputs = _empty_outputs(hidden, weight, bias, ids)
    for rows, x_nV in work.head.chunks():
        for output, part in zip(outputs, work.logprobs(rows, x_nV, ids[rows]), strict=True):
            output[rows] = part
    return outputs


def _empty_outputs(hidden, weight, bias, ids) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, wide = hidden.shape[0], wide_dtype(hidden, weight, bias)
    return tuple(hidden.new_empty(shape, dtype=wide) for shape in (ids.shape, (N,), (N,), (N, 2)))


@linear_logprobs.register_fake
def _(hidden, weight, bias, ids, *_):
    return _empty_outputs(hidden, weight, bias, ids)


@torch.library.custom_op("ipvrm::linear_logprobs_backward", mutates_args=())
def linear_logprobs_backward(
    grad_logprobs: Tensor | None,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    entropy: Tensor,
    statistics: Tensor,
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    ids: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
    truncation: list[float],
    shard: str,
    max_buffer_bytes: int,
    triton: bool,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dh, dW, db) from the gradients of the three outputs, None where an output was not used; need = (h, W, b)."""
    transform = LogitTransform(temperature, temperatures, softcap)
    part = unpacked(shard)
    given, cut = (hidden, weight, bias, transform, max_buffer_bytes), Truncation.unpacked(truncation)
    work = row_work(triton, *given, with_gradient=True, shard=part, truncation=cut)
    gradients = HeadGradients(work.head, need, shard=part)
    if grad_logprobs is None:
        grad_logprobs = statistics.new_zeros(ids.shape)
    for rows, x_nV in work.head.chunks():
        lse_n, entropy_n = (None if grad is None else grad[rows] for grad in (grad_lse, grad_entropy))
        gradient = work.logprobs_gradient(
            rows,
            x_nV,
            gradients.target(rows, x_nV),
            ids[rows],
            grad_logprobs[rows],
            lse_n,
            entropy_n,
            statistics[rows],
            entropy[rows],
        )
        gradients.add(rows, gradient)
    return gradients.result(hidden, weight, bias)


@linear_logprobs_backward.register_fake
def _(grad_logprobs, grad_lse, grad_entropy, entropy, statistics, hidden, weight, bias, *settings):
    return empty_gradients(hidden, weight, bias, settings[-1])


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, bias, ids, _, ctx.temperature, temperatures, *ctx.settings = inputs
    _, _, entropy, statistics = output
    ctx.save_for_backward(entropy, statistics, hidden, weight, bias, ids, temperatures)
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_logprobs, grad_lse, grad_entropy, _):
    need, grads_out = list(ctx.needs_input_grad[:3]), (grad_logprobs, grad_lse, grad_entropy)
    *saved, temperatures = ctx.saved_tensors
    grads = linear_logprobs_backward(*grads_out, *saved, ctx.temperature, temperatures, *ctx.settings, need)
    return *(grad if wanted else None for grad, wanted in zip(grads, need, strict=True)), *[None] * 9


linear_logprobs.register_autograd(_backward, setup_context=_setup_context)
