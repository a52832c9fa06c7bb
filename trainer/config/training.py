"""Optimiser, fine-tuning on demonstrations, and sampling of answers to learn from."""

from typing import Annotated, Literal

from pydantic import Field

from ipvrm_core.trainer.config.base import Positive, PositiveFloat, Section
from ipvrm_core.trainer.config.data import Source


class Optim(Section):
    """AdamW with linear warm-up, then constant, linear or cosine decay to zero."""

    lr: PositiveFloat = 1e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.999)
    grad_clip: PositiveFloat | None = 1.0


class Sft(Section):
    """Next-token training on the demonstrations (`solution`) of its own data, or else of the training data."""

    data: Source | None = None
    steps: Positive = 200
    batch: Positive = Field(64, description="sequences a step")
    stop_accuracy: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="stop early once sampled answers to training problems are right this often"
    )
    optim: Optim = Optim(lr=5e-5, warmup=2)


class Rollout(Section):
    """Answers sampled from the starting policy: the reward model's training data."""

    prompts: Positive = 1024
    samples: Positive = Field(8, description="answers per prompt")
    held_out: Annotated[int, Field(ge=0)] = Field(128, description="of these prompts, kept for validation")
    batch: Positive = Field(64, description="prompts sampled at once; also the unit of resuming")


class Generation(Section):
    """Sampling of training rollouts. The method needs the full distribution, so there is no top-p or top-k here."""

    temperature: PositiveFloat = 1.0
    max_new_tokens: Positive = 1024
    batch: Positive = Field(256, description="sequences generated at once")
