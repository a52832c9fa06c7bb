"""Solutions with the index of their first wrong step: ProcessBench (arXiv 2412.06559), or files of the same columns."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipvrm_core.trainer.data.files import read_rows

SUBSETS = ("gsm8k", "math", "olympiadbench", "omnimath")  # the published ones, in their order
SUFFIXES = (".json", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Problem:
    """label: 0-based index of the first wrong step, -1 when all steps are right."""

    subset: str
    id: str
    generator: str
    problem: str
    steps: tuple[str, ...]
    label: int
    final_answer_correct: bool | None


def load_processbench(path: str | Path, limit: int | None = None) -> list[Problem]:
    """The problems of a file, or of every data file of a folder; the file's name is the subset.

    Columns: problem, steps (texts), label; id, generator and final_answer_correct where there are any. `limit`: at
    most so many of each subset, evenly spread, correct and erroneous solutions in their proportion. ValueError for
    anything amiss, with file and row (from 0).
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(file for file in path.glob("*") if file.suffix in SUFFIXES)
    if not files:
        raise FileNotFoundError(f"no {', '.join(SUFFIXES)} file at {path}")
    order = {name: number for number, name in enumerate(SUBSETS)}
    problems = []
    for file in sorted(files, key=lambda file: order.get(file.stem, len(order))):
        found = [_problem(row, file.stem, index, f"{file}, row {index}") for index, row in enumerate(read_rows(file))]
        seen: dict[str, int] = {}
        for index, problem in enumerate(found):
            if seen.setdefault(problem.id, index) != index:
                raise ValueError(f"{file}, row {index}: id {problem.id!r} is also that of row {seen[problem.id]}")
        if not found:
            raise ValueError(f"{file} has no rows")
        problems += _some(found, limit)
    return problems


def _some(problems: list[Problem], limit: int | None) -> list[Problem]:
    """`limit` problems, evenly spread, erroneous and correct in proportion and at least one of each."""
    if limit is None or limit >= len(problems):
        return problems
    kinds = [[i for i, problem in enumerate(problems) if (problem.label < 0) == kind] for kind in (True, False)]
    correct = round(limit * len(kinds[0]) / len(problems))
    if all(kinds) and limit > 1:
        correct = min(max(correct, 1), limit - 1)
    chosen = [
        kind[n * len(kind) // count]
        for kind, count in zip(kinds, (correct, limit - correct), strict=True)
        for n in range(count)
    ]
    return [problems[i] for i in sorted(chosen)]


def _problem(row: Mapping[str, Any], subset: str, index: int, where: str) -> Problem:
    missing = [name for name in ("problem", "steps", "label") if name not in row]
    if missing:
        raise ValueError(f"{where}: no column {', '.join(missing)}; it has {sorted(row)}")
    steps, label, correct = row["steps"], row["label"], row.get("final_answer_correct")
    if not isinstance(row["problem"], str) or not row["problem"].strip():
        raise ValueError(f"{where}: problem must be a text; got {row['problem']!r}")
    if not isinstance(steps, list) or not steps:
        raise ValueError(f"{where}: steps must be a list of at least one text; got {steps!r}")
    for number, step in enumerate(steps):
        if not isinstance(step, str) or not step.strip():
            raise ValueError(f"{where}: step {number} must be a text; got {step!r}")
    if isinstance(label, bool) or not isinstance(label, int) or not -1 <= label < len(steps):
        raise ValueError(f"{where}: label must be -1 or a step, 0 .. {len(steps) - 1}; got {label!r}")
    if correct not in (None, 0, 1):
        raise ValueError(f"{where}: final_answer_correct must be true or false, 1 or 0; got {correct!r}")
    return Problem(
        subset=subset,
        id=str(row.get("id", f"{subset}-{index}")),
        generator=str(row.get("generator", "")),
        problem=row["problem"],
        steps=tuple(steps),
        label=label,
        final_answer_correct=None if correct is None else bool(correct),
    )
