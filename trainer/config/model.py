"""The model that policy and reward models start from."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ipvrm_core.trainer.config.base import Positive, PositiveFloat, Section


class Scratch(Section):
    """A small decoder with random weights and a tokenizer of single characters (for the built-in tasks)."""

    architecture: Literal["qwen3", "llama"] = "qwen3"
    hidden_size: Positive = 128
    layers: Positive = 2
    heads: Positive = 4
    kv_heads: Positive = 4
    intermediate_size: Positive = 384
    context: Positive = 256


class Lora(Section):
    """Low-rank adapters on the attention and MLP projections; the base, embedding and head stay frozen."""

    rank: Positive = 128
    alpha: PositiveFloat = 256.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | list[str] = "all-linear"


class Model(Section):
    """The start of policy and reward model: exactly one of `path` and `scratch`."""

    path: str | None = Field(None, description="Hugging Face name or local folder")
    gguf_file: str | None = Field(None, description="file inside `path`, for models that come as GGUF")
    scratch: Scratch | None = None
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the weights; bfloat16 ones are trained through float32 master copies"
    )
    lora: Lora | None = None
    system_prompt: str | None = Field(None, description="first message, where the tokenizer has a chat template")

    @model_validator(mode="after")
    def _one_source(self):
        if (self.path is None) == (self.scratch is None):
            raise ValueError(
                f"exactly one of path and scratch must be set; got path={self.path!r}, scratch={self.scratch}"
            )
        if self.gguf_file and not self.path:
            raise ValueError("gguf_file needs path")
        return self
