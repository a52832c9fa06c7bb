"""Any differentiable loss of a row, its gradient made in the forward: 1 product without gradients, 2 for dh, 3 with dW.

The caller's function sees the log-probs of a chunk; its derivatives by them are all that the chunk's logits are still
needed for. A Python function cannot enter the schema of an operator, so this is an autograd function: torch.compile
breaks its graph here.

Shape letters: N rows, n rows of one chunk, D hidden size, V vocabulary, K ids a row.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ipvrm_core.fused.head import HeadGradients
from ipvrm_core.fused.rows import row_work
from ipvrm_core.fused.transform import LogitTransform
from ipvrm_core.fused.upstream import times_upstream
from ipvrm_core.types import LogProbs

RowFunction = Callable[[LogProbs, slice], Tensor]  # (of n rows, which rows of N) -> 0-d, their sum


class RowLoss(torch.autograd.Function):
    """sum over chunks of fn(log-probs, rows): 0-d in the wide type."""

    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        ids,
        near,
        fn,
        temperature,
        temperatures,
        softcap,
        shard,
        bfloat16_logits,
        max_buffer_bytes,
        triton,
        need,
    ):
        transform = LogitTransform(temperature, temperatures, softcap)
        options = {"near_N": near, "with_gradient": any(need), "shard": shard, "bfloat16_logits": bfloat16_logits}
        work = row_work(triton, hidden, weight, bias, transform, max_buffer_bytes, **options)
        gradients = HeadGradients(work.head, need, shard=shard)
        loss = hidden.new_zeros((), dtype=work.head.wide)
        for rows, x_nV in work.head.chunks():
            target_nV = gradients.target(rows, x_nV) if any(need) else None
            value, gradient = work.loss(
                rows, x_nV, target_nV, ids[rows], partial(value_and_gradient, fn, rows, any(need))
            )
            loss += value
            if gradient is not None:
                gradients.add(rows, gradient)
        ctx.need, ctx.triton = need, triton
        ctx.save_for_backward(*gradients.result(hidden, weight, bias))
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        return *times_upstream(ctx, grad_loss), *[None] * 11


def value_and_gradient(fn: RowFunction, rows: slice, need: bool, logprobs: LogProbs) -> tuple[Tensor, list]:
    """fn's value and its derivatives by log-probs, LSE and entropy; None where it does not depend on one."""
    with torch.set_grad_enabled(need):
        leaves = LogProbs(*(value.detach().requires_grad_(need) for value in logprobs))
        value = called(fn, leaves, rows)
        if not value.requires_grad:
            return value, [None] * 3
        _refuse_other_leaves(value, leaves)
        return value.detach(), list(torch.autograd.grad(value, leaves, allow_unused=True))


def called(fn: RowFunction, logprobs: LogProbs, rows: slice) -> Tensor:
    """fn's value, if it is one number."""
    value = fn(logprobs, rows)
    if not isinstance(value, Tensor) or value.dim():
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"fn must return a 0-d tensor, the sum over its rows; got {got}")
    return value


def _refuse_other_leaves(value: Tensor, leaves: LogProbs) -> None:
    """The gradient of anything else that fn holds would be lost without a word."""
    seen, open_nodes = set(), [value.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and all(variable is not leaf for leaf in leaves):
            raise ValueError(f"fn uses a tensor of shape {tuple(variable.shape)} that requires grad: detach it")
        open_nodes += [parent for parent, _ in node.next_functions]
