"""Softmax of a chunk of rows in its own buffers, and the gradient with respect to the logits.

    log p_v = (z_v - max) - log s,  s = sum_v exp(z_v - max),  H = log s - (1/s) sum_v exp(z_v - max) (z_v - max)

For L = f(log p at ids, LSE, H) with c_k = dL/dlog p_k, S = sum_k c_k, g = dL/dLSE, e = dL/dH:

    dL/dz_v = sum_k c_k [v = id_k] - S p_v + g p_v - e p_v (log p_v + H)                                          (1)

Shape letters: N rows (those of one chunk), V vocabulary, K ids a row.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def gather_ids(x_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """x at ids, exactly 0 where id < 0 (padding): [N, V], [N, K] -> [N, K]."""
    return x_NV.gather(1, ids_NK.clamp(min=0)).masked_fill_(ids_NK < 0, 0.0)


class RowSoftmax(NamedTuple):
    """`exp_NV` holds exp(z - max) and `weighted_NV` holds exp(z - max) (z - max), in the chunk's two buffers."""

    exp_NV: Tensor
    weighted_NV: Tensor
    sum_N1: Tensor
    logprobs_NK: Tensor
    lse_N: Tensor
    entropy_N: Tensor


def row_softmax_(z_NV: Tensor, scratch_NV: Tensor, ids_NK: Tensor) -> RowSoftmax:
    """Statistics of every row of z, which is overwritten, as is the scratch of the same shape.

    The largest logit is subtracted before anything is rounded, so log p keeps its digits at |z| ~ 1e4 where LSE cannot.
    A logit of -inf has probability 0 and adds nothing to the entropy.
    """
    max_N1 = z_NV.amax(-1, keepdim=True)
    z_NV.sub_(max_N1)
    exp_NV = torch.exp(z_NV, out=scratch_NV)
    sum_N1 = exp_NV.sum(-1, keepdim=True)
    log_sum_N1 = sum_N1.log()
    logprobs_NK = (gather_ids(z_NV, ids_NK) - log_sum_N1).masked_fill_(ids_NK < 0, 0.0)
    weighted_NV = z_NV.mul_(exp_NV)
    # 0 * -inf is the only NaN that may be skipped: any other NaN is in `sum_N1` too.
    entropy_N = (log_sum_N1 - weighted_NV.nansum(-1, keepdim=True) / sum_N1)[:, 0]
    return RowSoftmax(exp_NV, weighted_NV, sum_N1, logprobs_NK, (max_N1 + log_sum_N1)[:, 0], entropy_N)


def logit_gradient_(
    softmax: RowSoftmax,
    ids_NK: Tensor,
    c_NK: Tensor,
    temperature: float,
    grad_lse_N: Tensor | None = None,
    grad_entropy_N: Tensor | None = None,
) -> Tensor:
    """Equation (1) divided by T, i.e. dL/d(h W^T + b): [N, V], written over `softmax.exp_NV`. Equal ids add up."""
    c_NK = c_NK.masked_fill(ids_NK < 0, 0.0) / temperature
    on_p_N = -c_NK.sum(-1)
    if grad_lse_N is not None:
        on_p_N = on_p_N + grad_lse_N / temperature
    if grad_entropy_N is not None:
        grad_entropy_N = grad_entropy_N / temperature
        on_p_N = on_p_N + grad_entropy_N * (softmax.sum_N1[:, 0].log() - softmax.entropy_N)
    dz_NV = softmax.exp_NV.mul_(on_p_N[:, None] / softmax.sum_N1)
    if grad_entropy_N is not None:
        weighted_NV = softmax.weighted_NV.nan_to_num_(nan=0.0)
        dz_NV.sub_(weighted_NV.mul_(grad_entropy_N[:, None] / softmax.sum_N1))
    # Slot by slot: on a GPU one scatter over all slots adds equal ids by atomics, in any order.
    for k in range(ids_NK.shape[1]):
        dz_NV.scatter_add_(1, ids_NK[:, k : k + 1].clamp(min=0), c_NK[:, k : k + 1])
    return dz_NV
