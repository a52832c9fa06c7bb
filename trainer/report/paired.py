"""Policies of several runs in pairs: the same start and the same seed of the RL phase, another recipe.

Policy runs of one folder that differ in `seed` alone are repetitions of one recipe. A pair is a recipe and the one it
is compared with, from one start (a run's `seed`) with one `rl.<name>.seed`. The interval is Student's t over the
starts, each with the mean of its pairs: repetitions from one start share it and say nothing of another.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

# 97.5% quantiles of Student's t for 1 .. 30 degrees of freedom; beyond, the normal distribution's is within 0.1.
T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
Place = tuple[int, int | None]  # (the run's seed, the policy run's)
Outcomes = dict[str, dict[Place, dict[str, float]]]  # {recipe: {place: numbers of its evaluation}}


class Difference(NamedTuple):
    """Of one measure between two recipes: its mean over the starts, half the width of its 95% interval (None: one
    start), standard deviations between the starts' means and within a start (None: not to be told), pairs, starts."""

    mean: float
    half_width: float | None
    between: float | None
    within: float | None
    pairs: int
    starts: int


def outcomes(runs: Sequence[Path], results: Sequence[Mapping]) -> Outcomes:
    """The policies of the runs by recipe; a recipe has the name of its first policy run. {} without configurations."""
    found: Outcomes = {}
    for run, result in zip(runs, results, strict=True):
        if not (run / "config.json").exists():
            return {}
        config = json.loads((run / "config.json").read_text())
        names: dict[str, str] = {}
        for name, settings in config["rl"].items():
            own = json.dumps({**settings, "seed": None}, sort_keys=True)
            recipe = names.setdefault(own, name)
            if f"policy-{name}" not in result:
                continue
            place = config["seed"], settings.get("seed")
            if place in found.setdefault(recipe, {}):
                raise ValueError(f"{run}: rl.{name} has the seeds {place} of another run of {recipe}; each must differ")
            found[recipe][place] = result[f"policy-{name}"]
    return found


def difference(found: Outcomes, recipe: str, against: str, measure: str) -> Difference | None:
    """None where the two have no pair."""
    starts: dict[int, list[float]] = {}
    for place, numbers in found[recipe].items():
        other = found[against].get(place)
        if other and numbers.get(measure) is not None and other.get(measure) is not None:
            starts.setdefault(place[0], []).append(numbers[measure] - other[measure])
    if not starts:
        return None
    means, count = [mean(values) for values in starts.values()], len(starts)
    between = stdev(means) if count > 1 else None
    half_width = None if between is None else T_975[min(count - 1, 30) - 1] * between / count**0.5
    repeated = [values for values in starts.values() if len(values) > 1]
    squares = sum((len(values) - 1) * stdev(values) ** 2 for values in repeated)
    within = (squares / sum(len(values) - 1 for values in repeated)) ** 0.5 if repeated else None
    return Difference(mean(means), half_width, between, within, sum(map(len, starts.values())), count)


def table(found: Outcomes, against: str | None = None) -> str:
    """Markdown: a line a recipe with its differences to `against` (None: the first). "" where there is no pair.

    ValueError for a name that no recipe has.
    """
    if against is not None and against not in found:
        raise ValueError(f"the policy to compare with must be one of {', '.join(found) or 'none'}; got {against!r}")
    if len(found) < 2:
        return ""
    against = against or next(iter(found))
    measures = [key for key in next(iter(found[against].values())) if key.startswith(("greedy", "avg@", "all_steps"))]
    lines = []
    for recipe in found:
        rows = [difference(found, recipe, against, measure) for measure in measures]
        if recipe != against and any(rows):
            cells = ["–" if row is None else _cell(row) for row in rows]
            first = next(row for row in rows if row)
            lines.append(f"| {recipe} | {first.pairs} of {first.starts} | {' | '.join(cells)} |")
    if not lines:
        return ""
    head = f"| minus {against}, in pairs | pairs of starts | {' | '.join(measures)} |"
    note = (
        "Mean difference over the starts and its 95% interval (Student's t over the starts' means); in brackets the "
        "standard deviation between starts / of pairs within a start."
    )
    return "\n".join([head, f"| --- | --- |{' --- |' * len(measures)}", *lines, "", note])


def _cell(row: Difference) -> str:
    interval = "" if row.half_width is None else f" ± {row.half_width:.3f}"
    spreads = ["–" if spread is None else f"{spread:.3f}" for spread in (row.between, row.within)]
    return f"{row.mean:+.3f}{interval} ({' / '.join(spreads)})"
