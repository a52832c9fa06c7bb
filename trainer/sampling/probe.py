"""Do the engine and the trainer have the same policy? A few log-probs by both sides, after every update.

Shape letters: N probed tokens.
"""

from typing import TYPE_CHECKING

import torch

from ipvrm_core.heads import causal_lm
from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.sampling.base import Drawing
from ipvrm_core.trainer.sampling.weights import differing_weights, weights_of

if TYPE_CHECKING:
    from ipvrm_core.trainer.sampling.vllm import VllmSampler

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 8, 8
# Sums in another order move a float32 log-prob by 1e-6 to 1e-4. bfloat16 has 8 bits: a logit of 20 is rounded by up to
# 0.06, and every layer's output too. Measured on SmolLM2-135M: 6e-6 and 0.033 in the mean over tokens (docs/vllm.md).
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


class ProbeError(RuntimeError):
    """The engine samples from another policy than the trainer trains."""


def probe(sampler: "VllmSampler", policy: LanguageModel) -> float:
    """Mean |log-prob by the engine - by the trainer| over answers to random prompts; ProbeError beyond the tolerance.

    The answers are drawn with a fixed seed at the training temperature: the caller's generator is not touched.
    """
    generator = torch.Generator().manual_seed(0)
    rows = min(len(sampler.tokenizer), causal_lm(policy.model).get_output_embeddings().weight.shape[0])
    prompts = torch.randint(rows, (PROMPTS, PROMPT_TOKENS), generator=generator).tolist()
    new = max(1, min(NEW_TOKENS, sampler.context - PROMPT_TOKENS))
    made = sampler.draw(prompts, Drawing(1, policy.temperature, max_new_tokens=new), seed=0, ends=False)
    theirs_N = torch.tensor([value for sample in made for value in sample.logprobs])
    was_training = policy.training
    policy.eval()
    ours_N = policy.logprobs([Answer(sample.prompt_ids, sample.response_ids) for sample in made]).float().cpu()
    policy.train(was_training)
    apart_N = (theirs_N - ours_N).abs()
    mean, limit = apart_N.mean().item(), sampler.settings.tolerance or _tolerance(sampler, policy)
    if not mean <= limit:  # nan too
        worst = int(apart_N.nan_to_num(torch.inf).argmax())
        token = [token for sample in made for token in sample.response_ids][worst]
        raise ProbeError(
            f"after the update vLLM and the trainer have different policies: their log-probs are {mean:.3g} apart in "
            f"the mean over {len(apart_N)} tokens (generation.vllm.tolerance is {limit:g}), most at the token {token}: "
            f"{theirs_N[worst]:.4f} and {ours_N[worst]:.4f}. {_blame(sampler, policy)}"
        )
    return mean


def _tolerance(sampler: "VllmSampler", policy: LanguageModel) -> float:
    with policy.autocast():
        device = policy.device.type
        ours = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else causal_lm(policy.model).dtype
    both = {sampler.dtype, str(ours).removeprefix("torch.")}
    return max(TOLERANCE.get(name, TOLERANCE["bfloat16"]) for name in both)


def _blame(sampler: "VllmSampler", policy: LanguageModel) -> str:
    wrong, unknown = differing_weights(
        sampler.engine.weights(), sampler.engine.fused(), dict(weights_of(policy.model, adapted=sampler.adapted))
    )
    said = []
    if wrong:
        said.append(f"Weights that differ: {', '.join(wrong[:8])}{' ...' if len(wrong) > 8 else ''}.")
    if unknown:
        said.append(f"Not to be compared by name: {', '.join(unknown[:4])}{' ...' if len(unknown) > 4 else ''}.")
    if not wrong:
        said.append("No weight that could be compared differs: the engine computes with a packed copy, or otherwise.")
    return " ".join(said)
