"""The upstream gradient of a loss whose gradient was made in the forward: a number that multiplies what is stored."""

import torch
from torch import Tensor


@torch.library.custom_op("ipvrm::rescale", mutates_args=("x",))
def rescale(x: Tensor, scale: Tensor, triton: bool) -> None:
    """x <- scale x for x [N, V]; the Triton kernel (rows of stride 1) touches nothing where scale is 1."""
    if triton and x.stride(1) == 1:
        from ipvrm_core.kernels.rescale import rescale as rescale_kernel

        rescale_kernel(x, scale)
    else:
        x.mul_(scale)


def times_upstream(ctx, grad_loss: Tensor | None, in_place: bool | None = None) -> list[Tensor | None]:
    """grad_loss times every saved gradient that ctx.need asks for.

    in_place: they are given away, and a second backward is refused; None: on the Triton backend, where nobody traces.
    There the host does not know that grad_loss is 1, and the kernel that looks reads and writes nothing. On a CPU the
    host knows, and gives what is stored: who writes to it before a second backward is told so by torch.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("this loss has no second derivative; use backend='reference' with create_graph=True")
    if grad_loss is None:
        return [None] * len(ctx.need)
    if getattr(ctx, "given_away", False):
        raise RuntimeError("the first backward gave the gradient of this loss away; call the loss again for another")
    grads = [grad if wanted else None for grad, wanted in zip(ctx.saved_tensors, ctx.need, strict=True)]
    if in_place is None:
        in_place = ctx.triton and all(type(grad) in (Tensor, type(None)) for grad in grads)
    if not in_place and _is_one(grad_loss):
        return grads
    if not in_place:
        return [None if grad is None else grad * grad_loss.to(grad.dtype) for grad in grads]
    ctx.given_away = True
    for grad in grads:
        if grad is not None and grad.numel():
            rescale(grad if grad.dim() == 2 else grad[None], grad_loss, ctx.triton)
    return grads


def _is_one(x: Tensor) -> bool:
    """Whether it is a number on the CPU, not a tracer's, and 1."""
    return type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling() and x.item() == 1.0
