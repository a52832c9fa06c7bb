"""The DistRL loss with its gradient made in the forward: 1 product without gradients, 2 for dh, 3 with dW.

A row's coefficients c_k are known as soon as its softmax is, so the logits are never computed twice. The upstream
gradient is a scalar and multiplies the stored result.

Shape letters: N rows, n rows of one chunk, D hidden size, V vocabulary, K candidates, M metrics.
"""

import math
from dataclasses import astuple, fields
from typing import Any

import torch
from torch import Tensor

from ipvrm_core.fused.head import HeadGradients, empty_gradients, wide_dtype
from ipvrm_core.fused.policy_terms import total_loss
from ipvrm_core.fused.rows import row_work
from ipvrm_core.fused.shard import VocabularyShard, unpacked
from ipvrm_core.fused.transform import LogitTransform
from ipvrm_core.fused.upstream import times_upstream
from ipvrm_core.types import METRICS, PolicyBatch, PolicyLossConfig


def pack_batch(batch: PolicyBatch) -> list[Tensor]:
    """The fields in their order, for an operator: a 0-d tensor stands for None."""
    values = [getattr(batch, field.name) for field in fields(batch)]
    return [batch.advantages_NS.new_empty(()) if value is None else value for value in values]


def pack_config(config: PolicyLossConfig) -> list[float]:
    """The fields in their order, for an operator: inf stands for None."""
    return [math.inf if value is None else float(value) for value in astuple(config)]


def _unpack(batch: list[Tensor], config: list[float]) -> tuple[PolicyBatch, PolicyLossConfig]:
    values = [None if value.dim() == 0 else value for value in batch]
    settings: list[Any] = [None if value == math.inf else value for value in config]
    return PolicyBatch(*values), PolicyLossConfig(*settings)


def _sweep(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    batch: list[Tensor],
    config: list[float],
    max_buffer_bytes: int,
    triton: bool,
    need: list[bool],
    into: Tensor | None,
    shard: VocabularyShard | None = None,
    bfloat16_logits: bool = False,
) -> tuple[Tensor, Tensor, HeadGradients]:
    batch_N, settings = _unpack(batch, config)
    transform = LogitTransform(settings.temperature, batch_N.temperatures_N, settings.softcap)
    options = {"masked_N": batch_N.masked_N, "with_gradient": any(need), "shard": shard}
    options["bfloat16_logits"] = bfloat16_logits
    work = row_work(triton, hidden, weight, bias, transform, max_buffer_bytes, **options)
    gradients, batch_N = HeadGradients(work.head, need, into, shard), work.prepared(batch_N)
    metrics_NM = hidden.new_empty(hidden.shape[0], len(METRICS), dtype=work.head.wide)
    for rows, x_nV in work.head.chunks():
        target_nV = gradients.target(rows, x_nV) if any(need) else None
        gradient = work.policy(rows, x_nV, target_nV, batch_N, settings, metrics_NM[rows])
        if gradient is not None:
            gradients.add(rows, gradient)
    metrics_M = metrics_NM.sum(0)
    return total_loss(dict(zip(METRICS, metrics_M.unbind(), strict=True)), settings), metrics_M, gradients


@torch.library.custom_op("ipvrm::distrl_loss", mutates_args=())
def distrl_loss(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    batch: list[Tensor],
    config: list[float],
    shard: str,
    bfloat16_logits: bool,
    max_buffer_bytes: int,
    triton: bool,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss 0-d, metrics [M], dh, dW, db). Differentiable in hidden, weight and bias through `loss` alone, once.

    hidden [N, D], weight [V, D], bias [V]; with weight=None `hidden` is x [N, V]. batch, config: `pack_batch` and
    `pack_config`. need = (h, W, b): which gradients to make; the others come back empty.
    """
    given = (hidden, weight, bias, batch, config, max_buffer_bytes, triton, need)
    loss, metrics_M, gradients = _sweep(*given, None, unpacked(shard), bfloat16_logits)
    return loss, metrics_M, *gradients.result(hidden, weight, bias)


@distrl_loss.register_fake
def _(hidden, weight, bias, batch, config, shard, bfloat16_logits, max_buffer_bytes, triton, need):
    return *_empty_values(hidden, weight, bias), *empty_gradients(hidden, weight, bias, need)


def _empty_values(hidden: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
    return tuple(hidden.new_empty(shape, dtype=wide_dtype(hidden, *rest)) for shape in ((), (len(METRICS),)))


def _setup_context(ctx, inputs, output) -> None:
    _, metrics_M, *grads = output
    ctx.n_batch, ctx.triton, ctx.need = len(inputs[3]), inputs[-2], inputs[-1]
    ctx.save_for_backward(*grads)
    ctx.mark_non_differentiable(metrics_M, *grads)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss, *_):
    return *times_upstream(ctx, grad_loss), [None] * ctx.n_batch, *[None] * 6


distrl_loss.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("ipvrm::distrl_loss_over_logits", mutates_args=("logits",))
def distrl_loss_over_logits(
    logits: Tensor, batch: list[Tensor], config: list[float], max_buffer_bytes: int, triton: bool
) -> tuple[Tensor, Tensor]:
    """(loss 0-d, metrics [M]); the logits [N, V] become dLoss/dlogits."""
    need = [True, False, False]
    loss, metrics_M, _ = _sweep(logits, None, None, batch, config, max_buffer_bytes, triton, need, logits)
    return loss, metrics_M


@distrl_loss_over_logits.register_fake
def _(logits, batch, config, max_buffer_bytes, triton):
    return _empty_values(logits)


class DistrlLossInPlace(torch.autograd.Function):
    """`distrl_loss_over_logits` with its gradient: the memory of the logits, given away once."""

    @staticmethod
    def forward(ctx, logits, batch, config, max_buffer_bytes, triton):
        logits = logits.detach()
        loss, metrics_M = distrl_loss_over_logits(logits, batch, config, max_buffer_bytes, triton)
        ctx.save_for_backward(logits)
        ctx.need, ctx.triton = [True], triton
        ctx.mark_non_differentiable(metrics_M)
        return loss, metrics_M

    @staticmethod
    def backward(ctx, grad_loss, _):
        return *times_upstream(ctx, grad_loss, in_place=True), None, None, None, None
