"""What can be known at the start is checked at the start, before a run folder is made and hours are spent."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from ipvrm_core.trainer import models
from ipvrm_core.trainer.config import Config, ConfigError, Scratch, Source
from ipvrm_core.trainer.data.example import Example
from ipvrm_core.trainer.data.sources import read_source
from ipvrm_core.trainer.data.tasks import make_task
from ipvrm_core.trainer.sampling.engine import check_installed
from ipvrm_core.trainer.text.prompts import encode_prompt
from ipvrm_core.trainer.verify import JUDGES
from ipvrm_core.trainer.verify.worker import load_judge

LONGEST = 100  # prompts of a source that are encoded, the longest by their characters


def preflight(config: Config, run: Path) -> None:
    """ConfigError for a judge, a sampler or layers that this machine cannot have, for sizes beyond it and, where `run`
    is new, for prompts that leave the model no positions for their answers. Data that cannot be read raise as later on.
    """
    check_judge(config.verifier.kind)
    if config.generation.sampler == "vllm":
        check_installed()
    if config.model.liger:
        check_liger(config)
    check_sizes(config)
    if not (run / "config.json").exists():
        check_prompts(config)


def check_judge(kind: str) -> None:
    path = JUDGES.get(kind, kind)
    if ":" not in path:
        return
    try:
        load_judge(path)
    except (Exception, SystemExit) as error:  # a module of somebody else's: it may raise anything
        raise ConfigError(f"verifier.kind = {kind!r} cannot be imported: {type(error).__name__}: {error}") from error


def check_liger(config: Config) -> None:
    missing = models.why_not_liger(on_gpu=config.device != "cpu" and torch.cuda.is_available())
    if missing:
        raise ConfigError(f"model.liger = true needs {missing}")


def check_sizes(config: Config) -> None:
    """What must be in memory at once, at the least: 16 bytes a trained parameter, 8 a token of a batch of answers."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for key, size in _least_bytes(config):
        if size > memory:
            raise ConfigError(
                f"{key} is beyond this machine: at least {size / 2**30:.3g} GiB at once; it has {memory / 2**30:.3g}"
            )


def _least_bytes(config: Config) -> Iterator[tuple[str, int]]:
    if config.model.scratch:
        yield "model.scratch", 16 * _parameters(config.model.scratch)
    tokens = config.generation.max_new_tokens
    if config.rollout:
        yield "rollout.batch x rollout.samples", 8 * config.rollout.batch * config.rollout.samples * tokens
    for name, rl in config.rl.items():
        yield f"rl.{name}.batch.prompts x rollouts", 8 * rl.batch.prompts * rl.batch.rollouts * tokens
    if config.test:
        yield "eval.prompts x eval.samples", 8 * config.eval.prompts * config.eval.samples * tokens


def _parameters(scratch: Scratch) -> int:
    """Without the embedding, which is small for characters."""
    attention = 2 * scratch.hidden_size**2 * (scratch.heads + scratch.kv_heads) // scratch.heads
    return scratch.layers * (attention + 3 * scratch.hidden_size * scratch.intermediate_size)


def check_prompts(config: Config) -> None:
    """ConfigError unless prompt and answer fit the model's positions, for every source that is answered."""
    if not _answered(config):
        return
    limit, new_tokens = models.positions(config.model), config.generation.max_new_tokens
    for key, (tokens, longest) in longest_prompts(config, tokenizer_of(config)).items():
        if limit and tokens + new_tokens > limit:
            raise ConfigError(
                f"{key}: the prompt of {longest} has {tokens} tokens; with generation.max_new_tokens = {new_tokens} "
                f"that is more than the {limit} that the model has positions for"
            )


def tokenizer_of(config: Config):
    task = config.task
    return models.load_tokenizer(config.model, make_task(task, **config.data.task_args).alphabet if task else None)


def longest_prompts(config: Config, tokenizer) -> dict[str, tuple[int, str]]:
    """{key: (tokens of the longest prompt, its id)} of every source that is answered."""
    return {
        key: max(
            (len(encode_prompt(tokenizer, example, config.model.system_prompt)), example.id)
            for example in _longest(source)
        )
        for key, source in _answered(config).items()
    }


def _answered(config: Config) -> dict[str, Source]:
    """{key: source} of the prompts that a policy will answer."""
    sampled = config.rollout or config.rl or (config.sft and config.sft.stop_accuracy)
    found = {"data": config.data if sampled else None, "test": config.test}
    found |= {f"eval.benchmarks.{name}": source for name, source in config.eval.benchmarks.items()}
    return {key: source for key, source in found.items() if source}


def _longest(source: Source) -> list[Example]:
    if source.task:
        return make_task(source.task, **source.task_args).examples(0, "test", 0, LONGEST)
    return sorted(read_source(source), key=_characters)[-LONGEST:]


def _characters(example: Example) -> int:
    prompt = example.prompt
    return len(prompt) if isinstance(prompt, str) else sum(len(message["content"]) for message in prompt)
