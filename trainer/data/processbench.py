"""Solutions with the index of their first wrong step: ProcessBench (arXiv 2412.06559), or any files that say the same.

docs/evaluate-your-own-steps.md has the format, and the conversion of other data.
"""

import logging
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ipvrm_core.trainer.data.files import SUFFIXES, cell, data_stem, data_suffix, read_rows

_log = logging.getLogger(__name__)

SUBSETS = ("gsm8k", "math", "olympiadbench", "omnimath")  # the published ones, in their order
REQUIRED = ("problem", "steps", "label")
ROLES = (*REQUIRED, "id", "generator", "final_answer_correct")


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


@dataclass(frozen=True)
class Layout:
    """How the files say it.

    columns: {role: column} where the two differ; dots reach into nested columns. first_step: the number of the first
    step in labels, 0 or 1; "all right" is -1, and with 1 also 0. bad_rows: refuse the data with a list of all of them,
    or go on without them.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    first_step: int = 0
    bad_rows: Literal["refuse", "skip"] = "refuse"

    def __post_init__(self) -> None:
        unknown = sorted(set(self.columns) - set(ROLES))
        if unknown:
            raise ValueError(f"columns are of {', '.join(ROLES)}; got {', '.join(unknown)}")
        if self.first_step not in (0, 1):
            raise ValueError(f"labels count the steps from 0 or 1; got {self.first_step}")


class Subset(NamedTuple):
    """What one file holds; skipped: why its other rows were left out, by their numbers (from 0)."""

    name: str
    file: Path
    problems: list[Problem]
    skipped: dict[int, str]


def load_processbench(path: str | Path, limit: int | None = None, layout: Layout = Layout()) -> list[Problem]:
    """The problems of a file, or of every data file of a folder, as `read_subsets` has them."""
    return [problem for subset in read_subsets(path, limit, layout) for problem in subset.problems]


def read_subsets(path: str | Path, limit: int | None = None, layout: Layout = Layout()) -> list[Subset]:
    """A subset a file, named by it: the published ones first and in their order, then by name.

    `limit`: at most so many of each, evenly spread, correct and erroneous solutions in their proportion. ValueError
    with all rows that cannot be used (they may be skipped), and for two files of one name.
    """
    subsets, seen = [], {}
    for file in _files(Path(path)):
        subset = _subset(file, layout, seen)
        seen |= {_content(problem): file for problem in subset.problems}
        subsets.append(subset)
    bad = sum(len(subset.skipped) for subset in subsets)
    if bad and layout.bad_rows == "refuse":
        raise ValueError(
            f"{bad} row{'s' if bad > 1 else ''} cannot be used; repair or leave out (--bad-rows skip):\n"
            + "\n".join(f"  {line}" for subset in subsets for line in skipped_lines(subset))
        )
    for subset in subsets:
        if not subset.problems:
            raise ValueError(f"{subset.file} has no rows" + (" that can be used" if subset.skipped else ""))
    return [subset._replace(problems=_some(subset.problems, limit)) for subset in subsets]


def skipped_lines(subset: Subset) -> list[str]:
    """FILE, row 3: why - one line for every reason."""
    rows: dict[str, list[int]] = {}
    for row, why in subset.skipped.items():
        rows.setdefault(why, []).append(row)
    return [f"{subset.file}, row{'s' if len(same) > 1 else ''} {_ranges(same)}: {why}" for why, same in rows.items()]


def _ranges(numbers: Sequence[int]) -> str:
    """1, 3-5 for 1, 3, 4, 5 (ascending)."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        if not data_suffix(path):
            raise ValueError(f"{path} must be a {', '.join(SUFFIXES)} file, the first two also as .gz")
        return [path]
    found = [file for file in sorted(path.glob("*")) if data_suffix(file) and file.is_file() and file.name[0] != "."]
    below = sorted({file.parent for file in path.glob("*/*") if data_suffix(file) and file.parent.name[0] != "."})
    if not found:
        deeper = f"; there are some in {', '.join(map(str, below))}" if below else ""
        raise FileNotFoundError(f"no {', '.join(SUFFIXES)} file at {path}{deeper}")
    if below:
        _log.warning("%s: data in subfolders are not read: %s", path, ", ".join(folder.name for folder in below))
    names: dict[str, Path] = {}
    for file in found:
        if names.setdefault(data_stem(file), file) != file:
            other = names[data_stem(file)]
            raise ValueError(f"{other} and {file} would both be the subset {data_stem(file)!r}: rename or remove one")
    order = {name: number for number, name in enumerate(SUBSETS)}
    return sorted(found, key=lambda file: order.get(data_stem(file), len(order)))


