"""`python -m ipvrm_core.bench.resources`: registers, spills and shared memory of every shipped launch, without a GPU.

Prints a Markdown table of all targets; exits with an error when a kernel spills or is over its budget on sm_90.
"""

import argparse
import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import NamedTuple

import triton

from ipvrm_core.bench.launches import BUDGETS, LAUNCHES, Budget, Shipped
from ipvrm_core.bench.offline import TARGETS, Compiled, compiling_for


class Row(NamedTuple):
    """One kernel of one launch, on every target that was asked for."""

    case: str
    on: dict[str, Compiled]

    @property
    def name(self) -> str:
        return next(iter(self.on.values())).kernel


def compile_all(launches: list[Shipped], targets: tuple[str, ...] = tuple(TARGETS)) -> list[Row]:
    """A row for every kernel that a launch starts."""
    rows = []
    for case, launch in launches:
        started = []
        for target in targets:
            with compiling_for(target) as kernels:
                launch(target)
            if not kernels:
                raise RuntimeError(f"{case} started no kernel on {target}")
            started.append(kernels)
        rows += [Row(case, dict(zip(targets, same, strict=True))) for same in zip(*started, strict=True)]
    return rows


def programs_per_sm(registers: int, num_warps: int, shared: int) -> int:
    """Programs resident on one SM of sm_90. Limits: the CUDA programming guide, compute capability 9.0.

    65,536 registers, given to a warp in units of 256; 64 warps; 32 programs; 228 KiB shared, of which a program
    takes 1 KiB more than it asks for.
    """
    of_a_warp = -(-registers * 32 // 256) * 256
    return min(65536 // (of_a_warp * num_warps), 64 // num_warps, 32, 228 * 1024 // (shared + 1024))


def over_budget(rows: list[Row], budgets: dict[str, Budget]) -> list[str]:
    """A line for every quantity of a kernel on sm_90 beyond its budget; KeyError where none is stated."""
    found = []
    for row in rows:
        limits = {**budgets[row.name]._asdict(), "spilled": 0}
        for quantity, limit in limits.items() if "sm_90" in row.on else ():
            if (got := getattr(row.on["sm_90"], quantity)) > limit:
                found.append(f"{row.case}: {row.name} has {quantity} {got}, budget {limit}")
    return found


def markdown(rows: list[Row], budgets: dict[str, Budget]) -> str:
    """A line for every row, a column for every target."""
    targets = list(rows[0].on)
    lines = [
        f"| kernel | launch | {' | '.join(targets)} | programs | loops, sm_90 | budget, sm_90 |",
        f"| --- | --- | {'--- | ' * len(targets)}---: | --- | --- |",
    ]
    for row in rows:
        cells = [f"`{row.name}`", row.case, *(_cell(row.on[target]) for target in targets)]
        hopper = row.on.get("sm_90")
        cells.append(str(programs_per_sm(hopper.registers, hopper.num_warps, hopper.shared)) if hopper else "")
        cells.append("; ".join(map(str, hopper.loops)) if hopper else "")
        cells.append("{}, {} B".format(*budgets[row.name]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(kernel: Compiled) -> str:
    spilled = f", **{kernel.spilled} B spilled**" if kernel.spilled else ""
    return f"{kernel.constants['BLOCK']} / {kernel.num_warps}: {kernel.registers}, {kernel.shared} B{spilled}"


def _numbers(kernel: Compiled) -> dict[str, object]:
    plain = {name: value for name, value in kernel._asdict().items() if name != "assembly"}
    return plain | {"loops": [loop._asdict() for loop in kernel.loops]}


LEGEND = """Cells: elements of a block / warps of a program: registers of a thread (AMD: vector ones), shared bytes
of a program, and what a thread spills, if it does. `+ options`: soft cap, a temperature for each row, and whatever else
the kernel can do. V 50257 is odd, so its rows are not aligned. Programs: resident on one SM of sm_90. Loops: those of
the machine code that move blocks of a row, in its order: instructions a logit, bytes loaded + stored a logit, barriers
an iteration; a row runs through one or two of them."""


def heading() -> str:
    """When, from which commit, and by which compiler."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    git = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    commit = git.stdout.strip() if git.returncode == 0 else "no commit"
    return f"Compiled on {date.today()} from {commit} by triton {triton.__version__}, without a GPU."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    rows = compile_all(LAUNCHES)
    text = f"{heading()}\n\n{LEGEND}\n\n{markdown(rows, BUDGETS)}\n"
    print(text)
    if args.markdown:
        args.markdown.write_text(text)
    if args.json:
        plain = [{"launch": row.case, **{target: _numbers(on) for target, on in row.on.items()}} for row in rows]
        args.json.write_text(json.dumps({"heading": heading(), "rows": plain}, indent=1, default=str) + "\n")
    sys.exit("\n".join(over_budget(rows, BUDGETS)) or None)


if __name__ == "__main__":
    main()
