"""Triton's interpreter at more than twice its speed, for toy runs and tests on a CPU.

It patches triton.language anew at every launch and every call of a device function, which takes longer than what they
compute. Where nothing is compiled, once a process is enough. And it cuts float32 off where it becomes bfloat16: here it
rounds to nearest, as every GPU does. (Private names of triton, 3.5 to 3.7.)
"""

from types import SimpleNamespace

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_patch, _convert = interpreter._patch_lang, interpreter._convert_float
_patched: set[frozenset[int]] = set()
_UNDO = SimpleNamespace(restore=lambda: None)  # what a launch wants to be given, to undo its patches


def _patch_once(function) -> SimpleNamespace:
    """Patches the parts of triton.language that the function's module names, the first time that it meets them."""
    parts = frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
    if parts not in _patched:
        _patched.add(parts)
        _patch(function)
    return _UNDO


def _convert_rounded(values, source, target, rounding_mode):
    """The bits of `values` in another type, as the interpreter holds them."""
    if (source, target) != (tl.float32, tl.bfloat16):
        return _convert(values, source, target, rounding_mode)
    rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16).view(torch.uint16)
    return rounded.numpy().reshape(values.shape)


def patch_once() -> None:
    """For this process, from now on."""
    interpreter._patch_lang, interpreter._convert_float = _patch_once, _convert_rounded
