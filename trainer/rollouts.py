"""Sampling answers with transformers' generate, keeping the log-probability of every sampled token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ipvrm_core.trainer.models import causal_lm


@dataclass(frozen=True)
class Sample:
    """One answer. logprobs: log pi(y_t | s_t) at the sampling temperature; finished: it ended with EOS."""

    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float]
    finished: bool


class _KeepLogprobs:
    """A logits processor that changes nothing: at each call it reads which token was drawn from the previous logits."""

    def __init__(self, temperature: float):
        self.temperature = temperature
        self.previous_BV: Tensor | None = None
        self.columns: list[Tensor] = []

    def __call__(self, ids_BL: Tensor, logits_BV: Tensor) -> Tensor:
        self.read(ids_BL)
        self.previous_BV = (logits_BV.float() / self.temperature).log_softmax(-1)
        return logits_BV

    def read(self, ids_BL: Tensor) -> None:
        if self.previous_BV is not None:
            self.columns.append(self.previous_BV.gather(1, ids_BL[:, -1:]))


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[list[int]],
    *,
    samples: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    batch: int = 256,
) -> list[Sample]:
    """`samples` answers to each prompt, in order [p0s0, p0s1, ..., p1s0, ...]. temperature 0 is greedy.

    The caller seeds torch. Log-probs are those of the full distribution at `temperature` (of the raw one when greedy or
    when top_p < 1 cuts the tail: such samples are for evaluation).
    """
    was_training = model.training
    model.eval()
    stacked = [prompt for prompt in prompts for _ in range(samples)]
    made: list[Sample] = []
    for start in range(0, len(stacked), batch):
        made += _generate_batch(model, tokenizer, stacked[start : start + batch], temperature, top_p, max_new_tokens)
    model.train(was_training)
    return made


def _generate_batch(model, tokenizer, prompts, temperature, top_p, max_new_tokens) -> list[Sample]:
    from transformers import GenerationConfig, LogitsProcessorList

    model = causal_lm(model)
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    ids_BL = torch.tensor([[tokenizer.pad_token_id] * (longest - len(p)) + p for p in prompts], device=device)
    mask_BL = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    ends = _eos_ids(model, tokenizer)
    greedy = temperature == 0
    settings = {} if greedy else {"temperature": temperature, "top_p": top_p, "top_k": 0}
    keeper = _KeepLogprobs(1.0 if greedy or top_p < 1 else temperature)
    # A model's own GenerationConfig may carry top-k, penalties or another length limit, and `generate` takes from it
    # whatever is not given: both are fresh here.
    config = GenerationConfig(
        do_sample=not greedy,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        out_BL = model.generate(
            input_ids=ids_BL,
            attention_mask=mask_BL,
            generation_config=config,
            logits_processor=LogitsProcessorList([keeper]),
        )
    finally:
        model.generation_config = own
    keeper.read(out_BL)
    logprobs_BT = torch.cat(keeper.columns, dim=1).tolist()
    made = []
    for prompt, tokens, logprobs in zip(prompts, out_BL[:, longest:].tolist(), logprobs_BT, strict=True):
        end = next((t + 1 for t, token in enumerate(tokens) if token in ends), None)
        made.append(Sample(prompt, tokens[:end], logprobs[:end], end is not None))
    return made


def _eos_ids(model: nn.Module, tokenizer) -> set[int]:
    own = getattr(model, "generation_config", None)
    ids = own.eos_token_id if own is not None else None
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return {*ids, tokenizer.eos_token_id}
