"""The tables of the page: rows of plain values, made from a collected run."""

import statistics
from math import sqrt
from typing import NamedTuple

from ipvrm_core.method import Method
from ipvrm_core.trainer.config import Config, Source
from ipvrm_core.trainer.report.collect import Phase, Run
from ipvrm_core.trainer.report.plots import window


class Change(NamedTuple):
    """A difference of shares between two policies on the same prompts and half the width of its 95% interval, None
    where the evaluation did not keep each prompt's share."""

    mean: float
    half_width: float | None

    @property
    def clear(self) -> bool:
        return self.half_width is not None and abs(self.mean) > self.half_width


def sources(config: Config) -> str:
    """What is trained and tested on: "Trained on a.jsonl, tested on b.jsonl; verifier: math." """
    trained = [_source(config.data)] if config.data else []
    if config.sft and config.sft.data:
        trained.append(f"{_source(config.sft.data)} (sft)")
    chats: dict[str, list[str]] = {}
    for name, rm in config.rm.items():
        if rm.data:
            validated = f", validated on {rm.data.validation_path}" if rm.data.validation_path else ""
            chats.setdefault(f"{rm.data.path}{validated}", []).append(f"rm.{name}")
    trained += [f"{files} ({', '.join(names)})" for files, names in chats.items()]
    text = f"Trained on {', '.join(trained)}" if trained else ""
    if config.test:
        text += f"{', tested' if text else 'Tested'} on {_source(config.test)}; verifier: {config.verifier.kind}"
    return f"{text}."


def _source(source: Source) -> str:
    arguments = ", ".join(f"{key} = {value}" for key, value in source.task_args.items())
    return f"{source.task} ({arguments})" if arguments else source.task or source.path


def policies(run: Run) -> dict:
    """{"columns": [(key, title)], "rows": [(name, method, {key: share}, {key: Change to the start}, result)],
    "prompts": n, "against": the policy run that learns from outcomes alone or None, "pairs": [(name, {key: Change to
    that one})]}; {} without results."""
    results = {key.removeprefix("policy-"): value for key, value in run.evaluation.items() if key.startswith("policy-")}
    if not results:
        return {}
    present = list(dict.fromkeys(key for result in results.values() for key in result))
    columns = [
        ("greedy", "greedy"),
        *((key, key) for key in present if key.startswith(("avg@", "pass@"))),
        ("all_steps_greedy", "all steps right, greedy"),
        ("all_steps", "all steps right, sampled"),
    ]
    columns = [column for column in columns if column[0] in present]
    against = next((name for name in run.config.outcomes_alone if name in results), None)
    others = [name for name in results if against and name not in ("start", against)]
    return {
        "columns": columns,
        "rows": [
            (
                "start" if name == "start" else f"rl.{name}",
                method(run.config, name),
                {key: result.get(key) for key, _ in columns},
                {} if name == "start" else _changes(result, results.get("start", {}), columns),
                result,
            )
            for name, result in results.items()
        ],
        "prompts": max(result.get("prompts", 0) for result in results.values()),
        "against": against and f"rl.{against}",
        "pairs": [(f"rl.{name}", _changes(results[name], results[against], columns)) for name in others],
    }


def _changes(result: dict, before: dict, columns: list[tuple[str, str]]) -> dict[str, Change]:
    return {key: _change(key, result, before) for key, _ in columns if {key} <= result.keys() & before.keys()}


def _change(key: str, result: dict, before: dict) -> Change:
    """The interval is of the mean over prompts, by the normal distribution."""
    values, others = (each.get("by_prompt", {}).get(key, []) for each in (result, before))
    if len(values) != len(others) or len(values) < 2:
        return Change(result[key] - before[key], None)
    differences = [value - other for value, other in zip(values, others, strict=True)]
    return Change(result[key] - before[key], 1.96 * statistics.stdev(differences) / sqrt(len(differences)))


def method(config: Config, name: str) -> str:
    """The policy run in a few words."""
    if name == "start":
        return "after SFT" if config.sft else "as given"
    rl = config.rl.get(name)
    if rl is None:
        return ""
    settings = rl.resolved()
    if rl.credit != "reward_model":
        credit = {"oracle": "perfect credit", "policy": "its own probabilities as credit"}[rl.credit]
        return f"DistRL with {credit}, no reward model, α = {settings.alpha:g}"
    outcome, estimator = settings.outcome.upper(), settings.estimator.upper()
    if rl.reward_model is None:
        return f"{outcome}, " + ("self-guided (SPRO)" if estimator == "MSA" else "outcome reward only")
    form = "" if settings.candidate_form == Method().candidate_form else f" by {settings.candidate_form}"
    kind = f"DistRL{form}" if settings.alpha else f"{outcome} with process reward"
    return f"{kind}, rm.{rl.reward_model.name}, α = {settings.alpha:g}, {estimator} × {settings.process_coef:g}"


def reward_models(run: Run) -> list[dict]:
    """{"name", "formats": {format: {protocol: numbers}}, "credit", "best_of_n": {N: {way: share}}} of every one."""
    rows = []
    for key, result in run.evaluation.items():
        kind, _, name = key.partition("-")
        if kind not in ("rm", "online"):
            continue
        formats: dict[str, dict] = {}
        for cell, numbers in result.get("localisation", {}).items():
            style, protocol = cell.split("/")
            formats.setdefault(style, {})[protocol] = numbers
        rows.append(
            {
                "name": f"rm.{name}" if kind == "rm" else f"rl.{name}, its reward model",
                "formats": formats,
                "credit": result.get("candidate_credit"),
                "best_of_n": result.get("best_of_n", {}),
            }
        )
    return rows


def choices(run: Run) -> list[dict]:
    """{"name", "result"} of every reward model whose choices were continued at any position."""
    names = {"choices-rm-": "rm.{}", "choices-online-": "rl.{}, at its end"}
    return [
        {"name": name.format(key.removeprefix(kind)), "result": result}
        for key, result in run.evaluation.items()
        for kind, name in names.items()
        if key.startswith(kind) and result["positions"]
    ]


def ranks(run: Run) -> list[dict]:
    """{"name", "result"} of every reward model whose prefixes were continued, with at least one prefix."""
    return [
        {"name": f"rm.{key.removeprefix('rank-')}", "result": result}
        for key, result in run.evaluation.items()
        if key.startswith("rank-") and result["prefixes"]
    ]


def training(phases: list[Phase], loss: str, ends: tuple[str, ...] = ()) -> list[dict]:
    """First and last loss (the last as a mean over the smoothing window) and the last value of `ends`."""
    rows = []
    for phase in phases:
        values = [value for _, value in phase.points(loss)]
        if values:
            last = values[-window(len(values)) :]
            finals = {name: points[-1][1] for name in ends if (points := phase.points(name))}
            step = phase.lines[-1]["step"]
            rows.append(
                {"key": phase.key, "step": step, "first": values[0], "last": statistics.fmean(last), "ends": finals}
            )
    return rows


def cost(run: Run) -> list[dict]:
    """Steps, seconds and peak memory of every phase that has lines."""
    rows = []
    for phase in [*run.training, *run.others]:
        seconds = [value for _, value in phase.points("seconds")]
        if seconds:
            memory = [value for _, value in phase.points("peak_memory_mb")]
            rows.append(
                {
                    "key": phase.key,
                    "steps": len(seconds),
                    "total": sum(seconds),
                    "median": statistics.median(seconds),
                    "memory": max(memory, default=None),
                }
            )
    return rows
