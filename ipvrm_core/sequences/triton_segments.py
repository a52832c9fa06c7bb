"""The functions of `segments` over the GPU kernels of kernels/, differentiable as often as wanted.

The gradient of a scan is the scan in the other direction, that of a sum gives each token its sequence's, and that of
group moments takes two group means. Float32 inside, results in x's dtype; deterministic, and a sequence's results are
its own to the bit.

Shape letters: N packed tokens, B sequences.
"""

import torch
from torch import Tensor

from ipvrm_core.packing import lengths_of, sequence_ids


def segment_cumsum(x_N: Tensor, cu_seqlens: Tensor) -> Tensor:
    """y_t = sum_{u <= t} x_u within the sequence: [N] -> [N]."""
    return segment_scan(x_N, cu_seqlens, 1.0, False)


def segment_reverse_scan(x_N: Tensor, cu_seqlens: Tensor, decay: float = 1.0) -> Tensor:
    """y_t = sum_{i >= t} decay^(i-t) x_i within the sequence: [N] -> [N]."""
    return segment_scan(x_N, cu_seqlens, float(decay), True)


@torch.library.custom_op("ipvrm::segment_scan", mutates_args=())
def segment_scan(x_N: Tensor, cu_seqlens: Tensor, decay: float, reverse: bool) -> Tensor:
    """y_t = x_t + decay * (y_{t-1}, or y_{t+1} in reverse) within the sequence: [N] -> [N]."""
    from ipvrm_core.kernels import segments

    return segments.scan(x_N, cu_seqlens, decay, reverse)


@segment_scan.register_fake
def _(x_N, cu_seqlens, decay, reverse):
    return x_N.new_empty(x_N.shape)


def _scan_context(ctx, inputs, output) -> None:
    _, cu_seqlens, ctx.decay, ctx.reverse = inputs
    ctx.save_for_backward(cu_seqlens)


def _scan_backward(ctx, grad_N):
    return segment_scan(grad_N, *ctx.saved_tensors, ctx.decay, not ctx.reverse), None, None, None


segment_scan.register_autograd(_scan_backward, setup_context=_scan_context)


@torch.library.custom_op("ipvrm::segment_sum", mutates_args=())
def segment_sum(x_N: Tensor, cu_seqlens: Tensor) -> Tensor:
    """y_b = sum_{t in b} x_t, 0 for an empty sequence: [N] -> [B]."""
    from ipvrm_core.kernels import segments

    return segments.total(x_N, cu_seqlens)


@segment_sum.register_fake
def _(x_N, cu_seqlens):
    return x_N.new_empty(lengths_of(cu_seqlens).shape)


def _sum_context(ctx, inputs, output) -> None:
    x_N, cu_seqlens = inputs
    ctx.total = len(x_N)
    ctx.save_for_backward(cu_seqlens)


def _sum_backward(ctx, grad_B):
    (cu_seqlens,) = ctx.saved_tensors
    return grad_B[sequence_ids(cu_seqlens, ctx.total)], None


segment_sum.register_autograd(_sum_backward, setup_context=_sum_context)


@torch.library.custom_op("ipvrm::group_moments", mutates_args=())
def group_moments(x_N: Tensor, cu_seqlens: Tensor, groups_B: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population std over all tokens of each token's group: [N] -> [N], [N]. groups_B: any integers."""
    from ipvrm_core.kernels import moments

    return moments.group_moments(x_N, cu_seqlens, groups_B)


@group_moments.register_fake
def _(x_N, cu_seqlens, groups_B):
    return x_N.new_empty(x_N.shape), x_N.new_empty(x_N.shape)


def _moments_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)


def _moments_backward(ctx, grad_mean_N, grad_std_N):
    """dL/dx_t = <dL/dmean> + <dL/dstd> (x_t - mean) / std, <.> the mean over t's group; std = 0 passes nothing."""
    x_N, cu_seqlens, groups_B, mean_N, std_N = ctx.saved_tensors
    by_mean_N, _ = group_moments(grad_mean_N, cu_seqlens, groups_B)
    by_std_N, _ = group_moments(grad_std_N, cu_seqlens, groups_B)
    score_N = torch.where(std_N > 0, (x_N - mean_N) / std_N.where(std_N > 0, 1.0), 0.0)
    return by_mean_N + by_std_N * score_N, None, None


group_moments.register_autograd(_moments_backward, setup_context=_moments_context)
