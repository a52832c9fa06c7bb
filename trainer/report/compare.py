"""Several runs of one configuration (seeds) in tables: mean and sample standard deviation of every evaluation."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from ipvrm_core.trainer.report import paired

TITLES = {"policy-": "policy", "rm-": "reward model", "online-": "reward model after online updates"}


class Measure(NamedTuple):
    """One of the numbers that reward models are compared by in short; `levels` are others of its kind, for scale."""

    key: str
    title: str
    levels: dict[str, str]


def compare(runs: Sequence[Path], against: str | None = None) -> str:
    """Markdown: policies in pairs and reward models in short, then all numbers of every model.

    against: the policy run that the others are paired with; None: the first. All runs must hold the same models.
    """
    results = read_results(runs)
    parts = [pairs] if (pairs := paired.table(paired.outcomes(runs, results), against)) else []
    parts += [_short(results)] if reward_models(results) else []
    for kind, title in TITLES.items():
        rows = {name.removeprefix(kind): _of(results, name) for name in results[0] if name.startswith(kind)}
        if rows:
            parts.append(_full(title, rows))
    return "\n\n".join(parts)


def read_results(runs: Sequence[Path]) -> list[dict]:
    """eval/results.json of every run. ValueError unless all evaluated the same models."""
    results = [_read(run) for run in runs]
    names = list(results[0])
    for run, result in zip(runs, results, strict=True):
        if list(result) != names:
            raise ValueError(f"{run} evaluated {', '.join(result)}; {runs[0]} evaluated {', '.join(names)}")
    return results


def reward_models(results: Sequence[dict]) -> dict[str, list[dict[str, float]]]:
    """{name: its numbers in every run}; those updated online are called "<policy run>, online"."""
    offline = {name.removeprefix("rm-"): _of(results, name) for name in results[0] if name.startswith("rm-")}
    online = [name for name in results[0] if name.startswith("online-")]
    return offline | {f"{name.removeprefix('online-')}, online": _of(results, name) for name in online}


def short_measures(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Measure]:
    """Those of the rows' numbers that reward models are compared by in short."""
    keys = _keys(rows)
    found = [
        Measure(f"localisation {style}/process f1_oracle", f"step F1, {title}", {})
        for style, title in (("train", "made errors"), ("sampled", "own errors"), ("terse", "another format"))
    ]
    levels = {"candidate_credit chance": "chance", "candidate_credit policy": "policy's argmax"}
    found.append(Measure("candidate_credit reward_model", "candidate credit", levels))
    sizes = list(dict.fromkeys(key.split()[1] for key in keys if key.startswith("best_of_n")))
    for n in sizes:
        levels = {f"best_of_n {n} average": "one at random", f"best_of_n {n} majority": "majority"}
        found.append(Measure(f"best_of_n {n} best:vbar", f"best of {n}", levels))
    found += [Measure(f"best_of_n {n} vote:vbar", f"weighted vote of {n}", levels) for n in sizes[-1:]]
    return [measure for measure in found if measure.key in keys]


def _read(run: Path) -> dict:
    path = run / "eval" / "results.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: run `ipvrm eval` for {run} first")
    return json.loads(path.read_text())


def _of(results: Sequence[dict], name: str) -> list[dict[str, float]]:
    return [_flat(result[name]) for result in results]


def _flat(result: dict, prefix: str = "") -> dict[str, float]:
    """Without lists, which have a number for each prompt."""
    flat: dict[str, float] = {}
    for key, value in result.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key} ")
        elif not isinstance(value, list):
            flat[f"{prefix}{key}"] = value
    return flat


def _keys(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """All measures of any model, in order of appearance: a value head has no candidate credit, others have."""
    return list(dict.fromkeys(key for runs in rows.values() for run in runs for key in run))


def _short(results: Sequence[dict]) -> str:
    """One line a model."""
    rows = reward_models(results)
    measures = short_measures(rows)
    lines = [f"| reward model | {' | '.join(m.title for m in measures)} |", f"| --- |{' --- |' * len(measures)}"]
    lines += [f"| {name} | {' | '.join(_cell(runs, m.key) for m in measures)} |" for name, runs in rows.items()]
    return "\n".join(lines)


def _full(title: str, rows: dict[str, list[dict[str, float]]]) -> str:
    """Measures are lines and models are columns: there are many measures and few models."""
    lines = [f"| {title} | {' | '.join(rows)} |", f"| --- |{' --- |' * len(rows)}"]
    lines += [f"| {key} | {' | '.join(_cell(runs, key) for runs in rows.values())} |" for key in _keys(rows)]
    return "\n".join(lines)


def _cell(runs: Sequence[dict[str, float]], key: str) -> str:
    values = [run[key] for run in runs if run.get(key) is not None]
    if not values:
        return "–"
    digits = 3 if max(abs(value) for value in values) < 10 else 0
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"
