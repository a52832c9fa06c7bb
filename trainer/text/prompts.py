"""A problem as the token ids of a prompt, and an answer as those of a response."""

from dataclasses import dataclass
from typing import Any

from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.data.example import Example
from ipvrm_core.trainer.text.template import render_chat


def encode_prompt(tokenizer, example: Example, system_prompt: str | None = None) -> list[int]:
    """Token ids up to where the answer starts; through the chat template where there is one.

    Without a chat template a chat of one user message is plain text; any other is a ValueError.
    """
    is_text = isinstance(example.prompt, str)
    messages = [{"role": "user", "content": example.prompt}] if is_text else [*example.prompt]
    if not tokenizer.chat_template:
        if len(messages) > 1 or messages[0]["role"] != "user":
            raise ValueError(f"example {example.id} is a chat, but the tokenizer has no chat template")
        return tokenizer(messages[0]["content"])["input_ids"]
    if system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    text = render_chat(tokenizer, messages, f"example {example.id}", add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@dataclass(frozen=True)
class Text:
    """A tokenizer and what stands around a problem."""

    tokenizer: Any
    system_prompt: str | None = None

    def prompt_ids(self, example: Example) -> list[int]:
        """Token ids up to where the answer starts; through the chat template where there is one."""
        return encode_prompt(self.tokenizer, example, self.system_prompt)

    def answer_ids(self, text: str) -> list[int]:
        """Token ids of an answer, EOS included."""
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def demonstration(self, example: Example) -> Answer:
        """The example's solution as an answer to learn from."""
        if example.solution is None:
            raise ValueError(f"example {example.id} has no solution to learn from")
        return Answer(self.prompt_ids(example), self.answer_ids(example.solution))
