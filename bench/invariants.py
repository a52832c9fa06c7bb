"""What must hold to the bit, and under torch.compile and CUDA graphs: the second half of bench/correctness.py.

Fresh inputs of one size a function; AssertionError where a property does not hold.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from ipvrm_core.bench import functions
from ipvrm_core.bench.functions import ALL, FROM_LOGITS, LINEAR, outputs_and_gradients
from ipvrm_core.bench.inputs import Inputs, make_inputs

Check = Callable[[], str | None]
COMPILED, CAPTURED = "torch.compile(fullgraph=True)", "CUDA graph"


def bit_checks(run) -> Iterator[tuple[str, str, Check]]:
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    shape = (2, 16, 101, 5) if run.toy else (3000, 64, 151936, 5)
    for function in ALL:
        yield "same bits twice", function, partial(same_bits, run, function, shape, dtype)
        yield "same bits beside other rows", function, partial(same_row, run, function, shape, dtype)
    # The last product of a head is shorter, and BLAS may choose other code for it.
    for function in FROM_LOGITS:
        yield "same bits in a smaller batch", function, partial(smaller_batch, run, function, shape, dtype)
    for function in ("distrl_loss", "linear_logprobs", "row_loss"):
        yield "gradients alone and together", function, partial(partial_gradients, run, function, dtype)


def same_bits(run, function: str, shape: tuple, dtype: torch.dtype) -> None:
    x = _inputs(function, shape, run.device, dtype)
    first, second = (outputs_and_gradients(function, x, run.backend) for _ in range(2))
    assert all(map(torch.equal, first, second)), "two equal calls gave different bits"


def same_row(run, function: str, shape: tuple, dtype: torch.dtype) -> None:
    """Row 0 of every per-row result while the other rows' values change."""
    x = _inputs(function, shape, run.device, dtype)
    results = []
    for _ in range(2):
        outputs = outputs_and_gradients(function, x, run.backend)
        per_row = outputs if "distrl" not in function else outputs[-len(x.wanted) :][:1]
        results.append([value[0] for value in per_row if value.dim() and len(value) == shape[0]])
        leaf = x.hidden if x.logits is None else x.logits
        with torch.no_grad():
            leaf[1:] = 10 * torch.randn_like(leaf[1:])
    assert results[0], "nothing was compared"
    assert all(map(torch.equal, *results)), "row 0 changed with the other rows' values"


def smaller_batch(run, function: str, shape: tuple, dtype: torch.dtype) -> None:
    """The last rows of given logits among all rows, and alone."""
    x, rows = _inputs(function, shape, run.device, dtype), slice(shape[0] // 2, None)

    def per_row(y: Inputs) -> list[torch.Tensor]:
        if "loss" in function:
            return outputs_and_gradients(function, y, run.backend)[-len(y.wanted) :][:1]
        return functions.call(function, y, run.backend)[0]

    piece = x.logits.detach()[rows].clone().requires_grad_()
    alone = per_row(replace(x, logits=piece, batch=x.batch.rows(rows)))
    assert all(torch.equal(a[rows], b) for a, b in zip(per_row(x), alone, strict=True)), "rows differ when alone"


def partial_gradients(run, function: str, dtype: torch.dtype) -> None:
    names, results = ("hidden", "weight", "bias"), {}
    for wanted in (names, ("hidden",), ("weight",), ("bias",)):  # frozen W and frozen h among them
        x = make_inputs(2, 6, 65, 4, run.device, dtype)
        for name in names:
            getattr(x, name).requires_grad_(name in wanted)
        total = functions.call(function, x, run.backend)[1]
        results[wanted] = dict(zip(wanted, torch.autograd.grad(total, [getattr(x, n) for n in wanted]), strict=True))
    for wanted, gradients in results.items():
        for name, value in gradients.items():
            assert torch.equal(value, results[names][name]), f"d{name} differs when only {wanted} are asked for"


def torch_checks(run) -> Iterator[tuple[str, str, Check]]:
    for function in LINEAR if run.toy else ALL:  # compiling takes a third of a toy run
        if "row_loss" not in function:  # a Python function is not part of a graph
            yield COMPILED, function, partial(compiles, run, function)
        if run.device.type == "cuda":
            yield CAPTURED, function, partial(captures, run, function)


def compiles(run, function: str) -> None:
    """The same numbers, to rounding: Inductor may order a few sums of its own differently."""
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    x = _inputs(function, (2, 16, 65, 5), run.device, dtype)
    torch.compiler.reset()
    compiler = "aot_eager" if run.toy else "inductor"
    compiled = torch.compile(partial(functions.call, function), fullgraph=True, backend=compiler)
    outputs, total = compiled(x, run.backend)
    got = outputs if total is None else [*outputs, *torch.autograd.grad(total, x.wanted)]
    for ours, eager in zip(got, outputs_and_gradients(function, x, run.backend), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-2 if ours.dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def captures(run, function: str) -> str | None:
    """Captured once, replayed on other hidden states, and the same bits as without a graph."""
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"):
        return "left out: a graph needs the caching allocator"
    x = _inputs(function, (256, 64, 4096, 5), run.device, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            outputs_and_gradients(function, x, run.backend)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = outputs_and_gradients(function, x, run.backend)
    leaf = x.hidden if x.logits is None else x.logits
    with torch.no_grad():
        leaf.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    replayed = [value.clone() for value in static]
    assert all(map(torch.equal, replayed, outputs_and_gradients(function, x, run.backend))), "replay differs"
    return None


def _inputs(function: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Inputs:
    x = make_inputs(*shape, device, dtype)
    return x.at_logits() if function in FROM_LOGITS else x
