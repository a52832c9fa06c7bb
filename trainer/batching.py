"""From token lists to model inputs and back to packed rows: the one place where padding lives.

Shape letters: B sequences, L length of a row, N response tokens.
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
    """Inputs, right-padded or packed, and where the response rows are in them."""

    ids_BL: Tensor  # packed: [1, L], the sequences end to end
    mask_BL: Tensor | None  # packed: None
    rows_N: Tensor  # index into [B * L]: the position whose hidden state predicts (or has read) each response token
    targets_N: Tensor  # the response tokens
    cu_seqlens: Tensor
    positions_1L: Tensor | None = None  # packed: of each token in its own sequence
    bounds: Tensor | None = None  # packed: where the B sequences begin, and L: [1, 1, 1, B + 1], on the CPU

    @classmethod
    def make(
        cls,
        answers: Sequence[Answer],
        device: torch.device | str = "cpu",
        *,
        after: bool = False,
        unseen: int | None = None,
        packed: bool = False,
    ) -> "TokenBatch":
        """after: rows of the hidden states that have read their response token, instead of those that predict it.

        unseen: a token that is masked like padding wherever it stands. packed: sequences in one row, without padding.
        """
        if any(not answer.prompt_ids or not answer.response_ids for answer in answers):
            raise ValueError("prompt and response must both have at least one token")
        if packed and unseen is not None:
            raise ValueError(f"a packed batch has no mask to hide a token in; got unseen = {unseen}")
        last = 0 if after else 1  # nothing is predicted after the last token, but it can be scored
        whole = [answer.prompt_ids + answer.response_ids for answer in answers]
        sequences = [torch.tensor(tokens[: len(tokens) - last]) for tokens in whole]
        lengths_B = torch.tensor([len(tokens) for tokens in sequences])
        bounds = cu_seqlens_from_lengths(lengths_B)
        L = int(lengths_B.max())
        starts = bounds[:-1].tolist() if packed else [b * L for b in range(len(answers))]
        prompts_B = [len(answer.prompt_ids) - last for answer in answers]
        pieces = zip(starts, prompts_B, lengths_B.tolist(), strict=True)
        rows_N = torch.cat([start + torch.arange(prompt, length) for start, prompt, length in pieces])
        targets_N = torch.tensor([token for answer in answers for token in answer.response_ids])
        cu_seqlens = cu_seqlens_from_lengths(torch.tensor([len(answer.response_ids) for answer in answers]))
        if packed:
            positions_1L = torch.cat([torch.arange(length) for length in lengths_B.tolist()])[None]
            made = cls(torch.cat(sequences)[None], None, rows_N, targets_N, cu_seqlens, positions_1L)
            return made._to(device)._replace(bounds=bounds[None, None, None])
        ids_BL = torch.zeros(len(answers), L, dtype=torch.int64)
        for b, tokens in enumerate(sequences):
            ids_BL[b, : len(tokens)] = tokens
        mask_BL = (torch.arange(L) < lengths_B[:, None]).long()
        if unseen is not None:
            mask_BL *= ids_BL != unseen
        return cls(ids_BL, mask_BL, rows_N, targets_N, cu_seqlens)._to(device)

    def _to(self, device: torch.device | str) -> "TokenBatch":
        return TokenBatch(*(None if tensor is None else tensor.to(device) for tensor in self))


def micro_batches(
    answers: Sequence[Answer], max_tokens: int, *, unit: int = 1, packed: bool = False
) -> Iterator[slice]:
    """Consecutive slices whose size, padding included unless packed, stays within `max_tokens`.

    unit: so many answers stay together, and go alone where they are larger.
    """
    start, longest, tokens = 0, 0, 0
    for end in range(0, len(answers), unit):
        lengths = [len(answer.prompt_ids) + len(answer.response_ids) for answer in answers[end : end + unit]]
        longest, tokens = max(longest, *lengths), tokens + sum(lengths)
        if end > start and (tokens if packed else longest * (end + unit - start)) > max_tokens:
            yield slice(start, end)
            start, longest, tokens = end, max(lengths), sum(lengths)
    if start < len(answers):
        yield slice(start, len(answers))
