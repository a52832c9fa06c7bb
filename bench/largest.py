"""How many rows fit: peak extra bytes grow linearly in N, so a line through measured runs says, and one run confirms.

Shape letters: N rows, D hidden size, V vocabulary, K candidate slots.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from ipvrm_core.bench.cases import HEADS, TOY_HEADS, Setting
from ipvrm_core.bench.compare import Run, ours
from ipvrm_core.bench.problems import Problem, make_problem
from ipvrm_core.bench.truth import step

LIMIT = 16_000_000_000  # extra bytes
DOUBLINGS = 4


def section(run: Run) -> Iterator[dict]:
    """A row a head: the measured points, the N they predict for LIMIT bytes, and what a run at that N took."""
    for model in ("Qwen3-0.6B", "Qwen3-8B"):
        if run.late():
            yield {"case": model, "skipped": "no time left"}
            continue
        shape = (TOY_HEADS if run.toy else HEADS)[model]
        problem = make_problem(Setting(model, shape), run.device, run.dtype)
        _peak(run, problem)  # compiles, and lets cuBLAS take its workspace
        points = [
            (shape.N << i, _peak(run, repeated(problem, shape.N << i))) for i in range(2 if run.toy else DOUBLINGS)
        ]
        row = {"case": f"{model}, frozen head, distrl", "model": model, "limit_bytes": LIMIT, "points": points}
        if points[0][1] is None:
            yield row | {"skipped": "memory is measured on a GPU only"}
            continue
        N = largest_rows(points, LIMIT) // 1024 * 1024
        yield row | {"predicted_rows": N} | _run_at(run, problem, N)


def _run_at(run: Run, problem: Problem, N: int) -> dict:
    """Inputs of N rows are made first; where they do not fit beside the extra memory, the run is left out."""
    free = torch.cuda.mem_get_info(run.device)[0]
    inputs = N * _input_bytes(problem)
    if inputs + 1.1 * LIMIT > free:
        return {"skipped": f"the inputs of {N} rows take {inputs / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free"}
    large = repeated(problem, N)
    peak = _peak(run, large)
    milliseconds = run.meter.cold_and_hot(lambda: _once(run, large))
    return {"rows": N, "peak_extra_bytes": peak, "fits": peak <= LIMIT, "hot_ms": {"median": milliseconds[1]}}


def largest_rows(points: list[tuple[int, int]], limit: int) -> int:
    """N where the line through the last two points reaches the limit: below them fixed buffers may still be growing."""
    (n0, b0), (n1, b1) = points[-2:]
    slope = (b1 - b0) / (n1 - n0)
    return int(n1 + (limit - b1) / slope)


def repeated(problem: Problem, N: int) -> Problem:
    """The rows over and over: N of them. Every row keeps its weight, so the loss grows with N."""
    index_N = torch.arange(N, device=problem.hidden_ND.device) % len(problem.hidden_ND)
    hidden_ND = problem.hidden_ND.detach()[index_N].requires_grad_()
    return replace(problem, hidden_ND=hidden_ND, batch=problem.batch.rows(index_N))


def _input_bytes(problem: Problem) -> int:
    """Of one row: hidden state, slots (an id at 8 bytes, two numbers at 4), two weights, and its index."""
    slots = problem.batch.ids_NS.shape[1]
    return problem.hidden_ND.shape[1] * problem.hidden_ND.element_size() + slots * (8 + 2 * 4) + 2 * 4 + 8


def _once(run: Run, problem: Problem) -> object:
    return step(ours(run, "distrl").loss(problem), problem)


def _peak(run: Run, problem: Problem) -> int | None:
    run.meter.release()
    peak = run.meter.peak_extra_bytes(lambda: _once(run, problem))
    if peak is None:
        _once(run, problem)
    return peak
