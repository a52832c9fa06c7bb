"""Logits outside the set that a sampler draws from become -inf: what is left is the softmax over the set.

Each rule of types.Truncation keeps the logits from some value on, so together they are one threshold a row.

Shape letters: N rows (those of one chunk), B rows at a time, V vocabulary, k largest logits.
"""

import math

import torch
from torch import Tensor

from ipvrm_core.types import Truncation

BYTES_PER_LOGIT = 32  # a sort with its indices, exponentials, and their running sum in float64


def truncate_(logits_NV: Tensor, truncation: Truncation, rows: int) -> None:
    """In place, so many rows at a time; `logits` are those after the temperature."""
    for logits_BV in logits_NV.split(rows):
        logits_BV.masked_fill_(logits_BV < _threshold(logits_BV, truncation), -math.inf)


def _threshold(logits_BV: Tensor, truncation: Truncation) -> Tensor:
    """The least logit that stays, [B, 1]. NaN in a row makes it NaN, of which nothing is below."""
    top_k, top_p, min_p = truncation.top_k, truncation.top_p, truncation.min_p
    max_B1 = logits_BV.amax(-1, keepdim=True)
    least_B1 = torch.full_like(max_B1, -math.inf) if min_p is None else max_B1 + math.log(min_p)
    if top_k is None and top_p is None:
        return least_B1
    if top_k is None:
        largest_Bk = logits_BV.sort(descending=True).values
    else:
        largest_Bk = logits_BV.topk(min(top_k, logits_BV.shape[1])).values
        least_B1 = torch.maximum(least_B1, largest_Bk[:, -1:])
    if top_p is None or top_p == 1:
        return least_B1
    # float64: a running sum of 1e5 float32 terms would move the border by more than the terms there.
    e_Bk, e_BV = (
        (x - max_B1).exp_().masked_fill_(x < least_B1, 0.0) for x in (largest_Bk, logits_BV)
    )  # the k-th value may occur more often than among the k
    before_Bk = e_Bk.cumsum(-1, dtype=torch.float64).sub_(e_Bk)
    kept_B1 = (before_Bk < top_p * e_BV.sum(-1, keepdim=True, dtype=torch.float64)).sum(-1, keepdim=True)
    return torch.maximum(least_B1, largest_Bk.gather(1, kept_B1.clamp_(min=1) - 1))
