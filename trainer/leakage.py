"""The guard before training: are problems of the evaluation among those to train on?"""

import json

from ipvrm_core.trainer.config import Chats, Config, ConfigError, Source
from ipvrm_core.trainer.data.chats import by_prompt, load_chats
from ipvrm_core.trainer.data.example import Example
from ipvrm_core.trainer.data.files import load_examples
from ipvrm_core.trainer.data.overlap import overlap
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.files import write_json

SHOWN = 5


def guard(experiment: Experiment) -> None:
    """Compare training and evaluation data once a run, keep RUN/leakage.json, print what was found.

    ConfigError when there is overlap and leakage.action is "refuse". Built-in tasks keep their splits apart themselves.
    """
    path = experiment.run / "leakage.json"
    if not path.exists():
        write_json(path, compare(experiment.config))
    report = json.loads(path.read_text())
    leaks = [entry for entry in report if entry["shared"]]
    lines = [
        f"  {entry['train']}: {len(entry['shared'])} of the {entry['test_size']} problems of {entry['test']}, such as "
        + ", ".join(f"{ours} = {theirs}" for ours, theirs in entry["shared"][:SHOWN])
        for entry in leaks
    ]
    if not leaks:
        for entry in report:
            print(f"leakage: none of the {entry['test_size']} problems of {entry['test']} is in {entry['train']}")
        return
    text = "problems of the evaluation are in the training data:\n" + "\n".join(lines)
    if experiment.config.leakage.action == "refuse":
        raise ConfigError(
            f"{text}\nTake other data, or set leakage.action='allow' and do not report results on these problems. "
            f"All are in {path}"
        )
    print(f"leakage (allowed): {text}")


def compare(config: Config) -> list[dict]:
    """One entry per pair of a training and an evaluation source: {train, test, train_size, test_size, shared}."""
    sources = [config.data, *([config.sft.data] if config.sft and config.sft.data else [])]
    trained = [(_name(source), _read(source)) for source in sources if source.path]
    trained += [(_name(model.data), _read_chats(model.data)) for model in config.rm.values() if model.data]
    evaluated = [config.test, *config.eval.benchmarks.values(), *config.leakage.benchmarks]
    tested = [(_name(source), _read(source)) for source in evaluated if source.path]
    return [
        {
            "train": ours,
            "test": theirs,
            "train_size": len(train),
            "test_size": len(test),
            "shared": overlap(train, test),
        }
        for ours, train in trained
        for theirs, test in tested
    ]


def _name(source: Source | Chats) -> str:
    return " ".join(filter(None, (source.path, source.config, source.split)))


def _read_chats(source: Chats) -> list[Example]:
    """The prompts of a reward model's data; an id is the row."""
    return [Example(f"row {chats[0].row}", chats[0].prompt, "") for chats in by_prompt(load_chats(source))]


def _read(source: Source) -> list[Example]:
    """The prompts alone, without the template."""
    columns = {"prompt": source.prompt_column}
    limit = None if source.group_column else source.limit  # of each group: the whole file is looked at
    return load_examples(source.path, source.split, columns, config=source.config, limit=limit)
