"""What vLLM's engine holds beside the trainer's models: its own copy of the weights, and its cache."""

from typing import NamedTuple

import torch
from torch import nn

from ipvrm_core.heads import causal_lm
from ipvrm_core.trainer.config import Vllm
from ipvrm_core.trainer.sampling.engine import padded_rank
from ipvrm_core.trainer.sampling.vllm import adapter_rank

WEIGHTS, CACHE = "engine's weights", "engine's cache"
ROWS = 64  # vLLM rounds a vocabulary up to so many


class Engine(NamedTuple):
    """Bytes. rests: it sleeps while models learn, which needs a GPU."""

    weights: int
    cache: int
    rests: bool

    @classmethod
    def of(cls, model: nn.Module, settings: Vllm, dtype: str, *, rests: bool) -> "Engine":
        """For this policy. An adapter has room at every layer, and at both ends of the model, trained or not."""
        base, rank = causal_lm(model), padded_rank(adapter_rank(model, settings))
        V, D = base.get_output_embeddings().weight.shape
        weights = [weight for name, weight in base.named_parameters() if ".lora_" not in name]
        linears = {name: layer for name, layer in base.named_modules() if isinstance(layer, nn.Linear)}
        sides = sum(each.in_features + each.out_features for name, each in linears.items() if ".lora_" not in name)
        numbers = sum(weight.numel() + (-V % ROWS * D if weight.shape == (V, D) else 0) for weight in weights)
        numbers += rank * (sides + V + D)
        itemsize = getattr(torch, settings.dtype or dtype).itemsize
        return cls(itemsize * numbers, int(settings.cache_gib * 2**30), rests)

    def beside(self, sampling: bool, device: torch.device) -> dict[str, int]:
        """Its parts while it samples, or while a model learns."""
        asleep = self.rests and not sampling and device.type == "cuda"
        return dict.fromkeys((WEIGHTS, CACHE), 0) if asleep else {WEIGHTS: self.weights, CACHE: self.cache}
