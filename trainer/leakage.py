"""The guard before training: are problems of the evaluation among those to train on?"""

from pathlib import Path
from typing import NamedTuple

from ipvrm_core.trainer.config import Chats, Config, ConfigError, Source
from ipvrm_core.trainer.data.chats import by_prompt, load_chats
from ipvrm_core.trainer.data.example import Example
from ipvrm_core.trainer.data.files import load_examples
from ipvrm_core.trainer.data.overlap import overlap
from ipvrm_core.trainer.files import read_json, write_json
from ipvrm_core.trainer.inputs import data_inputs

SHOWN = 5


class Problems(NamedTuple):
    """What is compared: `examples`, one a problem, and the ids of the rows that each stands for."""

    name: str
    examples: list[Example]
    ids: list[list[str]]


def guard(config: Config, run: Path) -> None:
    """Compare training and evaluation data, once for the same files; keep RUN/leakage.json, print what was found.

    ConfigError when there is overlap and leakage.action is "refuse", or where "drop" would leave nothing to train on.
    Built-in tasks keep their splits apart themselves.
    """
    path, report = run / "leakage.json", _report(config, run)
    leaks = [entry for entry in report if entry["shared"]]
    if not leaks:
        for entry in report:
            print(f"leakage: none of the {entry['test_size']} problems of {entry['test']} is in {entry['train']}")
        return
    lines = [
        f"  {entry['train']}: {len(entry['shared'])} of the {entry['test_size']} problems of {entry['test']}, such as "
        + ", ".join(f"{ours} = {theirs}" for ours, theirs in entry["shared"][:SHOWN])
        for entry in leaks
    ]
    text = "problems of the evaluation are in the training data:\n" + "\n".join(lines)
    action = config.leakage.action
    if action == "refuse":
        raise ConfigError(
            f"{text}\nTake other data or, with a new --run folder, set leakage.action='drop' to leave these problems "
            "out of the training data, or leakage.action='allow' and do not report results on them. "
            f"All are in {path}"
        )
    print(f"leakage ({'allowed' if action == 'allow' else 'left out of training'}): {text}")
    if action == "drop":
        for entry in {entry["train"]: entry for entry in leaks}.values():
            out = left_out(config, run, entry["used_by"][0])
            print(f"leakage: {len(out)} of {entry['train_rows']} rows of {entry['train']} left out, listed in {path}")


def left_out(config: Config, run: Path, key: str) -> frozenset[str]:
    """Ids of the rows that leakage.action = "drop" takes out of the training data `key`, the same for every phase.

    An id is that of Example, or "row <number>" for chats. ConfigError when no other rows are left.
    """
    if config.leakage.action != "drop":
        return frozenset()
    entries = [entry for entry in _report(config, run) if key in entry["used_by"]]
    out = frozenset(row for entry in entries for row in entry["train_ids"])
    if out and len(out) == entries[0]["train_rows"]:
        raise ConfigError(
            f"leakage.action='drop' leaves nothing of {entries[0]['train']} to train on: all of its {len(out)} rows "
            f"are problems of {', '.join(entry['test'] for entry in entries if entry['shared'])}"
        )
    return out


def _report(config: Config, run: Path) -> list[dict]:
    """The comparison kept in RUN/leakage.json, made anew where it is of other data."""
    path, inputs = run / "leakage.json", data_inputs(config)
    kept = read_json(path) if path.exists() else {}
    if kept.get("inputs") != inputs:
        kept = {"inputs": inputs, "pairs": compare(config)}
        write_json(path, kept)
    return kept["pairs"]


def compare(config: Config) -> list[dict]:
    """One entry per pair of a training and an evaluation source.

    used_by: the keys of the configuration that train on it. train, test: names for people. train_size, test_size:
    problems; train_rows: rows. shared: [training id, test id] of every shared problem, the training data's first of
    several. train_ids: all rows of the training data with a shared problem.

    The validation file of chats is an evaluation of the reward models that train on these chats alone.
    """
    sources = {"data": config.data, "sft.data": config.sft and config.sft.data}
    used_by: dict[str, list[str]] = {}  # several reward models may learn from the same chats
    chats: dict[str, Chats] = {}
    for name, model in config.rm.items():
        if model.data:
            identity = model.data.model_dump_json()
            used_by.setdefault(identity, []).append(f"rm.{name}.data")
            chats[identity] = model.data
    trained = [([key], _read(key, source), None) for key, source in sources.items() if source and source.path]
    trained += [
        (keys, _read_chats(", ".join(keys), chats[identity]), chats[identity]) for identity, keys in used_by.items()
    ]
    evaluated = {"test": config.test}
    evaluated |= {f"eval.benchmarks.{name}": source for name, source in config.eval.benchmarks.items()}
    evaluated |= {f"leakage.benchmarks.{index}": source for index, source in enumerate(config.leakage.benchmarks)}
    tested = [_read(key, source) for key, source in evaluated.items() if source and source.path] if trained else []
    return [
        _entry(keys, train, test)
        for keys, train, source in trained
        for test in [*tested, *_validation(", ".join(keys), source)]
    ]


def _entry(keys: list[str], train: Problems, test: Problems) -> dict:
    shared = overlap(train.examples, test.examples)
    return {
        "used_by": keys,
        "train": train.name,
        "test": test.name,
        "train_size": len(train.examples),
        "test_size": len(test.examples),
        "train_rows": sum(map(len, train.ids)),
        "shared": [(train.examples[found[0]].id, test.examples[index].id) for index, found in shared.items()],
        "train_ids": [id for index in sorted(set().union(*shared.values())) for id in train.ids[index]],
    }


def _validation(key: str, source: Chats | None) -> list[Problems]:
    if source is None or source.validation_path is None:
        return []
    return [_read_chats(f"{key}.validation_path", source.of_validation())]


def _read_chats(key: str, source: Chats) -> Problems:
    """The prompts of a reward model's data; an id is the first row of a prompt."""
    prompts = by_prompt(load_chats(source))
    ids = [list(dict.fromkeys(chat.id for chat in chats)) for chats in prompts]
    examples = [Example(chats[0].id, chats[0].prompt, "") for chats in prompts]
    return Problems(_name(key, source), examples, ids)


def _read(key: str, source: Source) -> Problems:
    """The prompts alone, without the template."""
    columns = {"prompt": source.prompt_column}
    limit = None if source.group_column else source.limit  # of each group: the whole file is looked at
    examples = load_examples(source.path, source.split, columns, config=source.config, limit=limit)
    return Problems(_name(key, source), examples, [[example.id] for example in examples])


def _name(key: str, source: Source | Chats) -> str:
    return f"{key} ({' '.join(filter(None, (source.path, source.config, source.split)))})"
