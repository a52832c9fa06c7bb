"""A run with its models: tokenizer, judge, device, and the language models of its phases."""

from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from ipvrm_core.trainer import inputs, models
from ipvrm_core.trainer.config import ConfigError
from ipvrm_core.trainer.identity import Digests, model_digests
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.run import Run
from ipvrm_core.trainer.sampling.base import Drawing, Sampler
from ipvrm_core.trainer.sampling.generate import Generate
from ipvrm_core.trainer.sampling.verified import Asker
from ipvrm_core.trainer.text import Text
from ipvrm_core.trainer.verify import make_verifier


class Experiment(Run):
    """What phases take; functions below them take a LanguageModel, a Text, an Asker or a Run."""

    # ---- text and judge

    @cached_property
    def text(self) -> Text:
        """The tokenizer is the base model's, which every phase needs: here it is seen to be the same."""
        model = self.config.model
        if model.path:
            inputs.keep(self.run, {"model": model_digests(model.path, model.gguf_file)})
        tokenizer = models.load_tokenizer(model, self.task.alphabet if self.task else None)
        return Text(tokenizer, model.system_prompt)

    @cached_property
    def asker(self) -> Asker:
        settings = self.config.verifier
        verifier = make_verifier(settings.kind, max_errors=settings.max_errors, **settings.limits)
        return Asker(self.text, verifier, settings.unfinished)

    def close(self) -> None:
        if "asker" in self.__dict__:
            self.asker.verifier.close()

    # ---- models

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

    def language_model(self, model: nn.Module) -> LanguageModel:
        """With the run's temperature, token budget, packing and precision."""
        return LanguageModel(
            self.prepared(model),
            temperature=self.config.generation.temperature,
            max_tokens=self.config.micro_batch_tokens,
            packed=self.config.packing,
            autocast=self.accelerator.autocast,
        )

    def prepared(self, model: nn.Module) -> nn.Module:
        """On the device; with Liger's layers and an attention for packed rows where the configuration asks for them."""
        model = model.to(self.device)
        if self.config.model.liger:
            models.liger_layers(model)
        return models.can_pack(model) if self.config.packing else model

    def start_policy(self) -> LanguageModel:
        """The policy that rollouts, reward models and RL start from: after SFT where there is SFT."""
        if self.config.sft is None:
            return self.base_model()
        return self.load(self.run / "sft" / "model")

    def base_model(self) -> LanguageModel:
        self.seed("init")
        model = models.start_model(self.config.model, self.text.tokenizer)
        models.check_head(model)
        return self.language_model(model)

    def load(self, folder: Path) -> LanguageModel:
        """A model that a finished phase saved."""
        self.keep(folder)
        return self.language_model(models.load_pretrained(folder, self.config.model.dtype))

    def load_adapter(self, one: models.OneBase, folder: Path, name: str, trained: bool) -> models.Role:
        """An adapter that a finished phase saved, under the name that it has on its base here."""
        self.keep(folder)
        return one.load(folder, name, trained)

    def keep(self, folder: Path) -> None:
        """ConfigError if what a finished phase saved is not what it was."""
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} does not exist: run that phase first")
        inputs.keep(self.run, self._digests(folder))

    def saved(self, folder: Path) -> None:
        """A phase has saved this model: what reads it must find it so."""
        for key, digests in self._digests(folder).items():
            inputs.forget(self.run, key)
            inputs.keep(self.run, {key: digests})

    def _digests(self, folder: Path) -> dict[str, Digests]:
        return {str(folder.relative_to(self.run)): model_digests(folder)}

    def trainable(self, language_model: LanguageModel, *names) -> LanguageModel:
        """Ready for an optimiser: with adapters where the configuration asks for LoRA, and as it says in memory."""
        if self.config.model.lora is not None:
            self.seed("lora", *names)
            language_model = self.language_model(models.add_lora(language_model.model, self.config.model.lora))
        return self.sparing(language_model)

    def sparing(self, language_model: LanguageModel) -> LanguageModel:
        """With activation checkpointing where the configuration asks for it."""
        if self.config.activation_checkpointing:
            models.checkpoint_activations(language_model.model)
        return language_model

    # ---- sampling

    def sampler(self, policy: LanguageModel) -> Sampler:
        """The caller closes it; `trainer/sampling/base.py` has what it promises."""
        generation, tokenizer = self.config.generation, self.text.tokenizer
        if generation.sampler == "generate":
            return Generate(policy, tokenizer, generation.batch)
        from ipvrm_core.trainer.sampling.vllm import VllmSampler

        return VllmSampler(policy, tokenizer, generation.vllm, batch=generation.batch, dtype=self.engine_dtype)

    @property
    def engine_dtype(self) -> str:
        """Of vLLM's weights, where nothing is said: what the policy's layers compute in."""
        low = "bfloat16" in (self.config.model.dtype, {"bf16": "bfloat16"}.get(self.config.precision))
        return "bfloat16" if low else "float32"

    def drawing(self, samples: int) -> Drawing:
        """Answers to learn from: of the full distribution, at the run's temperature."""
        generation = self.config.generation
        return Drawing(samples, generation.temperature, max_new_tokens=generation.max_new_tokens)
