"""Chats as text. A chat template is a program that comes with the model: it has a limit of time, memory and text."""

from collections.abc import Sequence

from ipvrm_core.trainer.data.example import Message
from ipvrm_core.trainer.limits import limited

SECONDS, GIB, CHARACTERS = 10.0, 1.0, 10_000_000


def render_chat(tokenizer, messages: Sequence[Message], where: str, **settings) -> str:
    """The conversation through the tokenizer's chat template.

    ValueError, which names `where`, for a template that fails, takes too long or makes too much of it.
    """
    try:
        with limited(SECONDS, GIB):
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, **settings)
    except Exception as error:  # a program of somebody else's: it may raise anything
        said = str(error) or type(error).__name__
        raise ValueError(f"{where}: the chat template refuses the conversation: {said}") from error
    if len(text) > CHARACTERS:
        raise ValueError(f"{where}: the chat template makes {len(text)} characters of it, more than {CHARACTERS}")
    return text
