"""The tokens that a built-in task demands of an answer: what credit can be held against.

Shape letters: N packed response tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ipvrm_core.trainer.data.example import Example
from ipvrm_core.trainer.data.tasks.base import Task
from ipvrm_core.trainer.text import Text


def due_tokens(task: Task, text: Text, examples: Sequence[Example], responses: Sequence[list[int]]) -> Tensor:
    """The due token id of every packed response token, -1 where the task does not determine it: [N]."""
    due = []
    for example, ids in zip(examples, responses, strict=True):
        row = [-1] * len(ids)
        starts = _starts(text, ids)
        for position, character in task.due_positions(example, text.decode(ids)):
            if position in starts:
                row[starts[position]] = text.tokenizer.convert_tokens_to_ids(character)
        due += row
    return torch.tensor(due)


def _starts(text: Text, ids: list[int]) -> dict[int, int]:
    """{offset in the decoded text: the token that begins there}."""
    special = set(text.tokenizer.all_special_ids)
    pieces = {token: text.decode([token]) for token in set(ids)}
    if "".join(pieces[token] for token in ids) == text.decode(ids):
        offsets, at = [], 0
        for token in ids:
            offsets.append(at)
            at += len(pieces[token])
    else:  # what a token adds to a text may depend on those before it
        offsets = [len(text.decode(ids[:t])) for t in range(len(ids))]
    return {offset: t for t, (offset, token) in enumerate(zip(offsets, ids, strict=True)) if token not in special}
