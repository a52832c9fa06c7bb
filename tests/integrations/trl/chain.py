"""30 steps of DistRL in TRL on the demo's task, from the demo's start and reward model; by hand (docs/results/trl.md).

python -m tests.integrations.trl.chain START REWARD_MODEL OUT [MODEL...]: prints the accuracy of START, of other MODELs
(our own trainer's, after as many steps) and of what TRL makes of START, on the same test problems.
"""

import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

from ipvrm_core.integrations.trl import DistRL, DistRLTrainer
from ipvrm_core.trainer.data.tasks import ChainTask

TASK = ChainTask(min_ops=4, max_ops=8)
STEPS, PROMPTS, SAMPLES, TEST = 30, 16, 8, 256


def right(completions, gold, **_) -> list[float]:
    """Exact: the answer ends in "#" and the gold digit."""
    return [float(text.rpartition("#")[2] == digit) for text, digit in zip(completions, gold, strict=True)]


def examples(split: str, count: int) -> list:
    return [TASK.example(1, split, index) for index in range(count)]


def train(start: str, reward_model: str, out: str) -> torch.nn.Module:
    rows = [{"prompt": one.prompt, "gold": one.answer[-1]} for one in examples("train", STEPS * PROMPTS)]
    args = GRPOConfig(
        output_dir=out,
        max_steps=STEPS,
        per_device_train_batch_size=PROMPTS * SAMPLES,
        num_generations=SAMPLES,
        max_completion_length=64,
        learning_rate=1e-4,
        warmup_steps=5,
        lr_scheduler_type="constant_with_warmup",
        loss_type="grpo",
        epsilon_high=0.28,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
    )
    distrl = DistRL(process_normalize="batch", process_coef=0.05, alpha=1.0, online="before", learning_rate=1e-4)
    trainer = DistRLTrainer(
        model=start,
        reward_funcs=right,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(start),
        reward_model=reward_model,
        distrl=distrl,
    )
    trainer.train()
    return trainer.model.eval()


@torch.no_grad()
def accuracy(model, tokenizer) -> float:
    """Of four sampled answers to each test problem."""
    torch.manual_seed(0)
    found = []
    problems = examples("test", TEST)
    for part in (problems[first : first + 64] for first in range(0, TEST, 64)):
        prompts = tokenizer([one.prompt for one in part], return_tensors="pt", padding=True, padding_side="left")
        how = {"max_new_tokens": 64, "do_sample": True, "top_k": 0, "num_return_sequences": 4}
        ids = model.generate(**prompts, **how)[:, prompts.input_ids.shape[1] :]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        found += right(texts, [one.answer[-1] for one in part for _ in range(4)])
    return sum(found) / len(found)


if __name__ == "__main__":
    start, reward_model, out, *others = sys.argv[1:]
    torch.set_num_threads(1)
    tokenizer, load = AutoTokenizer.from_pretrained(start), AutoModelForCausalLM.from_pretrained
    for path in (start, *others):
        print(path, accuracy(load(path).eval(), tokenizer), flush=True)
    print("TRL + DistRL", accuracy(train(start, reward_model, out), tokenizer))
