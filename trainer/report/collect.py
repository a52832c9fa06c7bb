"""A run folder as plain data. Whatever is missing is None or empty; nothing is computed from models."""

import json
import shlex
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ipvrm_core.trainer import config as configuration
from ipvrm_core.trainer.config import Config
from ipvrm_core.trainer.metrics import read_metrics

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Note:
    """Why something is not there (yet), and the command that would produce it."""

    text: str
    command: str


@dataclass(frozen=True)
class Phase:
    """One training phase: `key` as in the configuration (sft, rm.<name>, rl.<name>), one dict a step."""

    key: str
    lines: list[dict]
    note: Note | None

    def points(self, name: str) -> Points:
        """(step, value) of the lines that have `name` as a number."""
        return [(line["step"], line[name]) for line in self.lines if isinstance(line.get(name), int | float)]

    @property
    def names(self) -> list[str]:
        """The quantities of this phase, in the order of their first appearance."""
        return list(dict.fromkeys(name for line in self.lines for name in line if name != "step"))


@dataclass(frozen=True)
class Run:
    config: Config
    folder: Path
    sft: Phase | None  # None: not in the configuration
    reward_models: list[Phase]
    policies: list[Phase]
    rollout: dict | None
    rollout_note: Note | None
    others: list[Phase]  # rollout and eval: only their cost is read from their lines
    calibration: dict[str, dict[str, list[dict]]]  # rm.<name>: reliability bins by percent of an answer
    evaluation: dict[str, dict]  # policy-start, and policy-, rm-, online-<name>, as far as they are there
    evaluation_note: Note | None
    newest: datetime | None  # when the newest file that the report reads was written

    @property
    def training(self) -> list[Phase]:
        return [*([self.sft] if self.sft else []), *self.reward_models, *self.policies]


def collect(config: Config, folder: Path) -> Run:
    """Read `folder`; its own config.json goes before `config`. FileNotFoundError if the folder does not exist."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist: nothing to report on")
    kept = folder / "config.json"
    if kept.exists():
        config = configuration.check(json.loads(kept.read_text()), str(kept))
    summary, evaluation = folder / "rollout" / "summary.json", _evaluation(config, folder)
    complete = (folder / "eval" / "results.json").exists()
    return Run(
        config=config,
        folder=folder,
        sft=_phase(folder, "sft", "sft", config.sft.steps) if config.sft else None,
        reward_models=[
            _phase(folder, f"rm/{name}", f"train-rm --name {name}", rm.steps) for name, rm in config.rm.items()
        ],
        policies=[_phase(folder, f"rl/{name}", f"rl --name {name}", rl.steps) for name, rl in config.rl.items()],
        rollout=json.loads(summary.read_text()) if summary.exists() else None,
        others=[Phase(name, read_metrics(folder / name / "metrics.jsonl"), None) for name in ("rollout", "eval")],
        rollout_note=None
        if summary.exists() or not config.rollout
        else _note(folder, "rollout", "rollout", started=summary.parent.exists()),
        calibration=_calibration(config, folder),
        evaluation=evaluation,
        evaluation_note=None
        if complete
        else _note(folder, "eval", "eval", started=bool(evaluation), progress=f"{len(evaluation)} models so far"),
        newest=_newest(folder),
    )


def _phase(folder: Path, place: str, command: str, total: int) -> Phase:
    key, lines = place.replace("/", "."), read_metrics(folder / place / "metrics.jsonl")
    if (folder / place / "model").exists():
        return Phase(key, lines, None)
    progress = f"step {lines[-1]['step']} of {total}" if lines else ""
    return Phase(key, lines, _note(folder, key, command, started=bool(lines), progress=progress))


def _note(folder: Path, key: str, command: str, *, started: bool, progress: str = "") -> Note:
    text = f"{key} is not finished" + (f" ({progress})" if progress else "") if started else f"{key} has not been run"
    words = ["ipvrm", *command.split(), str(folder / "config.json"), "--run", str(folder)]
    return Note(text, shlex.join([*words, "--resume"] if started else words))


def _evaluation(config: Config, folder: Path) -> dict[str, dict]:
    """eval/results.json, or the files of the models that are evaluated so far."""
    results = folder / "eval" / "results.json"
    if results.exists():
        return json.loads(results.read_text())
    names = ["policy-start", *(f"policy-{name}" for name in config.rl), *(f"rm-{name}" for name in config.rm)]
    names += [f"online-{name}" for name in config.rl]
    paths = {name: folder / "eval" / f"{name}.json" for name in names}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def _calibration(config: Config, folder: Path) -> dict[str, dict[str, list[dict]]]:
    paths = {f"rm.{name}": folder / "rm" / name / "calibration.json" for name in config.rm}
    return {key: json.loads(path.read_text())["percent_of_answer"] for key, path in paths.items() if path.exists()}


def _newest(folder: Path) -> datetime | None:
    patterns = ("config.json", "sft/metrics.jsonl", "rollout/summary.json", "r[ml]/*/*.json*", "eval/*.json")
    times = [path.stat().st_mtime for pattern in patterns for path in folder.glob(pattern)]
    return datetime.fromtimestamp(max(times), UTC) if times else None
