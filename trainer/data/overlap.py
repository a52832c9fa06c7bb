"""Finds evaluation problems that are in the training data."""

import re
from collections.abc import Iterable

from ipvrm_core.trainer.data.example import Example

_IGNORED = re.compile(r"[\W_]+")


def overlap(train: Iterable[Example], test: Iterable[Example]) -> list[tuple[str, str]]:
    """(train id, test id) of every test problem whose prompt is also in train, letter case and punctuation aside.

    Prompts are compared as a whole, so load both sides with the same template or with none. Where train has a prompt
    several times, its first example is named.
    """
    first: dict[str, str] = {}
    for example in train:
        first.setdefault(_key(example), example.id)
    return [(first[_key(example)], example.id) for example in test if _key(example) in first]


def _key(example: Example) -> str:
    prompt = example.prompt
    if not isinstance(prompt, str):
        prompt = " ".join(message["content"] for message in prompt)
    # An arithmetic prompt is all signs: without them "1+2?" and "1-2?" would be one problem.
    return _IGNORED.sub(" ", prompt).strip().lower() if re.search(r"[^\W\d_]{2}", prompt) else prompt
