"""A run without its models: folder, configuration, seeds and the streams of its data."""

from functools import cached_property
from operator import attrgetter
from pathlib import Path

import torch

from ipvrm_core.trainer import config as configuration
from ipvrm_core.trainer import inputs
from ipvrm_core.trainer.config import Config, ConfigError, Source
from ipvrm_core.trainer.data.example import Example
from ipvrm_core.trainer.data.sources import read_source
from ipvrm_core.trainer.data.tasks import make_task
from ipvrm_core.trainer.files import read_json, write_text
from ipvrm_core.trainer.leakage import left_out
from ipvrm_core.trainer.seeds import epoch_slice, stable_seed

LATER = ("eval.rank_prompts", "eval.choice_prompts")  # each has results of its own, nothing else depends on them


class Run:
    """Folder layout: config.json, inputs/, sft/, rollout/, rm/<name>/, rl/<name>/, eval/, report/.

    A phase owns its folder. A run mixes neither two configurations nor two versions of its data, code or base model;
    only measurements that stand apart (`LATER`) can be asked for when it is done.
    """

    def __init__(self, config: Config, run: Path):
        self.config, self.run = config, Path(run)
        self.run.mkdir(parents=True, exist_ok=True)
        self._keep_config()
        inputs.keep(self.run, inputs.data_inputs(config) | inputs.code_inputs(config))

    def _keep_config(self) -> None:
        """The resolved configuration is written once, and again when it asks for a measurement that was not made."""
        path, text = self.run / "config.json", self.config.model_dump_json(indent=1) + "\n"
        if not path.exists():
            write_text(path, text)
            return
        kept = configuration.check(read_json(path), str(path))
        changed = sorted(_differing(kept.model_dump(), self.config.model_dump()))
        if changed and all(name in LATER and not attrgetter(name)(kept) for name in changed):
            write_text(path, text)
        elif changed:
            raise ConfigError(
                f"{self.run} was made with another configuration (differing: {', '.join(changed)}); "
                "take a new --run folder, or the old settings"
            )

    def seed(self, *names) -> None:
        """Seed torch for one step of one phase."""
        torch.manual_seed(stable_seed(self.config.seed, *names))

    def generator(self, *names) -> torch.Generator:
        """Draws what torch draws after `seed`; for a thread, since torch's own generator is shared by all of them."""
        return torch.Generator().manual_seed(stable_seed(self.config.seed, *names))

    @cached_property
    def task(self):
        """The built-in task of the training data, or None."""
        source = self.config.data
        return make_task(source.task, **source.task_args) if source and source.task else None

    @cached_property
    def _rows(self) -> dict[str, list[Example]]:
        return {}

    def examples(self, stream: str, start: int, count: int) -> list[Example]:
        """Training examples start .. start + count of an endless stream, a pure function of its arguments.

        Streams ("sft", "rollout", "rl") are independent orders: a built-in task draws other problems for each, a
        file is walked in another shuffled order, epoch after epoch.
        """
        own = stream == "sft" and self.config.sft.data
        source = own or self.config.data
        seed = stable_seed(self.config.seed, "data", stream)
        if source.task:
            return make_task(source.task, **source.task_args).examples(seed, "train", start, count)
        rows = self._training_rows("sft.data" if own else "data", source)
        return [rows[index] for index in epoch_slice(len(rows), start, count, seed)]

    def _training_rows(self, key: str, source: Source) -> list[Example]:
        """What leakage.action leaves of a file."""
        if key not in self._rows:
            out = left_out(self.config, self.run, key)
            self._rows[key] = [example for example in self.source_examples(source) if example.id not in out]
        return self._rows[key]

    def test_examples(self, count: int) -> list[Example]:
        """The first `count` test examples, the same for every seed of a built-in task."""
        source = self.config.test
        if source.task:
            return make_task(source.task, **source.task_args).examples(0, "test", 0, count)
        return self.source_examples(source)[:count]

    def source_examples(self, source: Source) -> list[Example]:
        """All examples of a file or data set."""
        key = source.model_dump_json()
        if key not in self._rows:
            self._rows[key] = read_source(source)
        return self._rows[key]


def _differing(a: dict, b: dict, prefix: str = "") -> set[str]:
    found = set()
    for key in a.keys() | b.keys():
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            found |= _differing(left, right, f"{prefix}{key}.")
        elif left != right:
            found.add(f"{prefix}{key}")
    return found
