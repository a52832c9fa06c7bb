"""Policies that the tests share: a tied and an untied head, whole and with adapters; and what transformers says."""

import copy

import torch

from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.config import Lora, Scratch, Vllm
from ipvrm_core.trainer.data.tasks import ChainTask
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.models import add_lora, build_scratch, character_tokenizer
from ipvrm_core.trainer.sampling.base import Drawing, Sample
from ipvrm_core.trainer.sampling.vllm import VllmSampler

TOKENIZER = character_tokenizer(ChainTask.alphabet)
SMALL = {"cache_gib": 0.05}
SIZES = {"hidden_size": 64, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate_size": 128, "context": 96}
GREEDY, DRAWN = Drawing(temperature=0, max_new_tokens=24), Drawing(4, max_new_tokens=16)
EXACT = 1e-5  # of a float32 log-prob


def prompts(count: int = 8) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    lengths = torch.randint(3, 14, (count,), generator=generator).tolist()
    return [torch.randint(2, len(TOKENIZER), (length,), generator=generator).tolist() for length in lengths]


def policy(name: str, temperature: float = 1.0, **sizes) -> LanguageModel:
    """ "tied" is a Qwen3, "untied" a Llama; "-lora" behind it: with adapters that do something."""
    torch.manual_seed(len(name))
    head, _, lora = name.partition("-")
    kind = {"tied": "qwen3", "untied": "llama"}[head]
    model = build_scratch(Scratch(architecture=kind, **{**SIZES, **sizes}), TOKENIZER)
    if head == "untied":
        config = copy.deepcopy(model.config)
        config.tie_word_embeddings = False
        model = type(model)(config)
    with torch.no_grad():  # at the usual initialisation all distributions are nearly uniform
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    if lora:
        model = add_lora(model, Lora(rank=4, alpha=8.0))
    made = LanguageModel(model, temperature=temperature)
    if lora:
        move(made)
    return made


@torch.no_grad()
def move(language_model: LanguageModel, by: float = 0.05) -> None:
    """What an optimiser may change is changed."""
    for parameter in language_model.model.parameters():
        if parameter.requires_grad:
            parameter.add_(by * torch.randn_like(parameter))


def sampler(language_model: LanguageModel, batch: int = 32, dtype: str = "float32", **settings) -> VllmSampler:
    return VllmSampler(language_model, TOKENIZER, Vllm(**{**SMALL, **settings}), batch=batch, dtype=dtype)


@torch.no_grad()
def furthest(language_model: LanguageModel, samples: list[Sample]) -> float:
    """The largest |log-prob of a sample - that of the trainer|."""
    ours_N = language_model.eval().logprobs([Answer(sample.prompt_ids, sample.response_ids) for sample in samples])
    return (ours_N - torch.tensor([value for sample in samples for value in sample.logprobs])).abs().max().item()
