"""Kernels compiled for a GPU that is not here: what a launch would run, and what it would occupy.

    with compiling_for("sm_90") as kernels:
        row_logprobs(x_NV, ids_NK, launch=row_launch("sm_90", x_NV.element_size(), V))  # an ordinary launcher
    kernels[0].registers

A stand-in for Triton's driver names the target, and every `kernel[grid](...)` stops after compiling exactly the
specialisation that it would have launched. Needs neither a GPU nor a driver, and reads no memory: the tensors may be on
the device cpu or meta. Triton's cache makes the second time fast.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ipvrm_core.bench.machine_code import Loop, disassembled, loops

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Compiled(NamedTuple):
    """One specialisation. Registers and spilled bytes are per thread, shared bytes per program."""

    kernel: str
    target: str
    signature: dict[str, str]  # argument -> Triton type, or "constexpr"
    constants: dict[str, object]  # the constexpr arguments, and what Triton made one: None, and the integer 1
    num_warps: int
    registers: int  # on AMD the vector registers
    spilled: int  # local memory (AMD: scratch) of the binary; our kernels have no other use of it
    shared: int
    assembly: str  # PTX, or of AMD the machine's
    loops: list[Loop]  # over blocks of a row, of the machine code of sm_90; empty for kernels without BLOCK


class _Driver(NamedTuple):
    """What JITFunction.run asks of a driver before it launches. A target is a device: each has its own cache."""

    target: str

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> str:
        return self.target

    def get_current_stream(self, device: str) -> None:
        return None


@contextmanager
def compiling_for(target: str) -> Iterator[list[Compiled]]:
    """Inside, launching a kernel compiles it for `target` and appends to the list. Not for concurrent threads."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("compiling_for needs compiled kernels; got TRITON_INTERPRET=1, which replaces them")
    kernels: list[Compiled] = []
    run, active = JITFunction.run, driver._active  # None where no driver was asked for yet

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernels.append(_describe(self, kernel, target))
        return kernel

    JITFunction.run = compile_only
    driver.set_active(_Driver(target))
    try:
        yield kernels
    finally:
        JITFunction.run = run
        driver.set_active(active)


def _describe(function: JITFunction, kernel, target: str) -> Compiled:
    constants = {function.arg_names[path[0]]: value for path, value in kernel.src.constants.items()}
    metadata = kernel.metadata
    if "amdgcn" in kernel.asm:
        registers, spilled, found = *_amd_usage(kernel.asm), []
    else:
        counted = constants.get("BLOCK", 0) if target == "sm_90" else 0  # disassembling takes longer than compiling
        logits_of_a_thread = counted // (32 * metadata.num_warps)
        first = next(iter(kernel.src.signature.values()))  # of a row kernel the logits
        registers, spilled, found = _cubin_usage(kernel.asm, logits_of_a_thread, 4 if first == "*fp32" else 2)
    return Compiled(
        function.__name__,
        target,
        kernel.src.signature,
        constants,
        metadata.num_warps,
        registers,
        spilled,
        metadata.shared,
        kernel.asm["amdgcn" if "amdgcn" in kernel.asm else "ptx"],
        found,
    )


def _cubin_usage(asm: dict, logits_of_a_thread: int, bytes_of_a_logit: int) -> tuple[int, int, list[Loop]]:
    """Registers, bytes of local memory (stack frame and LOCAL), and loops, by the cuobjdump that Triton ships."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = loops(disassembled(file.name), logits_of_a_thread, bytes_of_a_logit) if logits_of_a_thread else []
    registers, stack, local = (int(re.search(rf"{word}:(\d+)", text)[1]) for word in ("REG", "STACK", "LOCAL"))
    return registers, stack + local, found


def _amd_usage(asm: dict) -> tuple[int, int]:
    """Vector registers, and bytes of scratch, from the metadata at the end of the assembly."""
    return tuple(
        int(re.search(rf"\.{name}:\s+(\d+)", asm["amdgcn"])[1]) for name in ("vgpr_count", "private_segment_fixed_size")
    )
