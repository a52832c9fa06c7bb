"""The functions of `segments` in torch: CPU and GPU, any floating point type.

Sums and scans go through the padded form: each sequence's result then depends on its own tokens alone, to the last
bit, whatever else is in the batch (a running sum over the packed vector minus offsets would not). Everything adds up in
float32 or wider; results are in x's dtype. They wait for the device, and the reverse scan is a Python loop.
"""

import torch
from torch import Tensor

from ipvrm_core.packing import lengths_of, sequence_ids, unpack


def _padded(x_N: Tensor, cu_seqlens: Tensor) -> Tensor:
    return unpack(_wide(x_N), cu_seqlens)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _repack(padded_BT: Tensor, cu_seqlens: Tensor) -> Tensor:
    return padded_BT[torch.arange(padded_BT.shape[1], device=padded_BT.device) < lengths_of(cu_seqlens)[:, None]]


def segment_sum(x_N: Tensor, cu_seqlens: Tensor) -> Tensor:
    """y_b = sum_{t in b} x_t: [N] -> [B]; 0 for an empty sequence."""
    padded_BT = _padded(x_N, cu_seqlens)
    # The last running sum rather than .sum(1), whose order of additions depends on the padded length.
    sum_B = padded_BT.cumsum(1)[:, -1] if padded_BT.shape[1] else padded_BT.sum(1)
    return sum_B.to(x_N.dtype)


def segment_cumsum(x_N: Tensor, cu_seqlens: Tensor) -> Tensor:
    """y_t = sum_{u <= t} x_u within the sequence: [N] -> [N]."""
    return _repack(_padded(x_N, cu_seqlens).cumsum(1), cu_seqlens).to(x_N.dtype)


def segment_reverse_scan(x_N: Tensor, cu_seqlens: Tensor, decay: float = 1.0) -> Tensor:
    """y_t = sum_{i >= t} decay^(i-t) x_i within the sequence: [N] -> [N]."""
    padded_BT = _padded(x_N, cu_seqlens)
    running_B = padded_BT.new_zeros(len(padded_BT))
    columns = []
    for t in reversed(range(padded_BT.shape[1])):
        running_B = padded_BT[:, t] + decay * running_B
        columns.append(running_B)
    scanned_BT = torch.stack(columns[::-1], dim=1) if columns else padded_BT
    return _repack(scanned_BT, cu_seqlens).to(x_N.dtype)


def group_moments(x_N: Tensor, cu_seqlens: Tensor, groups_B: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population std over all tokens of each token's group: [N] -> [N], [N]. groups_B: any integers."""
    return moments_within(x_N, groups_B[sequence_ids(cu_seqlens, len(x_N))])


def moments_within(x: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population std over each group, given back per element: [n], integers [n] -> [n], [n].

    The mean of equal values is that value and their std 0, exactly; a std of 0 passes no gradient.
    """
    groups = groups.unique(return_inverse=True)[1]
    wide, size_G = _wide(x), groups.bincount()

    def mean_of(values: Tensor) -> Tensor:
        return values.new_zeros(len(size_G)).index_add(0, groups, values) / size_G

    # As differences from the group's first value: a mean of equal floats may round.
    index = torch.arange(len(x), device=x.device)
    first_G = wide.detach()[groups.new_zeros(len(size_G)).scatter_reduce(0, groups, index, "amin", include_self=False)]
    offset = wide - first_G[groups]
    shift_G = mean_of(offset)
    variance_G = mean_of((offset - shift_G[groups]).square())
    spread_G = variance_G > 0
    std_G = torch.where(spread_G, variance_G.where(spread_G, 1.0).sqrt(), 0.0)
    return (first_G + shift_G)[groups].to(x.dtype), std_G[groups].to(x.dtype)
