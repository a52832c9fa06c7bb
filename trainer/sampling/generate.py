"""Sampling answers with transformers' generate, keeping the log-probability of every sampled token."""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from ipvrm_core.heads import causal_lm
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.sampling.base import Drawing, Sample, eos_ids


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


class Generate:
    """A sampler that is the policy itself; `batch` sequences at once."""

    def __init__(self, policy: LanguageModel, tokenizer, batch: int = 256):
        self.policy, self.tokenizer, self.batch = policy, tokenizer, batch

    @torch.no_grad()
    def sample(self, prompts: Sequence[list[int]], drawing: Drawing) -> list[Sample]:
        was_training = self.policy.training
        self.policy.eval()
        stacked = [prompt for prompt in prompts for _ in range(drawing.samples)]
        made: dict[int, Sample] = {}
        # A batch is padded to its longest prompt and goes on to its longest answer: like with like, the longest first.
        order = sorted(range(len(stacked)), key=lambda index: -len(stacked[index]))
        for start in range(0, len(order), self.batch):
            chosen = order[start : start + self.batch]
            batch = _generate_batch(self.policy.model, self.tokenizer, [stacked[index] for index in chosen], drawing)
            made |= zip(chosen, batch, strict=True)
        self.policy.train(was_training)
        return [made[index] for index in range(len(stacked))]

    def sync(self, policy: LanguageModel) -> None:
        self.policy = policy

    def rest(self) -> None:
        pass

    def close(self) -> None:
        pass


def _prompt_cache(model, ids_BL: Tensor, mask_BL: Tensor, repeats_U: Tensor):
    """Keys and values of the prompts but for their last tokens: made for the U that differ, repeated for each answer.

    None, and `generate` makes them for every answer, where the model keeps a state of another kind (Mamba's and linear
    attention's are not those of positions). The head is left out: torch's bfloat16 product of a frozen head with the
    last of several positions copies the head for every row on a CPU.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    cache = DynamicCache(config=model.config)
    positional = {type(layer) for layer in cache.layers} <= {DynamicLayer, DynamicSlidingWindowLayer}
    if ids_BL.shape[1] == 1 or not cache.layers or not positional:
        return None
    first_U = repeats_U.cumsum(0) - repeats_U
    mask_UL = mask_BL[first_U, :-1]
    positions_UL = (mask_UL.cumsum(-1) - 1).clamp(min=0)
    given = {"attention_mask": mask_UL, "position_ids": positions_UL, "past_key_values": cache}
    model.base_model(input_ids=ids_BL[first_U, :-1], **given, use_cache=True)
    if len(repeats_U) < len(ids_BL):
        cache.batch_select_indices(torch.arange(len(repeats_U), device=ids_BL.device).repeat_interleave(repeats_U))
    return cache


def _generate_batch(model, tokenizer, prompts, drawing: Drawing) -> list[Sample]:
    from transformers import GenerationConfig, LogitsProcessorList

    model = causal_lm(model)
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    ids_BL = torch.tensor([[tokenizer.pad_token_id] * (longest - len(p)) + p for p in prompts], device=device)
    mask_BL = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    repeats_U = torch.tensor([len(list(same)) for _, same in groupby(prompts)], device=device)
    ends = eos_ids(model, tokenizer)
    temperature, top_p = drawing.temperature, drawing.top_p
    greedy = temperature == 0
    settings = {} if greedy else {"temperature": temperature, "top_p": top_p, "top_k": 0}
    keeper = _KeepLogprobs(1.0 if greedy or top_p < 1 else temperature)
    # A model's own GenerationConfig may carry top-k, penalties or another length limit, and `generate` takes from it
    # whatever is not given: both are fresh here.
    config = GenerationConfig(
        do_sample=not greedy,
        max_new_tokens=drawing.max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        out_BL = model.generate(
            input_ids=ids_BL,
            attention_mask=mask_BL,
            past_key_values=_prompt_cache(model, ids_BL, mask_BL, repeats_U),
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
