"""Bytes of live tensors by what they are, and their peak. Works on fake tensors, which have shapes and no memory.

Shape letters: N rows, V vocabulary, D hidden size.
"""

import weakref
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ipvrm_core.fused.head import default_buffer_bytes

OTHER = "activations"  # what nothing else is: saved for the backward pass, or on its way
HEAD = "head"


class Tracker(TorchDispatchMode):
    """As a context. live, peak: {what: bytes}; `total` and `most` their sums.

    The functions at the head work on private buffers that a fake tensor does not show; they are counted for `device`.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.live: Counter[str] = Counter()
        self.kinds: dict[int, tuple[str, int]] = {}
        self.total = 0
        self.restart()

    def restart(self) -> None:
        """The peak begins anew with what is live."""
        self.most, self.peak = self.total, Counter(self.live)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        ours = function.namespace == "ipvrm"
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor, HEAD if ours else OTHER)
        if ours:
            given = dict(zip((argument.name for argument in function._schema.arguments), args, strict=False))
            private = head_bytes(given, self.device) if "hidden" in given else 0
            self._count(HEAD, private)
            self._count(HEAD, -private)
        return result

    def label(self, what: str, tensors: Iterable[Tensor]) -> None:
        """Say what these tensors are."""
        for tensor in tensors:
            self._see(tensor, OTHER)
            key = tensor.untyped_storage()._cdata
            old, size = self.kinds[key]
            self.kinds[key] = what, size
            self.live[old] -= size
            self.live[what] += size

    def _see(self, tensor: Tensor, what: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.kinds:
            self.kinds[key] = what, storage.nbytes()
            weakref.finalize(storage, self._gone, key)
            self._count(what, storage.nbytes())

    def _gone(self, key: int) -> None:
        what, size = self.kinds.pop(key)
        self._count(what, -size)

    def _count(self, what: str, size: int) -> None:
        self.live[what] += size
        self.total += size
        if self.total > self.most:
            self.restart()


def head_bytes(given: dict, device: torch.device) -> int:
    """The private buffers of one call at the head, whose arguments are given (ipvrm_core/fused/head.py): logits, on a
    GPU with their gradient apart, within the budget; on a CPU a float32 copy of a weight with fewer bits."""
    N, (V, D) = given["hidden"].shape[0], given["weight"].shape
    cuda = device.type == "cuda"
    upcast = 4 * V * D if given["weight"].itemsize < 4 and not cuda else 0
    budget = default_buffer_bytes(device, given["weight"].requires_grad) if cuda else given["max_buffer_bytes"]
    return min(budget, N * V * (6 if cuda else 4)) + upcast
