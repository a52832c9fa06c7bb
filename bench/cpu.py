"""`python -m ipvrm_core.bench.cpu --json out.json`: the chunked functions against naive PyTorch, forward and backward.

Prints a Markdown table. With --sweep also the time and memory of distrl_loss (trained head) over `max_buffer_bytes`.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from ipvrm_core.bench.cases import IMPLEMENTATIONS, Case, Shape, check_agreement, make_inputs, step
from ipvrm_core.bench.machine import environment
from ipvrm_core.bench.measure import interleaved, peak_extra_bytes
from ipvrm_core.fused.head import default_buffer_bytes

SWEEP_MIB = (16, 32, 64, 128, 256, 512)


def prepare(case: Case, implementation: str, options: dict) -> Callable[[], object]:
    """For the memory process: one small run loads every library first, so that only the step itself is counted."""
    step(case, make_inputs(Shape(8, 16, 512)), implementation, **options)()
    return step(case, make_inputs(case.shape), implementation, **options)


def measure_case(case: Case, rounds: int) -> dict:
    """Time and peak extra memory of every implementation, after they were seen to agree."""
    inputs = make_inputs(case.shape)
    check_agreement(case, inputs)
    print(f"{case.name}: naive and chunked agree, measuring", file=sys.stderr, flush=True)
    load = os.getloadavg()[0]
    # The agreement was the warm-up.
    times = interleaved({name: step(case, inputs, name) for name in IMPLEMENTATIONS}, rounds, warm_ups=0)
    rows = {
        name: {"seconds": times[name]._asdict(), "peak_extra_bytes": peak_extra_bytes(prepare, case, name, {})}
        for name in IMPLEMENTATIONS
    }
    return {"case": case.name, "load_before": load, **rows}


def measure_sweep(shape: Shape, rounds: int) -> list[dict]:
    """distrl_loss, trained head, over the buffer budget."""
    case, inputs = Case("distrl_loss", False, shape), make_inputs(shape)
    options = {mib: {"max_buffer_bytes": mib << 20} for mib in SWEEP_MIB}
    times = interleaved({str(mib): step(case, inputs, "chunked", **options[mib]) for mib in SWEEP_MIB}, rounds)
    return [
        {
            "max_buffer_mib": mib,
            "seconds": times[str(mib)]._asdict(),
            "peak_extra_bytes": peak_extra_bytes(prepare, case, "chunked", options[mib]),
        }
        for mib in SWEEP_MIB
    ]


def markdown(report: dict) -> str:
    """One line a case: times, memory, and the ratios chunked / naive. CPU s is processor time over all threads."""
    lines = [
        "| case | naive s (p10-p90) | chunked s (p10-p90) | ratio | CPU s ratio | naive MiB | chunked MiB | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in report["cases"]:
        naive, ours = result["naive"], result["chunked"]
        times = [spread(row["seconds"]) for row in (naive, ours)]
        ratios = [f"{ours['seconds'][key] / naive['seconds'][key]:.2f}" for key in ("median", "cpu_median")]
        memory = [f"{row['peak_extra_bytes'] / 2**20:.0f}" for row in (naive, ours)]
        memory.append(f"{ours['peak_extra_bytes'] / naive['peak_extra_bytes']:.1%}")
        lines.append(" | ".join([f"| {result['case']}", *times, *ratios, *memory]) + " |")
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
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sweep", action="store_true", help="also sweep max_buffer_bytes")
    for letter, size in asdict(Shape()).items():
        parser.add_argument(f"--{letter}", type=int, default=size)
    args = parser.parse_args()
    shape = Shape(args.N, args.D, args.V)
    cases = [
        Case(function, frozen, shape) for function in ("distrl_loss", "linear_logprobs") for frozen in (True, False)
    ]
    report = {
        "environment": environment(),
        "shape": asdict(shape),
        "dtype": "float32",
        "default_buffer_bytes": default_buffer_bytes(torch.device("cpu")),
        "cases": [measure_case(case, args.rounds) for case in cases],
        "sweep": measure_sweep(shape, args.rounds) if args.sweep else [],
    }
    print(markdown(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
