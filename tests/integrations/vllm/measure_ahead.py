"""Numbers for docs/vllm.md: python -m tests.integrations.vllm.measure_ahead MODEL [NEW_TOKENS] [STEPS]

Seconds of an RL step that samples and then learns, and of one that samples the next batch while it learns. An answer
counts as right by the number of its characters: what is measured is time, and every prompt shall be mixed.
"""

import json
import sys
import tempfile
from pathlib import Path

from ipvrm_core.trainer.commands.main import main
from tests.integrations.vllm.measure import QUESTION


def judge(response: str, gold: str) -> bool:
    return len(response) % 2 == int(gold)


def measure(model: str, new_tokens: int = 48, steps: int = 4) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "questions.jsonl")
        rows = [{"prompt": QUESTION.format(n + 3, n % 5 + 2, n % 4 + 2), "answer": str(n % 2)} for n in range(64)]
        data.write_text("\n".join(map(json.dumps, rows)))
        for ahead in (False, True):
            words = [
                f"rl.x={{ahead = {str(ahead).lower()}, steps = {steps}, minibatch = 8, batch = "
                '{prompts = 2, keep_prompts = 2, rollouts = 8, too_few_mixed = "fill"}, optim = {lr = 1e-5}}',
                f'model.path="{model}"',
                f'data.path="{data}"',
                f'test.path="{data}"',
                f'verifier.kind="{__spec__.name}:judge"',
                'leakage.action="allow"',
                'device="cpu"',
                'generation.sampler="vllm"',
                "generation.batch=16",
                f"generation.max_new_tokens={new_tokens}",
                "generation.vllm={cache_gib = 1.0, context = 512}",
                "micro_batch_tokens=2048",
            ]
            run = Path(folder, f"ahead-{ahead}")
            config = Path(folder, "empty.toml")
            config.write_text("")
            assert main(["--traceback", "rl", str(config), *words, "--run", str(run)]) == 0
            lines = [json.loads(line) for line in (run / "rl/x/metrics.jsonl").read_text().splitlines()]
            for line in lines:
                names = ("step", "seconds", "staleness", "response_length", "mismatch", "mismatch_ess", "corrected")
                print({"ahead": ahead} | {name: round(line[name], 5) for name in names}, flush=True)


if __name__ == "__main__":
    measure(sys.argv[1], *map(int, sys.argv[2:]))
