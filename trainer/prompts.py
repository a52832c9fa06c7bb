"""A problem as the token ids of a prompt."""

from ipvrm_core.trainer.chat_template import render_chat
from ipvrm_core.trainer.data.example import Example


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
