"""The DistRL loss with its gradient made in the forward: 1 product without gradients, 2 for dh, 3 with dW.

A row's coefficients c_k are known as soon as its softmax is, so the logits are never computed twice. The upstream
gradient is a scalar and multiplies the stored result.

Shape letters: N rows, n rows of one chunk, D hidden size, V vocabulary, K candidates, M metrics.
"""

import torch
from torch import Tensor

from ipvrm_core.chunked.head import Head, HeadGradients, empty_gradients, wide_dtype
from ipvrm_core.chunked.policy_terms import policy_terms, total_loss
from ipvrm_core.chunked.softmax import logit_gradient_, row_softmax_
from ipvrm_core.types import METRICS, PolicyBatch, PolicyLossConfig


@torch.library.custom_op("ipvrm::chunked_distrl_loss", mutates_args=())
def distrl_loss(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    batch: list[Tensor],
    config: list[float],
    max_buffer_bytes: int,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss 0-d, metrics [M], dh, dW, db). Differentiable in hidden, weight and bias through `loss` alone, once.

    hidden [N, D], weight [V, D], bias [V]; with weight=None `hidden` is the logits [N, V]. batch and config: the fields
    of PolicyBatch (without a missing ref_logprobs_N) and of PolicyLossConfig (inf for no dual clip) in their order.
    need = (h, W, b): which gradients to make; the others come back empty.
    """
    batch_N, settings = PolicyBatch(*batch), PolicyLossConfig(*config)
    head = Head(hidden, weight, bias, settings.temperature, max_buffer_bytes)
    gradients = HeadGradients(head, *need)
    ids_NK = batch_N.ids_NK
    metrics_NM = hidden.new_empty(head.N, len(METRICS), dtype=head.wide)
    for rows, z_nV in head.chunks():
        softmax = row_softmax_(z_nV, head.scratch, ids_NK[rows])
        terms = policy_terms(softmax.logprobs_NK, softmax.entropy_N, batch_N.rows(rows), settings)
        metrics_NM[rows] = terms.metrics_NM
        if any(need):
            grad_entropy_n = terms.grad_entropy_N if settings.entropy_coef else None
            dz_nV = logit_gradient_(
                softmax, head.scratch, ids_NK[rows], terms.c_NK, settings.temperature, grad_entropy_N=grad_entropy_n
            )
            gradients.add(rows, dz_nV)
    metrics_M = metrics_NM.sum(0)
    loss = total_loss(dict(zip(METRICS, metrics_M.unbind(), strict=True)), settings)
    return loss, metrics_M, *gradients.result(hidden, weight, bias)


@distrl_loss.register_fake
def _(hidden, weight, bias, batch, config, max_buffer_bytes, need):
    wide = wide_dtype(hidden, weight, bias)
    loss, metrics_M = (hidden.new_empty(shape, dtype=wide) for shape in ((), (len(METRICS),)))
    return loss, metrics_M, *empty_gradients(hidden, weight, bias, need)


def _setup_context(ctx, inputs, output) -> None:
    _, metrics_M, *grads = output
    ctx.n_batch, ctx.need = len(inputs[3]), inputs[-1]
    ctx.save_for_backward(*grads)
    ctx.mark_non_differentiable(metrics_M, *grads)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss, *_):
    if torch.is_grad_enabled():
        raise RuntimeError("distrl_loss has no second derivative; use backend='reference' with create_graph=True")
    grads = zip(ctx.saved_tensors, ctx.need, strict=True)
    scaled = (grad * grad_loss.to(grad.dtype) if wanted and grad_loss is not None else None for grad, wanted in grads)
    return *scaled, [None] * ctx.n_batch, None, None, None


distrl_loss.register_autograd(_backward, setup_context=_setup_context)
