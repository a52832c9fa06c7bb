"""What a sampler takes and gives. Another one is one more file, and a line in `Experiment.sampler`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from ipvrm_core.trainer.language_model import LanguageModel


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn. temperature 0 is greedy; top_p < 1 cuts the tail, which only an evaluation may."""

    samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256


@dataclass(frozen=True)
class Sample:
    """One answer. logprobs: log pi(y_t | s_t) at the sampling temperature; finished: it ended with EOS."""

    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float]
    finished: bool


class Sampler(Protocol):
    """Samples from one policy. The caller seeds torch; equal seeds, weights and prompts give equal answers."""

    def sample(self, prompts: Sequence[list[int]], drawing: Drawing) -> list[Sample]:
        """`drawing.samples` answers to each prompt, in order [p0s0, p0s1, ..., p1s0, ...].

        Log-probs are those of the full distribution at the temperature (of the raw one when greedy or when top_p < 1).
        No gradient, no dropout, and the policy's mode (train or eval) is afterwards what it was.
        """
        ...

    def sync(self, policy: LanguageModel) -> None:
        """The next answers come from these weights: called after every update of the policy."""
        ...

    def rest(self) -> None:
        """Training follows: memory that only sampling needs may go until the next `sample` or `sync`."""
        ...

    def close(self) -> None:
        """Whatever it holds is free again."""
        ...


def eos_ids(model: nn.Module, tokenizer) -> set[int]:
    """The tokens that end an answer: those of the model's own generation config, and the tokenizer's."""
    own = getattr(model, "generation_config", None)
    ids = own.eos_token_id if own is not None else None
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return {*ids, tokenizer.eos_token_id}
