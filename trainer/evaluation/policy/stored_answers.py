"""Stored answers to problems, from jsonl, json or parquet, and what choosing among them is worth.

Two shapes are read: one answer a row, grouped by the problem column; or one problem a row, whose answer, verdict and
score columns hold lists. A score is a number, or a list of step scores, which becomes NAME:min, NAME:last, NAME:mean
and NAME:sum.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ipvrm_core.trainer.data.files import as_text, cell, read_rows
from ipvrm_core.trainer.evaluation.policy.best_of_n import best_of, majority, pass_at, weighted_vote
from ipvrm_core.trainer.verify.exact import normalise

OF_STEPS = {"min": min, "last": lambda steps: steps[-1], "mean": np.mean, "sum": sum}


@dataclass
class Stored:
    """The answers to one problem: final answers (None: not found), verdicts, and scores by name; texts where kept.

    A score of None is one that could not be made: the answer takes part in every drawing, but no score chooses it.
    """

    answers: list[str | None] = field(default_factory=list)
    correct: list[bool] = field(default_factory=list)
    scores: dict[str, list[float | None]] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


def read_stored(
    path: str | Path,
    *,
    problem: str = "problem",
    answer: str = "answer",
    correct: str = "correct",
    scores: Sequence[str] = (),
    prompt: str | None = None,
    text: str | None = None,
) -> dict[str, Stored]:
    """{problem: its answers}. ValueError for a missing column, a verdict that is not 0 or 1, a score that is no number.

    A blank or null final answer is one that was not found. `prompt` and `text` name the columns that a reward model
    reads.
    """
    found: dict[str, Stored] = {}
    for index, row in enumerate(read_rows(path)):
        where = f"{path}, row {index}"
        stored = found.setdefault(as_text(cell(row, problem, where), f"{where}, column {problem!r}"), Stored())
        first = cell(row, correct, where)
        count = len(first) if isinstance(first, list) else None
        items = partial(_items, row, where, count)
        stored.correct += [_verdict(value, f"{where}, column {correct!r}") for value in items(correct)]
        stored.answers += [_final(value, f"{where}, column {answer!r}") for value in items(answer)]
        for name in scores:
            for value in items(name):
                for key, number in _scores(name, value, f"{where}, column {name!r}").items():
                    stored.scores.setdefault(key, []).append(number)
        if text:
            stored.texts += items(text)
            stored.prompts += [cell(row, prompt, where)] * (len(stored.texts) - len(stored.prompts))
    if not found:
        raise ValueError(f"{path} has no rows")
    return found


def _items(row: Mapping[str, Any], where: str, count: int | None, column: str) -> list:
    """The column's values for the answers of this row: `count` in a list, or one."""
    value = cell(row, column, where)
    if count is None:
        return [value]
    if not isinstance(value, list) or len(value) != count:
        raise ValueError(f"{where}, column {column!r}: expected a list of {count}, one for each verdict; got {value!r}")
    return value


def _verdict(value: Any, where: str) -> bool:
    if value not in (0, 1) or isinstance(value, str):
        raise ValueError(f"{where}: a verdict must be 0 or 1, false or true; got {value!r}")
    return bool(value)


def _final(value: Any, where: str) -> str | None:
    text = "" if value is None else normalise(as_text(value, where))
    return text or None


def _scores(name: str, value: Any, where: str) -> dict[str, float]:
    steps = value if isinstance(value, list) else [value]
    if not steps or not all(isinstance(x, int | float) and np.isfinite(x) for x in steps):
        raise ValueError(f"{where}: a score must be a number or a list of at least one; got {value!r}")
    if not isinstance(value, list):
        return {name: float(value)}
    return {f"{name}:{key}": float(function(steps)) for key, function in OF_STEPS.items()}


def evaluate(
    stored: Mapping[str, Stored], sizes: Sequence[int], *, resamples: int = 1000, seed: int = 0, samples: int = 1000
) -> dict:
    """{N: {"problems", "left_out", "answers", "unscored", <way to choose>: {"mean", "ci"}}}, means over problems with N
    answers or more.

    Ways: average (one answer drawn), pass (any right), majority, best:NAME and vote:NAME for every score, the vote
    weighted by sigma(score). Intervals: 95%, bootstrap over problems. Unscored answers count in average and pass and
    have their say in the majority; a drawing of unscored answers alone is a wrong choice of best and vote.
    """
    uneven = [name for name, item in stored.items() if any(len(v) != len(item.correct) for v in item.scores.values())]
    if uneven:
        raise ValueError(f"problem {uneven[0]!r}: scores of only some of its answers")
    names = list(next(iter(stored.values())).scores)
    result = {}
    for n in sizes:
        used = [item for item in stored.values() if len(item.correct) >= n]
        entry: dict = {
            "problems": len(used),
            "left_out": len(stored) - len(used),
            "answers": sum(len(item.correct) for item in used),
            "unscored": sum(None in row for item in used for row in zip(*item.scores.values(), strict=True)),
        }
        ways = {
            "average": lambda item, n: float(np.mean(item.correct)),
            "pass": lambda item, n: pass_at(item.correct, n),
            "majority": lambda item, n: majority(item.answers, item.correct, n),
        }
        for name in names:
            ways[f"best:{name}"] = partial(_best, name)
            ways[f"vote:{name}"] = partial(_vote, name, samples, seed)
        for way, function in ways.items() if used else ():
            values = np.array([function(item, n) for item in used])
            rng = np.random.default_rng(seed)
            means = values[rng.integers(0, len(values), (resamples, len(values)))].mean(1) if resamples else None
            ci = None if means is None else [float(x) for x in np.quantile(means, [0.025, 0.975])]
            entry[way] = {"mean": float(values.mean()), "ci": ci}
        result[str(n)] = entry
    return result


def _best(name: str, item: Stored, n: int) -> float:
    scores = item.scores[name]
    right = [correct and score is not None for correct, score in zip(item.correct, scores, strict=True)]
    return best_of([-np.inf if score is None else score for score in scores], right, n)


def _vote(name: str, samples: int, seed: int, item: Stored, n: int) -> float:
    scores = item.scores[name]
    answers = [None if score is None else answer for answer, score in zip(item.answers, scores, strict=True)]
    weights = [0.0 if score is None else 1 / (1 + np.exp(-np.clip(score, -500, 500))) for score in scores]
    return weighted_vote(answers, weights, item.correct, n, samples=samples, seed=seed)


def markdown(result: dict) -> str:
    ways = {way: None for entry in result.values() for way, cell in entry.items() if isinstance(cell, dict)}
    lines = ["| choice | " + " | ".join(f"N = {n}" for n in result) + " |", "| --- |" + " --- |" * len(result)]
    for way in ways:
        lines.append(f"| {way} | " + " | ".join(_cell(entry.get(way)) for entry in result.values()) + " |")
    lines.append("")
    for n, entry in result.items():
        lost = f"; {entry['left_out']} have fewer than {n} answers and are left out" if entry["left_out"] else ""
        if entry["unscored"]:
            lost += f"; {entry['unscored']} of {entry['answers']} answers have no score: never the best, but they vote"
        lines.append(f"N = {n}: {entry['problems']} problems{lost}")
    return "\n".join(
        [*lines, "Share of problems answered right, in %, over all subsets of N answers; brackets: 95% interval."]
    )


def _cell(found: dict | None) -> str:
    if found is None:
        return "–"
    text = f"{100 * found['mean']:.1f}"
    return text + (f" [{100 * found['ci'][0]:.1f}, {100 * found['ci'][1]:.1f}]" if found["ci"] else "")
