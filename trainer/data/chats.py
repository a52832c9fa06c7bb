"""Reads chats for reward models: single answers with a label, or a chosen and a rejected answer to one prompt."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ipvrm_core.trainer.data.example import Message
from ipvrm_core.trainer.data.files import as_messages, cell, read_rows
from ipvrm_core.trainer.seeds import stable_seed

if TYPE_CHECKING:  # the configuration is made of what stands here
    from ipvrm_core.trainer.config import Chats

Prompt = tuple[Message, ...]


@dataclass(frozen=True)
class Chat:
    """One answer to one prompt. The two answers of a row of pairwise data share `row`, the chosen one first."""

    row: int
    prompt: Prompt
    answer: str
    correct: bool

    @property
    def id(self) -> str:
        return f"row {self.row}"


def load_chats(source: "Chats") -> list[Chat]:
    """All answers in the order of the data; ValueError with the row number (from 0) for anything amiss."""
    read = _pointwise if source.kind == "pointwise" else _pairwise
    rows = read_rows(source.path, source.split, source.config, source.limit)
    chats = [chat for index, row in enumerate(rows) for chat in read(row, index, source)]
    if not chats:
        raise ValueError(f"{source.path} has no rows")
    return chats


def _pointwise(row: Mapping[str, Any], index: int, source: "Chats") -> Iterable[Chat]:
    where = f"{source.path}, row {index}"
    prompt, answer = _conversation(row, source.conversation_column, where)
    label = cell(row, source.label_column, where)
    if not isinstance(label, bool | int | float) or label not in (0, 1):
        raise ValueError(f"{where}, column {source.label_column!r}: a label must be 0 or 1; got {label!r}")
    return (Chat(index, prompt, answer, bool(label)),)


def _pairwise(row: Mapping[str, Any], index: int, source: "Chats") -> Iterable[Chat]:
    where = f"{source.path}, row {index}"
    prompt, chosen = _conversation(row, source.chosen_column, where)
    other, rejected = _conversation(row, source.rejected_column, where)
    columns = f"columns {source.chosen_column!r} and {source.rejected_column!r}"
    if prompt_key(prompt) != prompt_key(other):
        raise ValueError(f"{where}, {columns}: the two answers of a pair must have the same prompt; they differ")
    if chosen == rejected:
        raise ValueError(f"{where}, {columns}: the two answers of a pair must differ; got {chosen[:80]!r} twice")
    return Chat(index, prompt, chosen, True), Chat(index, prompt, rejected, False)


def _conversation(row: Mapping[str, Any], column: str, where: str) -> tuple[Prompt, str]:
    """(messages before the answer, the answer)"""
    place, value = f"{where}, column {column!r}", cell(row, column, where)
    if not isinstance(value, list):
        raise ValueError(f"{place}: expected a list of messages; got {type(value).__name__}")
    *prompt, last = as_messages(value, place)
    if last["role"] != "assistant":
        raise ValueError(f"{place}: the last message must be the assistant's answer; got the role {last['role']!r}")
    if not last["content"].strip():
        raise ValueError(f"{place}: the answer is empty")
    if not any(message["role"] == "user" and message["content"].strip() for message in prompt):
        raise ValueError(f"{place}: there must be a user's message before the answer; got none with text")
    return tuple(prompt), last["content"]


def prompt_key(prompt: Prompt) -> tuple[tuple[str, str], ...]:
    """What makes two prompts the same: role and text of every message, white space around it aside."""
    return tuple((message["role"], message["content"].strip()) for message in prompt)


def by_prompt(chats: Sequence[Chat]) -> list[list[Chat]]:
    """The answers of each prompt together, prompts in the order of their first answer."""
    groups: dict[tuple, list[Chat]] = {}
    for chat in chats:
        groups.setdefault(prompt_key(chat.prompt), []).append(chat)
    return list(groups.values())


def held_out(groups: Sequence[Sequence[Chat]], share: float) -> set[int]:
    """Which groups are for validation: `share` of them, at least one if share > 0, chosen by the prompts' text alone.

    The order of the rows, other columns and the seed of a run do not matter. ValueError where nothing is left to train.
    """
    if not share:
        return set()
    count = max(1, round(share * len(groups)))
    if count >= len(groups):
        raise ValueError(f"validation = {share} keeps {count} of {len(groups)} prompts: none is left to train on")
    seeds = [stable_seed("held out", prompt_key(group[0].prompt)) for group in groups]
    return set(sorted(range(len(groups)), key=lambda index: seeds[index])[:count])
