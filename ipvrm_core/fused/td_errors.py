"""TD errors at given ids, from the reward model's hidden states and the old log-probs. No gradient.

Shape letters: N rows, D hidden size, V vocabulary, K ids a row.
"""

import torch
from torch import Tensor

from ipvrm_core.fused.head import wide_dtype
from ipvrm_core.fused.rows import row_work
from ipvrm_core.fused.shard import unpacked
from ipvrm_core.fused.transform import LogitTransform


@torch.library.custom_op("ipvrm::linear_td_errors", mutates_args=())
def linear_td_errors(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    ids: Tensor,
    old_logprobs: Tensor,
    beta: float,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
    shard: str,
    max_buffer_bytes: int,
    triton: bool,
) -> Tensor:
    """beta (log pi(id | s) - old) [N, K], 0 at padding (id < 0). With weight=None `hidden` is x [N, V]."""
    transform = LogitTransform(temperature, temperatures, softcap)
    near_N = old_logprobs[:, 0] if ids.shape[1] else None  # the reward model is near the old policy
    work = row_work(triton, hidden, weight, bias, transform, max_buffer_bytes, near_N=near_N, shard=unpacked(shard))
    delta_NK = hidden.new_empty(ids.shape, dtype=work.head.wide)
    for rows, x_nV in work.head.chunks():
        delta_NK[rows] = work.td_errors(rows, x_nV, ids[rows], old_logprobs[rows], beta)
    return delta_NK


@linear_td_errors.register_fake
def _(hidden, weight, bias, ids, *_):
    return hidden.new_empty(ids.shape, dtype=wide_dtype(hidden, weight, bias))
