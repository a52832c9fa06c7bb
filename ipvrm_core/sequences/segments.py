"""Sums and scans that stay inside a sequence of a packed batch, and moments over groups of sequences.

The one place that chooses between `torch_segments` and `triton_segments` (kernels), which have the same functions.

Shape letters: N packed tokens, B sequences.
"""

from types import ModuleType

from torch import Tensor

from ipvrm_core.dispatch import resolve
from ipvrm_core.packing import lengths_of, sequence_ids
from ipvrm_core.sequences import torch_segments, triton_segments


def _on(x_N: Tensor) -> ModuleType:
    if x_N.dim() != 1 or not x_N.is_floating_point():
        raise ValueError(f"token values must be floating point [N]; got {x_N.dtype}, shape {tuple(x_N.shape)}")
    return triton_segments if resolve("auto", x_N) == "triton" else torch_segments


def segment_sum(x_N: Tensor, cu_seqlens: Tensor) -> Tensor:
    """y_b = sum_{t in b} x_t, 0 for an empty sequence: [N] -> [B]."""
    return _on(x_N).segment_sum(x_N, cu_seqlens)


def segment_mean(x_N: Tensor, cu_seqlens: Tensor) -> Tensor:
    """y_b = (1/T_b) sum_{t in b} x_t, 0 for an empty sequence: [N] -> [B]."""
    return segment_sum(x_N, cu_seqlens) / lengths_of(cu_seqlens).clamp(min=1)


def segment_cumsum(x_N: Tensor, cu_seqlens: Tensor) -> Tensor:
    """y_t = sum_{u <= t} x_u within the sequence: [N] -> [N]."""
    return _on(x_N).segment_cumsum(x_N, cu_seqlens)


def segment_reverse_scan(x_N: Tensor, cu_seqlens: Tensor, decay: float = 1.0) -> Tensor:
    """y_t = sum_{i >= t} decay^(i-t) x_i within the sequence: [N] -> [N]."""
    return _on(x_N).segment_reverse_scan(x_N, cu_seqlens, decay)


def group_moments(x_N: Tensor, cu_seqlens: Tensor, groups_B: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population std over all tokens of each token's group: [N] -> [N], [N]. groups_B: any integers."""
    return _on(x_N).group_moments(x_N, cu_seqlens, groups_B)


def expand(x_B: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """y_t = x_b for every t in b: [B] -> [N]."""
    return x_B[sequence_ids(cu_seqlens, total)]
