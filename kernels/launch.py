"""Launch configurations: a static table, so that the same call always runs the same code.

No autotuning: it would time kernels that write in place, and would pick by whatever shape came first.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor


class Launch(NamedTuple):
    """Elements of a row (or sequence) that a program takes at a time, and the warps it has."""

    block: int
    num_warps: int


# Row sweeps over a vocabulary: (architecture, bytes per logit) -> Launch. Derived from register counts
# (docs/kernels.md), not yet measured on a GPU.
_ROWS = {
    ("sm_80", 4): Launch(2048, 8),
    ("sm_80", 2): Launch(2048, 8),
    ("sm_90", 4): Launch(2048, 8),
    ("sm_90", 2): Launch(2048, 8),
    ("sm_100", 4): Launch(2048, 8),
    ("sm_100", 2): Launch(2048, 8),
    ("gfx942", 4): Launch(4096, 8),
    ("gfx942", 2): Launch(4096, 8),
    ("interpreter", 4): Launch(128, 1),  # several blocks a row even at the sizes of a test
    ("interpreter", 2): Launch(128, 1),
}


def row_launch(architecture: str, bytes_per_logit: int, vocabulary: int) -> Launch:
    """The configuration of a sweep over rows; a short vocabulary takes a smaller block and fewer warps."""
    launch = _ROWS[architecture, min(bytes_per_logit, 4)]
    block = min(launch.block, max(32, triton.next_power_of_2(vocabulary)))
    return Launch(block, max(1, min(launch.num_warps, block // 256)))


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The small per-row inputs as the kernels address them."""
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def architecture_of(device: torch.device) -> str:
    """sm_80, sm_90, sm_100, gfx942, or interpreter for a CPU. Other GPUs use the nearest smaller entry of the table."""
    if device.type == "cpu":
        return "interpreter"
    return _gpu_architecture(device.index or 0)


@cache
def _gpu_architecture(index: int) -> str:
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(index)
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"
