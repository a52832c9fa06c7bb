"""Log-probabilities, LSE and entropy of a softmax head; the backward computes the logits again.

Shape letters: N rows, n rows of one chunk, D hidden size, V vocabulary, K ids a row.
"""

import torch
from torch import Tensor

from ipvrm_core.chunked.head import Head, HeadGradients, empty_gradients, wide_dtype
from ipvrm_core.chunked.softmax import logit_gradient_, row_softmax_


@torch.library.custom_op("ipvrm::chunked_linear_logprobs", mutates_args=())
def linear_logprobs(
    hidden: Tensor, weight: Tensor | None, bias: Tensor | None, ids: Tensor, temperature: float, max_buffer_bytes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """log pi(id | s) [N, K], LSE [N] and entropy [N] (nats) of z = (h W^T + b) / T, in float32 or float64.

    hidden [N, D], weight [V, D], bias [V]; with weight=None `hidden` is the logits [N, V]. ids [N, K] int64, < 0 is
    padding (value 0, no gradient). Differentiable in hidden, weight and bias through all three outputs.
    """
    head = Head(hidden, weight, bias, temperature, max_buffer_bytes)
    logprobs_NK = hidden.new_empty(ids.shape, dtype=head.wide)
    lse_N, entropy_N = (hidden.new_empty(head.N, dtype=head.wide) for _ in range(2))
    for rows, z_nV in head.chunks():
        softmax = row_softmax_(z_nV, head.scratch, ids[rows])
        logprobs_NK[rows], lse_N[rows], entropy_N[rows] = softmax.logprobs_NK, softmax.lse_N, softmax.entropy_N
    return logprobs_NK, lse_N, entropy_N


@linear_logprobs.register_fake
def _(hidden, weight, bias, ids, temperature, max_buffer_bytes):
    wide = wide_dtype(hidden, weight, bias)
    row = hidden.new_empty(hidden.shape[0], dtype=wide)
    return hidden.new_empty(ids.shape, dtype=wide), row, torch.empty_like(row)


@torch.library.custom_op("ipvrm::chunked_linear_logprobs_backward", mutates_args=())
def linear_logprobs_backward(
    grad_logprobs: Tensor | None,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    ids: Tensor,
    temperature: float,
    max_buffer_bytes: int,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dh, dW, db) from the gradients of the three outputs, None where an output was not used; need = (h, W, b)."""
    head = Head(hidden, weight, bias, temperature, max_buffer_bytes)
    gradients = HeadGradients(head, *need)
    for rows, z_nV in head.chunks():
        ids_nK = ids[rows]
        softmax = row_softmax_(z_nV, head.scratch, ids_nK)
        c_nK = torch.zeros_like(softmax.logprobs_NK) if grad_logprobs is None else grad_logprobs[rows]
        others = (None if grad is None else grad[rows] for grad in (grad_lse, grad_entropy))
        gradients.add(rows, logit_gradient_(softmax, head.scratch, ids_nK, c_nK, temperature, *others))
    return gradients.result(hidden, weight, bias)


@linear_logprobs_backward.register_fake
def _(grad_logprobs, grad_lse, grad_entropy, hidden, weight, bias, ids, temperature, max_buffer_bytes, need):
    return empty_gradients(hidden, weight, bias, need)


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, bias, ids, ctx.temperature, ctx.max_buffer_bytes = inputs
    ctx.save_for_backward(hidden, weight, bias, ids)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_logprobs, grad_lse, grad_entropy):
    need = list(ctx.needs_input_grad[:3])
    grads = linear_logprobs_backward(
        grad_logprobs, grad_lse, grad_entropy, *ctx.saved_tensors, ctx.temperature, ctx.max_buffer_bytes, need
    )
    return *(grad if wanted else None for grad, wanted in zip(grads, need, strict=True)), None, None, None


linear_logprobs.register_autograd(_backward, setup_context=_setup_context)
