"""`python -m ipvrm_core.bench.cpu --json out.json`: the chunked functions against naive PyTorch, forward and backward.

Prints a Markdown table. The products alone are those of the fused head in its chunks, without any work on the rows.
With --sweep also the time and memory of distrl_loss (trained head) over `max_buffer_bytes`.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import ipvrm_core
from ipvrm_core.bench import naive
from ipvrm_core.bench.cases import Setting, Shape
from ipvrm_core.bench.machine import environment
from ipvrm_core.bench.measure import interleaved, peak_extra_bytes
from ipvrm_core.bench.problems import Problem, make_problem
from ipvrm_core.fused.head import Head, HeadGradients, RowGradient, default_buffer_bytes

SWEEP_MIB = (16, 32, 64, 128, 256, 512)
FUNCTIONS = ("distrl_loss", "linear_logprobs", "row_loss")  # the last two make the same loss
IMPLEMENTATIONS = ("naive", "chunked")


@dataclass(frozen=True)
class Case:
    """`function` is one of FUNCTIONS; a frozen head needs no gradient of the weight."""

    function: str
    frozen: bool
    shape: Shape

    @property
    def name(self) -> str:
        return f"{self.function}, {'frozen' if self.frozen else 'trained'} head"

    def problem(self) -> Problem:
        """float32 rows with the candidate statistics of a language model."""
        return make_problem(Setting("random", self.shape, self.frozen), torch.device("cpu"), torch.float32)


def cases(shape: Shape) -> list[Case]:
    return [Case(function, frozen, shape) for function in FUNCTIONS for frozen in (True, False)]


def step(case: Case, problem: Problem, implementation: str, **options) -> Callable[[], list[Tensor]]:
    """A callable that runs forward and backward once and returns the gradients. `options` go to chunked."""
    module, head, batch = ipvrm_core, (problem.hidden_ND, problem.weight_VD), problem.batch
    if implementation == "naive":
        module, options = naive, {}
    else:
        options = {"backend": implementation, **options}

    def run() -> list[Tensor]:
        if case.function == "distrl_loss":
            loss = module.distrl_loss(*head, batch, **options)[0]
        elif case.function == "row_loss" and module is ipvrm_core:
            count = batch.ids_NS.numel()
            loss = module.row_loss(*head, batch.ids_NS, lambda x, rows: x.logprobs_NK.sum() / count, **options)
        else:
            loss = module.linear_logprobs(*head, batch.ids_NS, **options)[0].mean()
        return list(torch.autograd.grad(loss, problem.wanted))

    return run


def products(case: Case, problem: Problem) -> Callable[[], object]:
    """x, dh and, with a trained head, dW: what a step cannot do without."""
    budget = default_buffer_bytes(torch.device("cpu"), not case.frozen)

    @torch.no_grad()
    def run() -> HeadGradients:
        head = Head(problem.hidden_ND, problem.weight_VD, None, budget)
        gradients = HeadGradients(head, [True, not case.frozen, False])
        for rows, x_nV in head.chunks():
            gradients.add(rows, RowGradient(x_nV))
        return gradients

    return run


def check_agreement(case: Case, problem: Problem) -> None:
    """No number without this: both implementations give the same gradients, to 1e-4 of the largest entry."""
    for ours, theirs in zip(*(step(case, problem, name)() for name in ("chunked", "naive")), strict=True):
        error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        if not error < 1e-4:
            raise AssertionError(f"{case.name}: gradients of chunked and naive differ by {error:.1e} of the largest")


def prepare(case: Case, implementation: str, options: dict) -> Callable[[], object]:
    """For the memory process: one small run loads every library first, so that only the step itself is counted."""
    small = Case(case.function, case.frozen, Shape(8, 16, 512))
    step(small, small.problem(), implementation, **options)()
    return step(case, case.problem(), implementation, **options)


def measure_case(case: Case, rounds: int) -> dict:
    """Time and peak extra memory of every implementation, after they were seen to agree."""
    problem = case.problem()
    check_agreement(case, problem)
    print(f"{case.name}: naive and chunked agree, measuring", file=sys.stderr, flush=True)
    load = os.getloadavg()[0]
    # The agreement was the warm-up.
    steps = {name: step(case, problem, name) for name in IMPLEMENTATIONS}
    times = interleaved({**steps, "products": products(case, problem)}, rounds, warm_ups=0)
    rows = {
        name: {"seconds": times[name]._asdict(), "peak_extra_bytes": peak_extra_bytes(prepare, case, name, {})}
        for name in IMPLEMENTATIONS
    }
    rows["products"] = {"seconds": times["products"]._asdict()}
    return {"case": case.name, "load_before": load, "statistics": problem.statistics, **rows}


def measure_sweep(shape: Shape, rounds: int) -> list[dict]:
    """distrl_loss, trained head, over the buffer budget."""
    case = Case("distrl_loss", False, shape)
    options = {mib: {"max_buffer_bytes": mib << 20} for mib in SWEEP_MIB}
    budgeted = partial(step, case, case.problem(), "chunked")
    times = interleaved({str(mib): budgeted(**options[mib]) for mib in SWEEP_MIB}, rounds)
    return [
        {
            "max_buffer_mib": mib,
            "seconds": times[str(mib)]._asdict(),
            "peak_extra_bytes": peak_extra_bytes(prepare, case, "chunked", options[mib]),
        }
        for mib in SWEEP_MIB
    ]


def markdown(report: dict) -> str:
    """One line a case: times, memory, and their ratios to naive. CPU s is processor time over all threads."""
    lines = [
        "| case | naive s (p10-p90) | chunked s (p10-p90) | ratio | CPU s ratio "
        "| products alone, s (p10-p90) | ratio | CPU s ratio | naive MiB | chunked MiB | ratio |",
        "| --- " * 11 + "|",
    ]
    for result in report["cases"]:
        naive, ours, least = result["naive"], result["chunked"], result["products"]
        times = [spread(naive["seconds"])]
        for row in (ours, least):
            ratios = [f"{row['seconds'][key] / naive['seconds'][key]:.2f}" for key in ("median", "cpu_median")]
            times += [spread(row["seconds"]), *ratios]
        memory = [f"{row['peak_extra_bytes'] / 2**20:.0f}" for row in (naive, ours)]
        memory.append(f"{ours['peak_extra_bytes'] / naive['peak_extra_bytes']:.1%}")
        lines.append(" | ".join([f"| {result['case']}", *times, *memory]) + " |")
    if report["sweep"]:
        lines += ["", "| max_buffer_bytes, MiB | s (p10-p90) | CPU s | peak extra MiB |", "| --- | --- | --- | --- |"]
    for row in report["sweep"]:
        cells = [
            spread(row["seconds"]),
            f"{row['seconds']['cpu_median']:.2f}",
            f"{row['peak_extra_bytes'] / 2**20:.0f}",
        ]
        lines.append(" | ".join([f"| {row['max_buffer_mib']}", *cells]) + " |")
    return "\n".join(lines)


def spread(seconds: dict) -> str:
    return f"{seconds['median']:.2f} ({seconds['p10']:.2f}-{seconds['p90']:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the report here, after every case")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", default="", help="only the cases that have this in their names")
    parser.add_argument("--sweep", action="store_true", help="also sweep max_buffer_bytes")
    for letter, size in asdict(Shape()).items():
        parser.add_argument(f"--{letter}", type=int, default=size)
    args = parser.parse_args()
    shape = Shape(args.N, args.D, args.V)
    report = {
        "environment": environment(),
        "shape": asdict(shape),
        "dtype": "float32",
        "default_buffer_bytes": {
            name: default_buffer_bytes(torch.device("cpu"), trained)
            for name, trained in (("frozen", False), ("trained", True))
        },
        "cases": [],
        "sweep": [],
    }

    def write() -> None:
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")

    for case in cases(shape):
        if args.case in case.name:
            report["cases"].append(measure_case(case, args.rounds))
            write()
    if args.sweep:
        report["sweep"] = measure_sweep(shape, args.rounds)
        write()
    print(markdown(report))


if __name__ == "__main__":
    main()
