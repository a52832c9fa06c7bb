"""What a pass really takes: made with random weights in a fresh process, on the device at hand.

On a GPU the peak of torch's allocator. On a CPU the peak of the resident memory above what it was after the imports and
a first small step, with every allocation of 64 KiB or more its own mapping, so that what is freed is given back.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def measure(config_json: Path, sizes: dict, phase: str, name: str) -> int:
    """Bytes at the peak of this pass. RuntimeError with the last words of a process that failed."""
    words = [sys.executable, "-m", __name__, str(config_json), json.dumps(sizes), phase, name]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **MALLOC})
    if done.returncode:
        raise RuntimeError(f"{phase}, {name}: not measured: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _main(config_json: str, sizes_json: str, phase_name: str, pass_name: str) -> None:
    import torch

    from ipvrm_core.trainer import config as configuration
    from ipvrm_core.trainer.config import Optim
    from ipvrm_core.trainer.files import read_json
    from ipvrm_core.trainer.optim import apply_step
    from ipvrm_core.trainer.plan.blank import Blank
    from ipvrm_core.trainer.plan.passes import Sizes, phases
    from ipvrm_core.trainer.preflight import tokenizer_of

    config = configuration.check(read_json(Path(config_json)), config_json)
    device = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
    _first_step(device)
    tokenizer = tokenizer_of(config)
    sizes = {key: Sizes(*value) for key, value in json.loads(sizes_json).items()}
    before = _status("VmRSS")
    phase = phases(config, sizes)[phase_name](Blank(config, tokenizer, device))
    for optimizer in phase.optimizers:  # its state
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        apply_step(optimizer, Optim(lr=1e-12), 1, 1)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    phase.passes[pass_name].model.train(phase.passes[pass_name].kind == "train")
    _run(phase, phase.passes[pass_name], tokenizer)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM") - before
    print(peak)


def _first_step(device) -> None:
    """Packages, threads and whatever else the first use brings: a step of a tiny model with adapters."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from ipvrm_core.trainer.batching import Answer
    from ipvrm_core.trainer.config import Lora, Optim
    from ipvrm_core.trainer.language_model import LanguageModel
    from ipvrm_core.trainer.models import add_lora
    from ipvrm_core.trainer.optim import apply_step, make_optimizer

    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    config = Qwen3Config(vocab_size=32, hidden_size=32, num_hidden_layers=1, **heads)
    model = LanguageModel(add_lora(Qwen3ForCausalLM(config), Lora(rank=2)).to(device).train())
    optimizer = make_optimizer(model.model, Optim())
    model.batch_logprobs(model.batch([Answer([1], [2, 3])])).sum().backward()
    apply_step(optimizer, Optim(), 1, 1)


def _run(phase, each, tokenizer) -> None:
    import torch

    from ipvrm_core.trainer.sampling.base import Drawing
    from ipvrm_core.trainer.sampling.generate import Generate

    if each.kind == "generate":
        samples = min(each.samples, each.answers)
        prompts = [[2 + index % 2] * each.sizes.prompt for index in range(each.answers // samples)]  # no two alike
        prompts[0] = prompts[0][1:] or prompts[0]  # so that there is padding to mask
        drawing = Drawing(samples, max_new_tokens=each.sizes.response)
        Generate(each.model, tokenizer, each.answers).sample(prompts, drawing)
        return
    for _ in range(2 if each.kind == "train" and each.accumulates else 1):
        batch = each.model.batch(each.micro_batch(), after=each.after)
        if each.kind == "train":
            each.function(batch).backward()
        else:
            with torch.no_grad():
                each.function(batch)


if __name__ == "__main__":
    _main(*sys.argv[1:])
