"""Numbers for docs/vllm.md: python -m tests.integrations.vllm.measure MODEL [DTYPE]

Time of a start, of an update and of answers, by vLLM and by transformers' generate; and how far log-probs are apart.
"""

import sys
import time

import torch
from transformers import AutoTokenizer

from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.config import Vllm
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.models import load_pretrained
from ipvrm_core.trainer.sampling.base import Drawing
from ipvrm_core.trainer.sampling.generate import Generate
from ipvrm_core.trainer.sampling.vllm import VllmSampler

QUESTION = "A farmer has {} hens. Each lays {} eggs a week. How many eggs are that in {} weeks? Think step by step."


def timed(name: str, function):
    start = time.perf_counter()
    result = function()
    print(f"{name}: {time.perf_counter() - start:.2f} s", flush=True)
    return result


@torch.no_grad()
def main(path: str, dtype: str = "float32") -> None:
    tokenizer = AutoTokenizer.from_pretrained(path)
    policy = LanguageModel(load_pretrained(path, dtype)).eval()
    questions = [[{"role": "user", "content": QUESTION.format(n + 3, n % 5 + 2, n % 4 + 2)}] for n in range(8)]
    prompts = [tokenizer.apply_chat_template(q, add_generation_prompt=True, return_dict=False) for q in questions]
    drawing = Drawing(4, 1.0, max_new_tokens=64)
    settings = Vllm(cache_gib=1.0, context=512)
    engine = timed("start", lambda: VllmSampler(policy, tokenizer, settings, batch=32, dtype=dtype))
    timed("update with its probe", lambda: engine.sync(policy))
    for name, sampler in (("vllm", engine), ("generate", Generate(policy, tokenizer, batch=32))):
        sampler.sample(prompts, Drawing(max_new_tokens=4))
        start = time.perf_counter()
        made = sampler.sample(prompts, drawing)
        seconds, tokens = time.perf_counter() - start, sum(len(sample.response_ids) for sample in made)
        ours_N = policy.logprobs([Answer(sample.prompt_ids, sample.response_ids) for sample in made]).float()
        apart_N = (ours_N - torch.tensor([value for sample in made for value in sample.logprobs])).abs()
        print(
            f"{name}: {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.0f} a second; log-probs "
            f"{apart_N.mean():.2e} from the trainer's in the mean, {apart_N.max():.2e} at most",
            flush=True,
        )
    engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
