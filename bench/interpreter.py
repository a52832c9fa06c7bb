"""Triton's interpreter at more than twice its speed, for toy runs and tests on a CPU.

It patches triton.language anew at every launch and every call of a device function, which takes longer than what they
compute. Where nothing is compiled, once a process is enough. (Private names of triton, 3.5 to 3.7.)
"""

from types import SimpleNamespace

import triton.language as tl
from triton.runtime import interpreter

_patch = interpreter._patch_lang
_patched: set[frozenset[int]] = set()
_UNDO = SimpleNamespace(restore=lambda: None)  # what a launch wants to be given, to undo its patches


def _patch_once(function) -> SimpleNamespace:
    """Patches the parts of triton.language that the function's module names, the first time that it meets them."""
    parts = frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
    if parts not in _patched:
        _patched.add(parts)
        _patch(function)
    return _UNDO


def patch_once() -> None:
    """For this process, from now on."""
    interpreter._patch_lang = _patch_once
