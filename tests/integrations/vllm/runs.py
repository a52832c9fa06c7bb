"""Runs of the trainer from a configuration with `sampler = "vllm"`."""

import json
from pathlib import Path

from ipvrm_core.trainer.commands.main import main
from ipvrm_core.trainer.metrics import computed

CONFIG = """
name = "tiny"
device = "cpu"
checkpoint_every = 2
model.scratch = { hidden_size = 64, layers = 1, heads = 2, kv_heads = 2, intermediate_size = 128, context = 96 }
data = { task = "chain", task_args = { min_ops = 1, max_ops = 2 } }
test = { task = "chain", task_args = { min_ops = 1, max_ops = 2 } }
verifier = { kind = "exact" }
sft = { steps = 60, batch = 32, stop_accuracy = 0.05, optim = { lr = 1e-2, warmup = 5 } }
eval = { prompts = 64, samples = 2, traces = 8 }

[generation]
sampler = "vllm"
max_new_tokens = 20
batch = 64
vllm = { cache_gib = 0.05 }

[rl.grpo]
steps = 4
minibatch = 24
batch = { prompts = 12, keep_prompts = 4, rollouts = 8 }
optim = { lr = 5e-4 }
"""


class Runs:
    def __init__(self, folder: Path, config: str = CONFIG):
        self.folder, self.config = folder, folder / "tiny.toml"
        self.config.write_text(config)

    def does(self, phase: str, run: str, *more: str) -> int:
        return main(["--traceback", phase, str(self.config), "--run", str(self.folder / run), *more])

    def lines(self, run: str, phase: str) -> list[dict]:
        rows = (self.folder / run / phase / "metrics.jsonl").read_text().splitlines()
        return [computed(json.loads(row)) for row in rows]
