"""Padded against packed micro-batches: processor seconds and memory of forward and backward.

python -m tests.trainer.packing_speed OUT.json     # each way in processes of its own, one after the other

Lengths as of a 0.6B model on school mathematics: prompts of 60 to 180 tokens, answers log-normal with a median of 180
and a tail up to 1,024; micro-batches in the order they come in, as in training.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

MODEL = {"hidden_size": 384, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 3}
SETTINGS = {"answers": 24, "max_tokens": 4096, "vocabulary": 16000, "rounds": 2, **MODEL}


def answers(count: int):
    import torch

    from ipvrm_core.trainer.batching import Answer

    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(60, 181, (count,), generator=generator).tolist()
    draws = torch.randn(count, generator=generator)
    responses = (180 * (0.6 * draws).exp()).clamp(8, 1024).long().tolist()
    return [Answer([1] * prompt, [2] * response) for prompt, response in zip(prompts, responses, strict=True)]


def run(packed: bool) -> dict:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from ipvrm_core.trainer.language_model import LanguageModel
    from ipvrm_core.trainer.models import can_pack
    from ipvrm_core.trainer.plan.measure import _first_step, _status

    _first_step(torch.device("cpu"))
    torch.manual_seed(0)
    sizes = {"vocab_size": SETTINGS["vocabulary"], "intermediate_size": 1152, "head_dim": 64}
    model = Qwen3ForCausalLM(Qwen3Config(**MODEL, **sizes)).train()
    if packed:
        can_pack(model)
    made = LanguageModel(model, packed=packed, max_tokens=SETTINGS["max_tokens"])
    given = answers(SETTINGS["answers"])
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    seconds = []
    for _ in range(SETTINGS["rounds"]):
        start = time.process_time()
        total = 0.0
        for part in made.parts(given):
            loss = made.batch_logprobs(made.batch(given[part])).sum()
            loss.backward()
            total += loss.item()
        seconds.append(time.process_time() - start)
    tokens = sum(len(answer.prompt_ids) + len(answer.response_ids) for answer in given)
    rows = [made.batch(given[part]).ids_BL.numel() for part in made.parts(given)]
    return {
        "packed": packed,
        "seconds": seconds,
        "peak_bytes": _status("VmHWM") - before,
        "tokens": tokens,
        "tokens_with_padding": sum(rows),
        "micro_batches": len(rows),
        "loss": total,
    }


def main(out: str) -> None:
    from ipvrm_core.trainer.plan.measure import MALLOC

    found = []
    for packed in (False, True, False, True):
        words = [sys.executable, "-m", __spec__.name, "--packed" if packed else "--padded"]
        done = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ, **MALLOC})
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(found[-1], flush=True)
    Path(out).write_text(json.dumps({"settings": SETTINGS, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1].startswith("--"):
        print(json.dumps(run(sys.argv[1] == "--packed")))
    else:
        main(sys.argv[1])
