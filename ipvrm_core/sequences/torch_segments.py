"""The functions of `segments` in torch: CPU and GPU, any floating point type.

Sums and scans go through the padded form: each sequence's result then depends on its own tokens alone, to the last
bit, whatever else is in the batch (a running sum over the packed vector minus offsets would not). They wait for the
device, and the reverse scan is a Python loop.
"""

import torch
from torch import Tensor

from ipvrm_core.packing import lengths_of, sequence_ids, unpack


def _repack(padded_BT: Tensor, cu_seqlens: Tensor) -> Tensor:
    return padded_BT[torch.arange(padded_BT.shape[1], device=padded_BT.device) < lengths_of(cu_seqlens)[:, None]]


def segment_sum(x_N: Tensor, cu_seqlens: Tensor) -> Tensor:
    """y_b = sum_{t in b} x_t: [N] -> [B]; 0 for an empty sequence."""
    padded_BT = unpack(x_N, cu_seqlens)
    # The last running sum rather than .sum(1), whose order of additions depends on the padded length.
    return padded_BT.cumsum(1)[:, -1] if padded_BT.shape[1] else padded_BT.sum(1)


def segment_cumsum(x_N: Tensor, cu_seqlens: Tensor) -> Tensor:
    """y_t = sum_{u <= t} x_u within the sequence: [N] -> [N]."""
    return _repack(unpack(x_N, cu_seqlens).cumsum(1), cu_seqlens)


def segment_reverse_scan(x_N: Tensor, cu_seqlens: Tensor, decay: float = 1.0) -> Tensor:
    """y_t = sum_{i >= t} decay^(i-t) x_i within the sequence: [N] -> [N]."""
    padded_BT = unpack(x_N, cu_seqlens)
    running_B = padded_BT.new_zeros(len(padded_BT))
    columns = []
    for t in reversed(range(padded_BT.shape[1])):
        running_B = padded_BT[:, t] + decay * running_B
        columns.append(running_B)
    scanned_BT = torch.stack(columns[::-1], dim=1) if columns else padded_BT
    return _repack(scanned_BT, cu_seqlens)


def group_moments(x_N: Tensor, cu_seqlens: Tensor, groups_B: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population std over all tokens of each token's group: [N] -> [N], [N]. groups_B: any integers."""
    return moments_within(x_N, groups_B[sequence_ids(cu_seqlens, len(x_N))])


def moments_within(x: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population std over each group, given back per element: [n], integers [n] -> [n], [n]."""
    groups = groups.unique(return_inverse=True)[1]
    size_G = groups.bincount().to(x.dtype)
    mean = (torch.zeros_like(size_G).index_add(0, groups, x) / size_G)[groups]
    variance_G = torch.zeros_like(size_G).index_add(0, groups, (x - mean).square()) / size_G
    return mean, variance_G.sqrt()[groups]
