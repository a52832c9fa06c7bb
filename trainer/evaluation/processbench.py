"""ProcessBench scores of a reward model: made once, kept as parquet, evaluated as often as wanted without the model.

One file a subset. Per problem: subset, id, generator, label, final_answer_correct; status (ok, truncated, too_long);
answer_tokens; sums and tokens, per step the sum of q over its own tokens (nats) and their number; with the official
mode also official_rewards and official_lengths. A step behind a truncation has the sum null.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.data.processbench import SUBSETS, Problem
from ipvrm_core.trainer.evaluation import official
from ipvrm_core.trainer.evaluation.log_ratios import Pair, log_ratios
from ipvrm_core.trainer.evaluation.rendering import Format, Rendered, render
from ipvrm_core.trainer.evaluation.step_scores import step_sums

TooLong = Literal["refuse", "skip", "truncate"]
COLUMNS = ("subset", "id", "generator", "label", "status", "sums", "tokens")


def score(
    pair: Pair,
    problems: Sequence[Problem],
    form: Format,
    *,
    max_tokens: int,
    max_length: int | None = None,
    too_long: TooLong = "refuse",
    with_official: bool = False,
) -> list[dict]:
    """One row per problem, in order. A text of more than `max_length` tokens is refused, skipped or truncated."""
    rendered = [
        render(pair.tokenizer, problem.problem, problem.steps, form, f"{problem.subset} {problem.id}")
        for problem in problems
    ]
    status = [_status(item, max_length, too_long) for item in rendered]
    _refuse_long(problems, rendered, status, max_length, too_long)
    jobs = []
    for problem, item, state in zip(problems, rendered, status, strict=True):
        rows = official.boundaries(pair.tokenizer, problem.problem, problem.steps, form) if with_official else []
        start, end = item.start, item.end
        if rows:  # it may start before the answer, and it ends with the end-of-turn token
            start, end = min(start, rows[0] + 1), max(end, rows[-1] + 2)
        end = min(end, max_length or end)
        jobs.append((start, end, rows, Answer(item.ids[:start], item.ids[start:end]), state))
    used = [index for index, job in enumerate(jobs) if job[-1] != "too_long"]
    with tqdm(total=len(used), desc=problems[0].subset, unit="problem", disable=None) as bar:
        scored = dict(
            zip(used, log_ratios(pair, [jobs[i][3] for i in used], max_tokens, progress=bar.update), strict=True)
        )
    return [
        _row(problem, item, job, scored[i].numpy() if i in scored else None)
        for i, (problem, item, job) in enumerate(zip(problems, rendered, jobs, strict=True))
    ]


def _status(item: Rendered, max_length: int | None, too_long: TooLong) -> str:
    if max_length is None or item.end <= max_length:
        return "ok"
    return "truncated" if too_long == "truncate" and item.start < max_length else "too_long"


def _refuse_long(problems, rendered, status, max_length, too_long) -> None:
    long = [i for i, state in enumerate(status) if state != "ok"]
    if long and too_long == "refuse":
        worst = max(long, key=lambda i: rendered[i].end)
        raise ValueError(
            f"{len(long)} of {len(problems)} texts have more than {max_length} tokens, the longest "
            f"{rendered[worst].end} ({problems[worst].id}): pass --too-long skip or truncate, or another --max-length"
        )


def _row(problem: Problem, item: Rendered, job: tuple, q_N: np.ndarray | None) -> dict:
    start, end, rows, _, state = job
    row = {
        "subset": problem.subset,
        "id": problem.id,
        "generator": problem.generator,
        "label": problem.label,
        "final_answer_correct": problem.final_answer_correct,
        "status": state,
        "answer_tokens": item.end - item.start,
        **dict.fromkeys(("sums", "tokens", "official_rewards", "official_lengths")),
    }
    if q_N is None:
        return row
    steps = item.step_of[start:end]
    row["sums"], row["tokens"] = step_sums(q_N, steps, len(problem.steps))
    if state == "truncated":
        row["sums"] = [value if step <= max(steps) else None for step, value in enumerate(row["sums"])]
    elif rows:
        shifted_N = np.concatenate([np.zeros(start - 1, np.float32), q_N])
        row["official_rewards"], row["official_lengths"] = official.rewards(shifted_N, rows)
    return row


def write_scores(path: Path, rows: Sequence[dict], origin: dict) -> None:
    """`origin` (models, format, limits) is kept in the file: scores of different origins are never mixed."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema(
        [
            *((name, pyarrow.string()) for name in ("subset", "id", "generator")),
            ("label", pyarrow.int32()),
            ("final_answer_correct", pyarrow.bool_()),
            ("status", pyarrow.string()),
            ("answer_tokens", pyarrow.int32()),
            ("sums", pyarrow.list_(pyarrow.float64())),
            ("tokens", pyarrow.list_(pyarrow.int32())),
            ("official_rewards", pyarrow.list_(pyarrow.float32())),
            ("official_lengths", pyarrow.list_(pyarrow.int32())),
        ],
        metadata={"ipvrm": json.dumps(origin)},
    )
    temporary = path.with_name(f".{path.name}.tmp")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema=schema), temporary)
    temporary.replace(path)


def read_scores(paths: Iterable[Path]) -> tuple[list[dict], dict]:
    """(rows, origin) of score files and of folders of them, the published subsets first and in their order."""
    import pyarrow.parquet

    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.glob("*.parquet")))]
    if not files:
        raise FileNotFoundError(f"no score files (*.parquet) at {', '.join(map(str, paths))}")
    rows, origins = [], []
    for file in files:
        table = pyarrow.parquet.read_table(file)
        missing = [name for name in COLUMNS if name not in table.column_names]
        if missing:
            raise ValueError(f"{file} is no file of step scores: no column {', '.join(missing)}")
        origins.append(json.loads((table.schema.metadata or {}).get(b"ipvrm", b"{}")))
        if origins[-1] != origins[0]:
            differing = [key for key in origins[0] | origins[-1] if origins[0].get(key) != origins[-1].get(key)]
            raise ValueError(f"{files[0]} and {file} were scored differently: {', '.join(differing)}")
        rows += table.to_pylist()
    seen = {(row["subset"], row["id"]) for row in rows}
    if len(seen) < len(rows):
        raise ValueError(f"the score files hold {len(rows) - len(seen)} problems twice")
    order = {name: number for number, name in enumerate(SUBSETS)}
    return sorted(rows, key=lambda row: order.get(row["subset"], len(order))), origins[0]