def _subset(file: Path, layout: Layout, seen: Mapping[tuple, Path]) -> Subset:
    name = data_stem(file)
    problems, skipped = [], {}
    ids: dict[str, int] = {}
    for index, row in enumerate(read_rows(file)):
        try:
            problem = _problem(row, name, index, layout)
            if _content(problem) in seen:
                raise ValueError(f"problem and steps are also in {seen[_content(problem)]}")
            if ids.setdefault(problem.id, index) != index:
                raise ValueError(f"id {problem.id!r} is also that of row {ids[problem.id]}")
        except ValueError as error:
            skipped[index] = str(error)
        else:
            problems.append(problem)
    return Subset(name, file, problems, skipped)


def _content(problem: Problem) -> tuple:
    return problem.problem, problem.steps


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


def _problem(row: Mapping[str, Any], subset: str, index: int, layout: Layout) -> Problem:
    missing = [role for role in REQUIRED if role not in layout.columns and role not in row]
    if missing:
        raise ValueError(f"no column {', '.join(missing)}; it has {sorted(row)} (--columns names others)")
    cells = {role: row.get(role) for role in ROLES} | {
        role: cell(row, column, f"column of {role}") for role, column in layout.columns.items()
    }
    problem, steps, correct = (cells[role] for role in ("problem", "steps", "final_answer_correct"))
    if not isinstance(problem, str) or not problem.strip():
        raise ValueError(f"problem must be a text; got {_short(problem)}")
    if not isinstance(steps, list) or not steps:
        raise ValueError(f"steps must be a list of at least one text; got {_short(steps)}")
    for number, step in enumerate(steps):
        if not isinstance(step, str) or not step.strip():
            raise ValueError(f"step {number} must be a text; got {_short(step)}")
    if correct not in (None, 0, 1):
        raise ValueError(f"final_answer_correct must be true or false, 1 or 0; got {_short(correct)}")
    return Problem(
        subset=subset,
        id=_name(cells["id"], "id") or f"{subset}-{index}",
        generator=_name(cells["generator"], "generator"),
        problem=problem,
        steps=tuple(steps),
        label=_label(cells["label"], len(steps), layout.first_step),
        final_answer_correct=None if correct is None else bool(correct),
    )


def _label(label: object, steps: int, first: int) -> int:
    """0-based. A column of integers that once held nulls comes as floats."""
    number = int(label) if isinstance(label, float) and label.is_integer() else label
    if isinstance(number, int) and not isinstance(number, bool):
        if number == -1:
            return -1
        if 0 <= number < steps + first:
            return number - first
    right = "-1 or 0 (all right)" if first else "-1 (all right)"
    raise ValueError(f"label must be {right} or a step, {first} .. {steps - 1 + first}; got {_short(label)}")


def _name(value: object, role: str) -> str:
    """ "" where there is none."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"{role} must be a text or an integer; got {_short(value)}")
    return str(value)


def _short(value: object) -> str:
    return reprlib.repr(value)


def parse_columns(pairs: Iterable[str]) -> dict[str, str]:
    """{role: column} of "role=column" words."""
    split = [pair.partition("=") for pair in pairs]
    bad = [pair for pair, (role, _, column) in zip(pairs, split, strict=True) if not role or not column]
    if bad:
        raise ValueError(f"--columns takes role=column; got {', '.join(map(repr, bad))}")
    return {role: column for role, _, column in split}
