"""The models of a configuration with any weights: an experiment that reads no weights and writes nothing."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from ipvrm_core.trainer import models
from ipvrm_core.trainer.config import Config
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.sampling.generate import Generate
from ipvrm_core.trainer.text import Text


class Blank(Experiment):
    """Each model is made anew where a run would load it; the tokenizer is the real one. fake: in a FakeTensorMode."""

    def __init__(self, config: Config, tokenizer, device: torch.device, fake: bool = False):
        layers = config.model.model_copy(update={"liger": False})  # kernels, which tensors without memory cannot run
        self.config, self.run = config.model_copy(update={"model": layers}), Path("blank")
        self.tokenizer, self.fake = tokenizer, fake
        half = config.precision == "bf16"
        autocast: Callable[[], AbstractContextManager] = lambda: torch.autocast(device.type, torch.bfloat16, half)  # noqa: E731
        self.accelerator = SimpleNamespace(device=device, autocast=autocast)

    @property
    def text(self) -> Text:
        return Text(self.tokenizer, self.config.model.system_prompt)

    def base_model(self) -> LanguageModel:
        scratch = self.config.model.scratch is not None  # begins in float32
        return self.language_model(self._made(torch.float32 if scratch else self._dtype))

    def load(self, folder: Path) -> LanguageModel:
        model = self._made(self._dtype)
        if folder.parent.name in self.config.rm and self._scores_values(folder):
            models.add_value_head(model)
        return self.language_model(model)

    def load_adapter(self, one: models.OneBase, folder: Path, name: str, trained: bool) -> models.Role:
        role = one.add(name, trained)
        if self._scores_values(folder):
            role.value_head = models.make_value_head(role).requires_grad_(trained)
        return role

    def prepared(self, model: nn.Module) -> nn.Module:
        return model if self.fake else super().prepared(model)  # it is tried on two sequences, which takes values

    def sampler(self, policy: LanguageModel) -> Generate:
        """Nobody samples, and no engine starts."""
        return Generate(policy, self.tokenizer)

    def _scores_values(self, folder: Path) -> bool:
        """Whether rm/<name>/... is a model with a value head."""
        return self.config.rm[folder.parent.name].build().head == "value"

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.config.model.dtype)

    def _made(self, dtype: torch.dtype) -> nn.Module:
        settings = self.config.model
        if settings.scratch:
            usual = torch.get_default_dtype()
            torch.set_default_dtype(dtype)
            try:
                return models.build_scratch(settings.scratch, self.tokenizer)
            finally:
                torch.set_default_dtype(usual)
        from transformers import AutoConfig, AutoModelForCausalLM

        extra = {"gguf_file": settings.gguf_file} if settings.gguf_file else {}
        config = AutoConfig.from_pretrained(settings.path, **extra)
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
