"""Models, data and trainers that the tests share, also in processes of their own."""

import hashlib
import random
from pathlib import Path

import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from ipvrm_core.integrations.trl import DistRL, DistRLTrainer
from ipvrm_core.trainer.config import Scratch
from ipvrm_core.trainer.data.tasks import ChainTask
from ipvrm_core.trainer.models import build_scratch, character_tokenizer

TASK = ChainTask(min_ops=1, max_ops=3)
VERSION = tuple(map(int, trl.__version__.split(".")[:2]))
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", *(["luspo"] if VERSION >= (1, 10) else []))
SMALL = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 8, "max_steps": 2}
CPU = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}


def save_models(folder: Path) -> dict[str, Path]:
    tokenizer = character_tokenizer(ChainTask.alphabet)
    paths = {}
    for seed, (name, kind) in enumerate((("tied", "qwen3"), ("untied", "llama"), ("reward", "qwen3"))):
        torch.manual_seed(seed)
        scratch = Scratch(architecture=kind, hidden_size=32, layers=2, heads=2, kv_heads=1, intermediate_size=64)
        model = build_scratch(scratch, tokenizer)
        if name == "untied":
            model.config.tie_word_embeddings = False
            model = type(model)(model.config)
        with torch.no_grad():  # at the usual initialisation all distributions are nearly uniform
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(4)
        paths[name] = folder / name
        model.save_pretrained(paths[name])
        tokenizer.save_pretrained(paths[name])
    return paths


def model_of(models, name: str):
    return AutoModelForCausalLM.from_pretrained(models[name])


def lora(model, *others: str):
    """Adapters "default" and others, all with a first value of their own."""
    torch.manual_seed(7)
    wrapped = get_peft_model(model, LoraConfig(**LORA))
    for other in others:
        wrapped.add_adapter(other, LoraConfig(**LORA))
    return wrapped


def reward(completions, gold, **_) -> list[float]:
    """A function of one's own over a column of one's own: how many different characters there are, and the gold one."""
    return [len(set(text)) / 10 + 0.5 * (digit in text) for text, digit in zip(completions, gold, strict=True)]


def dataset(count: int = 16) -> Dataset:
    examples = [TASK.example(0, "train", index) for index in range(count)]
    return Dataset.from_list([{"prompt": example.prompt, "gold": example.answer[-1]} for example in examples])


def rollouts(prompts, trainer) -> dict:
    """Answers that depend on the prompt and their place in the batch of all processes, not on the policy."""
    tokenizer = trainer.processing_class
    digits, out = tokenizer.convert_tokens_to_ids(list("0123456789=;#")), {"completion_ids": [], "env_mask": []}
    for place, prompt in enumerate(prompts, trainer.accelerator.process_index * len(prompts)):
        drawn = random.Random(hashlib.sha256(f"{prompt} {place}".encode()).digest())
        ids = [*drawn.choices(digits, k=drawn.randint(2, 7)), tokenizer.eos_token_id]
        out["completion_ids"].append(ids)
        out["env_mask"].append([1, *(drawn.randint(0, 1) for _ in ids[1:])])
    out["prompt_ids"] = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    out["logprobs"] = [[-2.9 - 0.1 * (t % 3) for t in range(len(ids))] for ids in out["completion_ids"]]
    return out


def build(models, folder, config=(), distrl=(), *, policy="tied", reward_model="reward", own=GRPOTrainer, **arguments):
    """DistRLTrainer of these settings, or with distrl=None TRL's own trainer."""
    settings = {**CPU, **SMALL, "learning_rate": 1e-2, **dict(config)}
    settings.setdefault("generation_batch_size", None)
    args = GRPOConfig(output_dir=str(folder / "out"), **settings)
    tokenizer = AutoTokenizer.from_pretrained(models["tied"])
    given = {
        "model": model_of(models, policy) if isinstance(policy, str) else policy,
        "reward_funcs": reward,
        "args": args,
        "train_dataset": dataset(),
        "processing_class": tokenizer,
        **arguments,
    }
    if distrl is None:
        return own(**given)
    made = model_of(models, reward_model) if reward_model in models else reward_model
    return DistRLTrainer(**given, reward_model=made, distrl=DistRL(**{"p_min": 0.05, **dict(distrl)}))


def weights(model) -> dict[str, torch.Tensor]:
    """Of a whole or sharded model, by name."""
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in model.named_parameters()
    }


def largest_difference(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def generated(trainer) -> dict:
    """TRL's batch of one generation, with the trainer in the state of its first training step."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    torch.manual_seed(0)
    return trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
