"""What every phase shares: the configuration, the run folder, data, tokenizer, verifier and device."""

from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from ipvrm_core.trainer import config as configuration
from ipvrm_core.trainer import inputs, models
from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.config import Config, ConfigError, Source
from ipvrm_core.trainer.data.example import Example
from ipvrm_core.trainer.data.sources import read_source
from ipvrm_core.trainer.data.tasks import make_task
from ipvrm_core.trainer.files import read_json, write_text
from ipvrm_core.trainer.identity import Digests, model_digests
from ipvrm_core.trainer.leakage import left_out
from ipvrm_core.trainer.prompts import encode_prompt
from ipvrm_core.trainer.seeds import epoch_slice, stable_seed
from ipvrm_core.trainer.verify import make_verifier


class Experiment:
    """Folder layout: config.json, inputs/, sft/, rollout/, rm/<name>/, rl/<name>/, eval/, report/.

    A phase owns its folder. A run mixes neither two configurations nor two versions of its data, code or base model.
    """

    def __init__(self, config: Config, run: Path):
        self.config, self.run = config, Path(run)
        self.run.mkdir(parents=True, exist_ok=True)
        self._keep_config()
        inputs.keep(self.run, inputs.data_inputs(config) | inputs.code_inputs(config))

    def _keep_config(self) -> None:
        """The resolved configuration is written once."""
        path, text = self.run / "config.json", self.config.model_dump_json(indent=1) + "\n"
        if not path.exists():
            write_text(path, text)
            return
        kept = configuration.check(read_json(path), str(path)).model_dump()
        changed = sorted(_differing(kept, self.config.model_dump()))
        if changed:
            raise ConfigError(
                f"{self.run} was made with another configuration (differing: {', '.join(changed)}); "
                "take a new --run folder, or the old settings"
            )

    @cached_property
    def accelerator(self):
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=self.config.device == "cpu", mixed_precision=self.config.precision)
        if self.config.device == "cuda" and accelerator.device.type != "cuda":
            raise ConfigError(f"device must be available; got 'cuda', found {accelerator.device.type!r}")
        if accelerator.num_processes > 1:
            raise ConfigError(f"one process only; got {accelerator.num_processes} (data parallelism is not built yet)")
        return accelerator

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    # ---- data

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
            self._rows[key] = [example for example in self._read(source) if example.id not in out]
        return self._rows[key]

    def test_examples(self, count: int) -> list[Example]:
        """The first `count` test examples, the same for every seed of a built-in task."""
        source = self.config.test
        if source.task:
            return make_task(source.task, **source.task_args).examples(0, "test", 0, count)
        return self._read(source)[:count]

    def source_examples(self, source: Source) -> list[Example]:
        """All examples of a file or data set."""
        return self._read(source)

    def _read(self, source: Source) -> list[Example]:
        key = source.model_dump_json()
        if key not in self._rows:
            self._rows[key] = read_source(source)
        return self._rows[key]

    # ---- text

    @cached_property
    def tokenizer(self):
        """That of the base model, which every phase needs: here is where the base model is seen to be the same."""
        model = self.config.model
        if model.path:
            inputs.keep(self.run, {"model": model_digests(model.path, model.gguf_file)})
        return models.load_tokenizer(model, self.task.alphabet if self.task else None)

    def encode_prompt(self, example: Example) -> list[int]:
        """Token ids up to where the answer starts; through the chat template where there is one."""
        return encode_prompt(self.tokenizer, example, self.config.model.system_prompt)

    def encode_answer(self, text: str) -> list[int]:
        """Token ids of an answer, EOS included."""
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def demonstration(self, example: Example) -> Answer:
        if example.solution is None:
            raise ValueError(f"example {example.id} has no solution to learn from")
        return Answer(self.encode_prompt(example), self.encode_answer(example.solution))

    @cached_property
    def verifier(self):
        settings = self.config.verifier
        return make_verifier(settings.kind, max_errors=settings.max_errors, **settings.limits)

    @property
    def unfinished(self) -> str:
        """What becomes of answers cut at the limit of tokens."""
        return self.config.verifier.unfinished

    # ---- models

    def seed(self, *names) -> None:
        """Seed torch for one step of one phase."""
        torch.manual_seed(stable_seed(self.config.seed, *names))

    def start_policy(self) -> nn.Module:
        """The policy that rollouts, reward models and RL start from: after SFT where there is SFT."""
        if self.config.sft is None:
            return self.base_model()
        return self.load(self.run / "sft" / "model")

    def base_model(self) -> nn.Module:
        self.seed("init")
        model = models.start_model(self.config.model, self.tokenizer).to(self.device)
        models.check_head(model)
        return model

    def load(self, folder: Path) -> nn.Module:
        """A model that a finished phase saved; ConfigError if it is not what was saved."""
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} does not exist: run that phase first")
        inputs.keep(self.run, self._digests(folder))
        return models.load_pretrained(folder, self.config.model.dtype).to(self.device)

    def saved(self, folder: Path) -> None:
        """A phase has saved this model: what reads it must find it so."""
        for key, digests in self._digests(folder).items():
            inputs.forget(self.run, key)
            inputs.keep(self.run, {key: digests})

    def _digests(self, folder: Path) -> dict[str, Digests]:
        return {str(folder.relative_to(self.run)): model_digests(folder)}

    def trainable(self, model: nn.Module, *names) -> nn.Module:
        """Ready for an optimiser: with adapters where the configuration asks for LoRA."""
        if self.config.model.lora is None:
            return model
        self.seed("lora", *names)
        return models.add_lora(model, self.config.model.lora).to(self.device)

    def close(self) -> None:
        if "verifier" in self.__dict__:
            self.verifier.close()


def _differing(a: dict, b: dict, prefix: str = "") -> set[str]:
    found = set()
    for key in a.keys() | b.keys():
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            found |= _differing(left, right, f"{prefix}{key}.")
        elif left != right:
            found.add(f"{prefix}{key}")
    return found
