"""What the kernels occupy: every shipped launch, compiled for every target without a GPU (bench/offline.py)."""

import ast
import os
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime import driver

from ipvrm_core.bench.launches import BUDGETS, LAUNCHES, Budget, Shipped, gradient, policy
from ipvrm_core.bench.offline import TARGETS, compiling_for
from ipvrm_core.bench.resources import compile_all, markdown, over_budget, programs_per_sm

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
KERNELS = Path(__file__).resolve().parents[2] / "kernels"


@triton.jit
def scale_by_sum(x, out, BLOCK: tl.constexpr):
    """Holds BLOCK values at once: a large block cannot stay in registers."""
    offsets = tl.arange(0, BLOCK)
    values = tl.load(x + offsets)
    tl.store(out + offsets, values * tl.sum(values))


@triton.jit
def add_one(x, n, BLOCK: tl.constexpr):
    for start in range(0, n, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        values = tl.load(x + offsets)
        tl.debug_barrier()
        tl.store(x + offsets, values + 1)


def toy(block: int) -> Shipped:
    x, out = torch.ones(block), torch.zeros(block)
    return Shipped("toy", lambda target: scale_by_sum[(1,)](x, out, BLOCK=block, num_warps=8))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shipped", LAUNCHES, ids=lambda shipped: shipped.case)
def test_shipped_launch(shipped, target):
    rows = compile_all([shipped], (target,))
    assert over_budget(rows, BUDGETS) == []


BARRIER = r"bar\.sync|s_barrier"
ONE_LOGIT = r"ld\.global\.b(16|32) |(global|buffer)_load_(dword|ushort) "
ANY_STORE = r"st\.global|(global|buffer)_store"
MANY_LOGITS = r"st\.global\.v4|(global|buffer)_store_dwordx4"


def barriers_before_the_first_store(assembly: str) -> int:
    """Between the last load of single logits, which is the gather at ids, and the first store of a block of them."""
    lines = assembly.splitlines()
    store = next(i for i, line in enumerate(lines) if re.search(MANY_LOGITS, line))
    gather = max(i for i, line in enumerate(lines[:store]) if re.search(ONE_LOGIT, line))
    return sum(bool(re.search(BARRIER, line)) for line in lines[gather:store])


def barriers_before_the_last_store(assembly: str) -> int:
    """Between the last store of a block of logits and the last store of all, which is that at ids."""
    lines = assembly.splitlines()
    block = max(i for i, line in enumerate(lines) if re.search(MANY_LOGITS, line))
    last = max(i for i, line in enumerate(lines) if re.search(ANY_STORE, line))
    assert last > block
    return sum(bool(re.search(BARRIER, line)) for line in lines[block:last])


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_where_threads_wait_for_one_another(dtype, target):
    """Every warp gathers the logits at ids for itself, and `out` may be x; the columns at ids are written last."""
    x_NV = torch.empty(2, 8192, dtype=dtype)
    with compiling_for(target) as kernels:
        policy(target, x_NV)
        policy(target, x_NV, out=dtype)
        gradient(target, x_NV)
    before = [barriers_before_the_first_store(kernel.assembly) for kernel in kernels[:2]]
    assert before == [1, 0]
    assert all(barriers_before_the_last_store(kernel.assembly) for kernel in kernels)


ONE_VISIT = [shipped for shipped in LAUNCHES if "one visit" in shipped.case and "options" not in shipped.case]


@pytest.mark.parametrize("shipped", ONE_VISIT, ids=lambda shipped: shipped.case)
def test_one_visit_moves_six_bytes_a_logit_and_waits_for_nothing(shipped):
    """4 read of float32 and 2 written of bfloat16; what the times of docs/kernels.md are derived from."""
    with compiling_for("sm_90") as kernels:
        shipped.launch("sm_90")
    loop = kernels[0].loops[0]
    given = 2 if re.search("bfloat16 to bfloat16|of bfloat16", shipped.case) else 4
    assert (loop.loaded, loop.stored, loop.barriers) == (given, 2, 0)
    assert 6.5 <= loop.instructions <= 10.5


def test_loops_are_counted_right():
    """A loop of known content: a load and a store of 16 bytes for the 4 numbers of a thread."""
    with compiling_for("sm_90") as kernels:
        add_one[(1,)](torch.ones(4096), 4096, BLOCK=1024, num_warps=8)
        scale_by_sum[(1,)](torch.ones(4096), torch.zeros(4096), BLOCK=4096, num_warps=4)
    (loop,) = kernels[0].loops
    assert (loop.loaded, loop.stored, loop.barriers) == (4, 4, 1)
    assert 2 <= loop.instructions <= 8
    assert kernels[1].loops == []


def launched_names() -> set[str]:
    """Functions that kernels/ starts, as `name[grid](...)`."""
    calls = [
        node.func.value.id
        for path in KERNELS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and isinstance(node.func.value, ast.Name)
    ]
    return set(calls)


def test_no_kernel_is_forgotten():
    compiled = {row.name for row in compile_all(LAUNCHES, ("sm_90",))}
    assert compiled == launched_names() == set(BUDGETS)


def test_a_spilling_kernel_is_caught():
    rows = compile_all([toy(65536)], ("sm_90",))
    assert rows[0].on["sm_90"].spilled > 0
    found = over_budget(rows, {"scale_by_sum": Budget(registers=255, shared=1024)})
    assert len(found) == 1
    assert "scale_by_sum has spilled" in found[0]


@pytest.mark.parametrize(("registers", "shared", "caught"), [(255, 1024, 0), (8, 1024, 1), (255, 0, 1), (8, 0, 2)])
def test_a_kernel_over_its_budget_is_caught(registers, shared, caught):
    rows = compile_all([toy(4096)], ("sm_90",))
    assert len(over_budget(rows, {"scale_by_sum": Budget(registers, shared)})) == caught


def test_a_kernel_without_a_budget_is_refused():
    with pytest.raises(KeyError, match="scale_by_sum"):
        over_budget(compile_all([toy(4096)], ("sm_90",)), {})


def test_a_launch_that_starts_nothing_is_refused():
    with pytest.raises(RuntimeError, match="started no kernel on sm_80"):
        compile_all([Shipped("idle", lambda target: None)])


@pytest.mark.parametrize("target", TARGETS)
def test_compiling_describes_the_launch_and_runs_nothing(target):
    x, out = torch.ones(4096), torch.zeros(4096)
    before = driver._active
    with compiling_for(target) as kernels:
        scale_by_sum[(1,)](x, out, BLOCK=4096, num_warps=4)
        scale_by_sum[(1,)](x.bfloat16(), out, BLOCK=4096, num_warps=8)
    assert driver._active is before
    assert out.count_nonzero() == 0
    assert [kernel.signature["x"] for kernel in kernels] == ["*fp32", "*bf16"]
    assert [kernel.num_warps for kernel in kernels] == [4, 8]
    for kernel in kernels:
        assert kernel.constants == {"BLOCK": 4096}
        assert (kernel.kernel, kernel.target, kernel.spilled) == ("scale_by_sum", target, 0)
        values_of_a_thread = 4096 // (kernel.num_warps * TARGETS[target].warp_size)
        assert values_of_a_thread <= kernel.registers < 256
        assert 0 < kernel.shared <= 4096 * 4  # bf16 is laid out anew for the float32 store


def test_the_driver_comes_back_after_an_error():
    before = driver._active
    with pytest.raises(ZeroDivisionError), compiling_for("sm_90"):
        _ = 1 / 0
    assert driver._active is before


@pytest.mark.parametrize(
    ("registers", "num_warps", "shared", "programs"),
    [
        (32, 8, 0, 8),  # 64 warps
        (16, 1, 0, 32),  # 32 programs
        (128, 8, 0, 2),  # 128 * 32 * 8 = 32768 registers
        (129, 8, 0, 1),  # 136 of them, in units of 8 a thread
        (255, 8, 0, 1),
        (32, 4, 100 * 1024, 2),  # 101 KiB of 228
    ],
)
def test_programs_per_sm(registers, num_warps, shared, programs):
    assert programs_per_sm(registers, num_warps, shared) == programs


def test_markdown_names_what_was_compiled():
    rows = compile_all([toy(4096), toy(65536)], ("sm_90", "gfx942"))
    header, _, small, large = markdown(rows, {"scale_by_sum": Budget(64, 1024)}).splitlines()
    assert header.count("|") == small.count("|") == large.count("|")
    assert "| 4096 / 8: " in small
    assert "spilled" not in small
    assert f"**{rows[1].on['sm_90'].spilled} B spilled**" in large
    assert small.endswith(" | 64, 1024 B |")


def test_the_interpreter_is_refused():
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), compiling_for("sm_90"):
            pass
    assert not triton.knobs.runtime.interpret
