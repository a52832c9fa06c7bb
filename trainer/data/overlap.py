"""Finds evaluation problems that are in the training data."""

import re
from collections.abc import Iterable, Sequence

from ipvrm_core.trainer.data.example import Example

WORDS = 8  # a shorter problem must be the whole prompt: a few words prove nothing

_IGNORED = re.compile(r"[\W_]+")


def overlap(train: Iterable[Example], test: Iterable[Example]) -> dict[int, list[int]]:
    """{index in test: all its indices in train} of the test problems that are also in train, both in ascending order.

    A problem is the same when the prompts are equal or, from WORDS words on, when one contains the other: instructions
    around a problem do not hide it. Letter case and punctuation do not count; of chats the user's messages do.
    """
    places: dict[str, list[int]] = {}
    for i, example in enumerate(train):
        places.setdefault(normalised(example), []).append(i)
    train_texts, test_texts = list(places), [normalised(example) for example in test]
    found = {(j, text) for j, text in enumerate(test_texts) if text in places}
    found |= {(j, train_texts[i]) for j, i in _contained(test_texts, train_texts)}  # the test problem within a prompt
    found |= {(j, train_texts[i]) for i, j in _contained(train_texts, test_texts)}  # and the other way round
    shared: dict[int, list[int]] = {}
    for j, text in sorted(found):
        shared.setdefault(j, []).extend(places[text])
    return {j: sorted(indices) for j, indices in shared.items()}


def normalised(example: Example) -> str:
    """The prompt as words in lower case. An arithmetic prompt is all signs: "1+2?" and "1-2?" stay apart."""
    prompt = example.prompt
    if not isinstance(prompt, str):
        asked = [message["content"] for message in prompt if message["role"] == "user"]
        prompt = " ".join(asked or [message["content"] for message in prompt])
    return _IGNORED.sub(" ", prompt).strip().lower() if re.search(r"[^\W\d_]{2}", prompt) else prompt


def _contained(short: Sequence[str], long: Sequence[str]) -> Iterable[tuple[int, int]]:
    """(index in short, index in long) of every text that lies within a longer one, by whole words.

    The first WORDS words of every short text are looked up at every word of the long ones; what they find is compared.
    """
    heads: dict[str, list[int]] = {}
    for i, text in enumerate(short):
        words = text.split(" ", WORDS)
        if len(words) >= WORDS:
            heads.setdefault(" ".join(words[:WORDS]), []).append(i)
    for j, text in enumerate(long):
        words = text.split(" ")
        for first in range(len(words) - WORDS + 1):
            for i in heads.get(" ".join(words[first : first + WORDS]), ()):
                if f" {short[i]} " in f" {text} ":
                    yield i, j
