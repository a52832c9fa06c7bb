"""Optimiser, fine-tuning on demonstrations, and sampling of answers to learn from."""

from typing import Annotated, Literal

from pydantic import Field

from ipvrm_core.trainer.config.base import Positive, PositiveFloat, Section
from ipvrm_core.trainer.config.data import Source


class Optim(Section):
    """AdamW with linear warm-up, then constant, linear or cosine decay to zero."""

    lr: PositiveFloat = Field(1e-5, description="learning rate after the warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="of the rate after the warm-up")
    warmup: Annotated[int, Field(ge=0)] = Field(0, description="steps over which the rate rises from 0")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="share of a weight taken off, times the rate")
    betas: Annotated[tuple[float, float], Field(strict=False)] = Field(
        (0.9, 0.999), description="memory of the gradient's mean and of its square's"
    )
    grad_clip: PositiveFloat | None = Field(1.0, description="norm to which a larger gradient is scaled; None: never")
    offload: bool = Field(
        False,
        description="AdamW's moments are in the CPU's memory except during a step: for a GPU short of its own",
    )


class Sft(Section):
    """Next-token training on the demonstrations (`solution`) of its own data, or else of the training data."""

    data: Source | None = None
    steps: Positive = Field(200, description="of the optimiser, at most")
    batch: Positive = Field(64, description="sequences a step")
    stop_accuracy: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="stop early once sampled answers to training problems are right this often"
    )
    optim: Optim = Optim(lr=5e-5, warmup=2)


class Rollout(Section):
    """Answers sampled from the starting policy: the reward model's training data."""

    prompts: Positive = Field(1024, description="training problems that are answered")
    samples: Positive = Field(8, description="answers per prompt")
    held_out: Annotated[int, Field(ge=0)] = Field(128, description="of these prompts, kept for validation")
    batch: Positive = Field(64, description="prompts sampled at once; also the unit of resuming")


class Vllm(Section):
    """The engine of sampler = "vllm", in the trainer's own process (docs/vllm.md)."""

    cache_gib: PositiveFloat = Field(4.0, description="memory for keys and values, besides that of its weights")
    context: Positive | None = Field(
        None, description="tokens of prompt and answer together; None: the model's positions, or what the cache holds"
    )
    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="of its weights; None: bfloat16 where the policy's layers compute in it, else float32"
    )
    lora: Literal["adapter", "merged"] = Field(
        "adapter", description="how a policy with adapters arrives: as an adapter, or merged into whole weights"
    )
    eager: bool = Field(False, description="no CUDA graphs: starts sooner, samples more slowly")
    tolerance: PositiveFloat | None = Field(
        None,
        description="mean |difference| of a few log-probs to the trainer's, after every update, at which the run "
        "stops; None: 1e-3, with bfloat16 on a side 0.1",
    )


class Generation(Section):
    """Sampling of training rollouts. The method needs the full distribution, so there is no top-p or top-k here."""

    sampler: Literal["generate", "vllm"] = Field(
        "generate", description="transformers' generate, or vLLM (the extra vllm); see also rl.<name>.correction"
    )
    temperature: PositiveFloat = Field(1.0, description="divides the logits, of every log-prob in training too")
    max_new_tokens: Positive = Field(1024, description="tokens at which an answer is cut")
    batch: Positive = Field(256, description="sequences generated at once")
    vllm: Vllm = Vllm()
