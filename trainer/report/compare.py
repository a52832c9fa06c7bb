"""Several runs of one configuration (seeds) in one table: mean and sample standard deviation of every evaluation."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev


def compare(runs: Sequence[Path]) -> str:
    """Markdown: one table of policies, one of reward models. All runs must hold the same models."""
    results = [_results(run) for run in runs]
    names = list(results[0])
    for run, result in zip(runs, results, strict=True):
        if list(result) != names:
            raise ValueError(f"{run} evaluated {', '.join(result)}; {runs[0]} evaluated {', '.join(names)}")
    parts = []
    for kind in ("policy-", "rm-"):
        rows = {
            name.removeprefix(kind): [_flat(result[name]) for result in results]
            for name in names
            if name.startswith(kind)
        }
        if rows:
            parts.append(_table("policy" if kind == "policy-" else "reward model", rows))
    return "\n\n".join(parts)


def _results(run: Path) -> dict:
    path = run / "eval" / "results.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: run `ipvrm eval` for {run} first")
    return json.loads(path.read_text())


def _flat(result: dict, prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in result.items():
        flat |= _flat(value, f"{prefix}{key} ") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _table(title: str, rows: dict[str, list[dict[str, float]]]) -> str:
    """Measures are lines and models are columns: there are many measures and few models."""
    measures = list(next(iter(rows.values()))[0])
    lines = [f"| {title} | {' | '.join(rows)} |", f"| --- |{' --- |' * len(rows)}"]
    for measure in measures:
        cells = [_cell([run[measure] for run in runs if measure in run]) for runs in rows.values()]
        lines.append(f"| {measure} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    digits = 3 if max(abs(value) for value in values) < 10 else 0
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"
