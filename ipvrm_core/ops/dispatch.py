"""Which backend runs a public function.

auto       the fastest that runs on the tensors' device
triton     GPU kernels for the row work
chunked    torch alone, bounded memory
reference  the specification: holds [N, V]

A backend that is named and cannot run raises with the reason; nothing falls back in silence.
"""

import torch

BACKENDS = ("auto", "triton", "chunked", "reference")


def why_no_triton(device: torch.device) -> str | None:
    """The reason why the Triton kernels cannot run on this device; None when they can."""
    return "this version ships no Triton kernels"


def resolve(backend: str, device: torch.device) -> str:
    """The name of the backend that will run. ValueError for an unknown name, RuntimeError for one that cannot run."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}; got {backend!r}")
    if backend not in ("auto", "triton"):
        return backend
    reason = why_no_triton(device)
    if reason is None:
        return "triton"
    if backend == "triton":
        raise RuntimeError(f"backend 'triton' cannot run: {reason}")
    return "chunked"
