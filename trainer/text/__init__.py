"""Text and tokens, in one place: prompts, answers and the steps of answers, through the tokenizer's chat template."""

from ipvrm_core.trainer.text.prompts import Text, encode_prompt

__all__ = ["Text", "encode_prompt"]
