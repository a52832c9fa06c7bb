"""How long prompts and answers get: read from the data, or told."""

from ipvrm_core.trainer.config import Config, ConfigError, Source
from ipvrm_core.trainer.data.sources import read_source
from ipvrm_core.trainer.data.tasks import make_task
from ipvrm_core.trainer.plan.passes import Sizes
from ipvrm_core.trainer.preflight import LONGEST, longest_prompts
from ipvrm_core.trainer.text import Text


def longest(config: Config, tokenizer, prompt: int | None = None) -> dict[str, Sizes]:
    """{"sampled" | "sft" | "rm.<name>": the longest prompt and answer}. prompt: tokens, where the data are not at hand.

    Sampled answers have generation.max_new_tokens, chats all of their max_tokens; a demonstration is as long as the
    longest of the data, or where they are not at hand as an answer.
    """
    new = config.generation.max_new_tokens
    if prompt is None:
        prompt = max((tokens for tokens, _ in longest_prompts(config, tokenizer).values()), default=0)
        demonstrations = _demonstrations(config, tokenizer)
    else:
        demonstrations = Sizes(prompt, new) if config.sft else None
    if not prompt and config.data:
        raise ConfigError("no prompt is read by any phase: say --prompt-tokens")
    sampled = Sizes(max(prompt, 1), new)
    found = {"sampled": sampled} | ({"sft": demonstrations} if demonstrations else {})
    for name, rm in config.rm.items():
        half = rm.data.max_tokens // 2 if rm.data else 0
        found[f"rm.{name}"] = Sizes(half, rm.data.max_tokens - half) if rm.data else sampled
    return found


def _demonstrations(config: Config, tokenizer) -> Sizes | None:
    if config.sft is None:
        return None
    text = Text(tokenizer, config.model.system_prompt)
    source = config.sft.data or config.data
    examples = sorted(_examples(source), key=lambda example: len(example.solution or ""))[-LONGEST:]
    return max((Sizes(*map(len, text.demonstration(example))) for example in examples), key=sum)


def _examples(source: Source) -> list:
    if source.task:
        return make_task(source.task, **source.task_args).examples(0, "test", 0, LONGEST)
    return read_source(source)
