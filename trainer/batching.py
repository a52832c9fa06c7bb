"""From token lists to model inputs and back to packed rows: the one place where padding lives.

Shape letters: B sequences, L padded length, N response tokens, D hidden size.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ipvrm_core.packing import cu_seqlens_from_lengths


class Answer(NamedTuple):
    """Token ids of a prompt and of a response (EOS included where the response ended)."""

    prompt_ids: list[int]
    response_ids: list[int]


class TokenBatch(NamedTuple):
    """Right-padded inputs and where the response rows are in them."""

    ids_BL: Tensor
    mask_BL: Tensor
    rows_N: Tensor  # index into [B * L]: the position whose hidden state predicts (or has read) each response token
    targets_N: Tensor  # the response tokens
    cu_seqlens: Tensor

    @classmethod
    def make(
        cls,
        answers: Sequence[Answer],
        device: torch.device | str = "cpu",
        *,
        after: bool = False,
        unseen: int | None = None,
    ) -> "TokenBatch":
        """after: rows of the hidden states that have read their response token, instead of those that predict it.

        unseen: a token that is masked like padding wherever it stands.
        """
        if any(not answer.prompt_ids or not answer.response_ids for answer in answers):
            raise ValueError("prompt and response must both have at least one token")
        last = 0 if after else 1  # nothing is predicted after the last token, but it can be scored
        L = max(len(a.prompt_ids) + len(a.response_ids) for a in answers) - last
        ids_BL = torch.zeros(len(answers), L, dtype=torch.int64)
        mask_BL = torch.zeros(len(answers), L, dtype=torch.int64)
        rows = []
        for b, answer in enumerate(answers):
            tokens = answer.prompt_ids + answer.response_ids
            tokens = tokens[: len(tokens) - last]
            ids_BL[b, : len(tokens)] = torch.tensor(tokens)
            mask_BL[b, : len(tokens)] = 1
            rows.append(torch.arange(len(answer.prompt_ids) - last, len(tokens)) + b * L)
        if unseen is not None:
            mask_BL *= ids_BL != unseen
        targets_N = torch.tensor([token for answer in answers for token in answer.response_ids])
        lengths_B = torch.tensor([len(answer.response_ids) for answer in answers])
        made = cls(ids_BL, mask_BL, torch.cat(rows), targets_N, cu_seqlens_from_lengths(lengths_B))
        return cls(*(tensor.to(device) for tensor in made))


def micro_batches(answers: Sequence[Answer], max_tokens: int) -> Iterator[slice]:
    """Consecutive slices whose padded size stays within `max_tokens` (a single longer sequence goes alone)."""
    start, longest = 0, 0
    for end, answer in enumerate(answers):
        longest = max(longest, len(answer.prompt_ids) + len(answer.response_ids))
        if end > start and longest * (end + 1 - start) > max_tokens:
            yield slice(start, end)
            start, longest = end, len(answer.prompt_ids) + len(answer.response_ids)
    if start < len(answers):
        yield slice(start, len(answers))
