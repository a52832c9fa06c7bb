"""The pages of `ipvrm inspect`: views of answers, one or two side by side, as one HTML file, and an index of many."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ipvrm_core.trainer.data.processbench import Problem
from ipvrm_core.trainer.files import write_text


def write_page(path: Path, views: Sequence[dict], title: str, back: str | None = None) -> None:
    """One or two views in one file that needs nothing else. back: link to the page of all problems."""
    if not all(np.isfinite(token["delta"]) for shown in views for token in shown["tokens"]):
        raise ValueError("a token has probability 0 under one of the models: its score is infinite")
    _write(path, "inspect.html", title=title, views=list(views), back=back)


def write_index(path: Path, rows: Sequence[tuple[str, Problem, Sequence[dict]]], title: str) -> None:
    """The table of many problems: (name of the page, problem, its views)."""
    shown = [(page, problem, [_summary(view) for view in views]) for page, problem, views in rows]
    views = [{"model": view["model"], "reference": view["reference"]} for view in rows[0][2]]
    hits = [sum(found[v]["predicted"] == problem.label for _, problem, found in shown) for v in range(len(views))]
    _write(path, "inspect_index.html", title=title, rows=shown, views=views, hits=hits)


def _summary(view: dict) -> dict:
    return {
        "predicted": view["predicted"],
        "lowest": min(step["process"] for step in view["steps"]),
        "value": view["tokens"][-1]["value"],
        "mean": view["tokens"][-1]["mean"],
        "right": 1 / (1 + np.exp(-view["tokens"][-1]["mean"])) if view["kind"] == "log-ratio" else None,
    }


def _write(path: Path, template: str, **values) -> None:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, environment.get_template(template).render(**values))
