"""Reward models of several runs in one picture: a column a measure, a row a model, a dot a run, a bar their mean."""

import os
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from matplotlib import rc_context
from matplotlib.figure import Figure

from ipvrm_core.trainer.report.compare import read_results, reward_models, short_measures
from ipvrm_core.trainer.report.plots import COLOURS, STYLE


def draw(runs: Sequence[Path], path: Path) -> None:
    """Write `path` (.png, .svg or .pdf). ValueError where the runs hold no reward models."""
    rows = reward_models(read_results(runs))
    measures = short_measures(rows)
    if not measures:
        raise ValueError("there is nothing to draw: the runs evaluated no reward models")
    with rc_context(STYLE):
        figure = Figure(figsize=(1.6 + 1.6 * len(measures), 1.0 + 0.22 * len(rows)), layout="constrained")
        columns = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
        for axes, measure in zip(columns, measures, strict=True):
            _column(axes, measure, rows)
        columns[0].set_yticks(range(len(rows)), list(rows))
        columns[0].invert_yaxis()
        temporary = path.with_name(f".{path.name}.tmp")
        figure.savefig(temporary, format=path.suffix.removeprefix(".") or "png", dpi=160)
        os.replace(temporary, path)


def _column(axes, measure, rows) -> None:
    axes.set_title(measure.title, fontsize=8)
    for key, style in zip(measure.levels, ("dotted", "dashed"), strict=False):
        values = [run[key] for runs in rows.values() for run in runs if key in run]
        axes.axvline(mean(values), color="#8a8f98", linewidth=1, linestyle=style, label=measure.levels[key])
    for row, runs in enumerate(rows.values()):
        values = [run[measure.key] for run in runs if run.get(measure.key) is not None]
        axes.plot(values, [row] * len(values), "o", color=COLOURS[0], markersize=3, alpha=0.5, markeredgewidth=0)
        if values:
            axes.plot([mean(values)], [row], "|", color=COLOURS[1], markersize=9, markeredgewidth=2)
    if measure.levels:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False, fontsize=7, borderaxespad=0)
