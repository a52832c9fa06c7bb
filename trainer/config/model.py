"""The model that policy and reward models start from."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ipvrm_core.trainer.config.base import Positive, PositiveFloat, Section


class Scratch(Section):
    """A small decoder with random weights and a tokenizer of single characters (for the built-in tasks)."""

    architecture: Literal["qwen3", "llama"] = Field("qwen3", description="whose layers")
    hidden_size: Positive = Field(128, description="width")
    layers: Positive = Field(2, description="depth")
    heads: Positive = Field(4, description="of the attention; hidden_size / heads wide")
    kv_heads: Positive = Field(4, description="heads of keys and values, which groups of heads share")
    intermediate_size: Positive = Field(384, description="width inside the MLP")
    context: Positive = Field(256, description="positions for prompt and answer together")


class Lora(Section):
    """Low-rank adapters on the attention and MLP projections; the base, embedding and head stay frozen."""

    rank: Positive = Field(128, description="of the product that is added to a weight")
    alpha: PositiveFloat = Field(256.0, description="the product is scaled by alpha / rank")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="of the adapters' inputs in training")
    target_modules: str | list[str] = Field("all-linear", description="names of the layers that get adapters")
    one_base: bool = Field(
        True,
        description="a policy run holds the starting policy once: the policy is a new adapter on it, the reward model "
        "goes on with the adapter of train-rm, the reference is it without any. false: a model of its own for each",
    )


class Model(Section):
    """The start of policy and reward model: exactly one of `path` and `scratch`."""

    path: str | None = Field(None, description="Hugging Face name or local folder")
    gguf_file: str | None = Field(None, description="file inside `path`, for models that come as GGUF")
    scratch: Scratch | None = None
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the weights; bfloat16 ones are trained through float32 master copies"
    )
    lora: Lora | None = None
    liger: bool = Field(False, description="Liger's layers in place of transformers' own; needs a GPU")
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
