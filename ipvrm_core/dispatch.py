"""Which backend runs a public function.

auto       triton where it can run (CUDA tensors, or the Triton interpreter), chunked elsewhere and for float64
triton     GPU kernels for the row work, cuBLAS for the products
chunked    torch alone, bounded memory
reference  the specification: holds [N, V]

A backend that is named and cannot run raises with the reason; nothing falls back in silence.
"""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "chunked", "reference")

# Both stay as they are in a process, and as module constants torch.compile takes them as such. Triton is not asked: it
# takes a second to import, and reads the same variable when it is.
_INSTALLED = find_spec("triton") is not None
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def why_no_triton(*tensors: Tensor | None) -> str | None:
    """The reason why the Triton kernels cannot run on these tensors; None when they can."""
    if not _INSTALLED:
        return "the package triton is not installed"
    present = [tensor for tensor in tensors if tensor is not None]
    if any(tensor.dtype == torch.float64 for tensor in present):
        return "the kernels compute in float32, and an input is float64"
    device = present[0].device
    if device.type == "cuda" or (device.type == "cpu" and _INTERPRETING):
        return None
    return f"the tensors are on {device}; it needs a GPU, or TRITON_INTERPRET=1 for the interpreter on the CPU"


def resolve(backend: str, *tensors: Tensor | None) -> str:
    """The name of the backend that will run. ValueError for an unknown name, RuntimeError for one that cannot run."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}; got {backend!r}")
    if backend not in ("auto", "triton"):
        return backend
    reason = why_no_triton(*tensors)
    if reason is None:
        return "triton"
    if backend == "triton":
        raise RuntimeError(f"backend 'triton' cannot run: {reason}")
    return "chunked"
