"""Softmax of a chunk of rows in the buffer of its logits, and the gradient with respect to the logits.

    log p_v = (z_v - max) - log s,  s = sum_v exp(z_v - max),  H = log s - (1/s) sum_v exp(z_v - max) (z_v - max)

For L = f(log p at ids, LSE, H) with c_k = dL/dlog p_k, S = sum_k c_k, g = dL/dLSE, e = dL/dH:

    dL/dz_v = sum_k c_k [v = id_k] - S p_v + g p_v - e p_v (log p_v + H)                                          (1)

Shape letters: N rows (those of one chunk), B rows of the scratch buffer, V vocabulary, K ids a row.
"""

from math import log
from typing import NamedTuple

import torch
from torch import Tensor

_LOG2_E = 1 / log(2)
_LEAST_SCALE = 1e-20  # of sum_k |c_k|


class RowSoftmax(NamedTuple):
    """`exp_NV` holds exp(z - max) in the buffer that z came in."""

    exp_NV: Tensor
    sum_N1: Tensor
    logprobs_NK: Tensor
    lse_N: Tensor
    entropy_N: Tensor
    max_N: Tensor


def row_softmax_(z_NV: Tensor, scratch_BV: Tensor, ids_NK: Tensor) -> RowSoftmax:
    """Statistics of every row of z, which becomes exp(z - max); log p at ids [N, K], 0 where id < 0 (padding).

    B rows are worked on at a time, so that on a CPU the sweeps over a row meet it in cache.
    The largest logit is subtracted before anything is rounded, so log p keeps its digits at |z| ~ 1e4 where LSE cannot.
    A logit of -inf has probability 0 and adds nothing to the entropy.
    """
    max_N1, sum_N1, weighted_N1 = (z_NV.new_empty(len(z_NV), 1) for _ in range(3))
    logprobs_NK = z_NV.new_empty(ids_NK.shape)
    for start in range(0, len(z_NV), len(scratch_BV)):
        rows = slice(start, start + len(scratch_BV))
        x_BV = z_NV[rows]
        x_BV.sub_(torch.amax(x_BV, -1, keepdim=True, out=max_N1[rows]))
        logprobs_NK[rows] = x_BV.gather(1, ids_NK[rows].clamp(min=0))
        # exp2, since exp, which torch takes from MKL, was measured to be three times as slow on a processor of AMD's.
        weighted_BV = torch.mul(x_BV, _LOG2_E, out=scratch_BV[: len(x_BV)])
        torch.sum(torch.exp2(weighted_BV, out=x_BV), -1, keepdim=True, out=sum_N1[rows])
        # 0 * -inf is the only NaN that may be skipped: any other NaN is in the plain sum too.
        torch.nansum(weighted_BV.mul_(x_BV), -1, keepdim=True, out=weighted_N1[rows])
    log_sum_N1 = sum_N1.log()
    logprobs_NK.sub_(log_sum_N1).masked_fill_(ids_NK < 0, 0.0)
    lse_N, entropy_N = (max_N1 + log_sum_N1)[:, 0], (log_sum_N1 - weighted_N1 / (_LOG2_E * sum_N1))[:, 0]
    return RowSoftmax(z_NV, sum_N1, logprobs_NK, lse_N, entropy_N, max_N1[:, 0])


def logit_gradient_(
    softmax: RowSoftmax,
    scratch_BV: Tensor,
    ids_NK: Tensor,
    c_NK: Tensor,
    grad_lse_N: Tensor | None = None,
    grad_entropy_N: Tensor | None = None,
    *,
    scaled: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(x, scale): equation (1), dL/dz [N, V], is scale [N, 1] * x, or x for None. x takes the place of exp(z - max).

    scaled: a scale may be given, which saves a pass over x. Equal ids add up.
    """
    c_NK = c_NK.masked_fill(ids_NK < 0, 0.0)
    on_p_N, scale_N1 = -c_NK.sum(-1), None  # on_p: what stands on every p_v
    if grad_lse_N is not None:
        on_p_N = on_p_N + grad_lse_N
    if grad_entropy_N is not None:
        on_p_N = on_p_N + grad_entropy_N * (softmax.sum_N1[:, 0].log() - softmax.entropy_N)
        dz_NV = _with_entropy_(softmax, scratch_BV, on_p_N[:, None], grad_entropy_N[:, None])
    elif scaled:
        dz_NV, scale_N1 = softmax.exp_NV, _scale_(softmax, on_p_N[:, None], c_NK)
        c_NK = c_NK / scale_N1
    else:
        dz_NV = softmax.exp_NV.mul_(on_p_N[:, None] / softmax.sum_N1)
    # Slot by slot: on a GPU one scatter over all slots adds equal ids by atomics, in any order.
    for k in range(ids_NK.shape[1]):
        dz_NV.scatter_add_(1, ids_NK[:, k : k + 1].clamp(min=0), c_NK[:, k : k + 1])
    return dz_NV, scale_N1


def _scale_(softmax: RowSoftmax, on_p_N1: Tensor, c_NK: Tensor) -> Tensor:
    """on_p / s. Rows where c / scale might overflow have no share in p that could be seen: there E is 0 and scale 1."""
    scale_N1 = on_p_N1 / softmax.sum_N1
    lost_N = (scale_N1.abs() <= _LEAST_SCALE * c_NK.abs().sum(-1, keepdim=True))[:, 0]
    lost = lost_N.nonzero()[:, 0]  # as a mask it would cost a pass over all rows
    scale_N1[lost] = 1.0
    softmax.exp_NV.index_fill_(0, lost, 0.0)
    return scale_N1


def _with_entropy_(softmax: RowSoftmax, scratch_BV: Tensor, on_p_N1: Tensor, grad_entropy_N1: Tensor) -> Tensor:
    """(E a - e E log E) / s over E = exp(z - max), where E log E is 0 at E = 0."""
    for start in range(0, len(softmax.exp_NV), len(scratch_BV)):
        rows = slice(start, start + len(scratch_BV))
        exp_BV, sum_B1 = softmax.exp_NV[rows], softmax.sum_N1[rows]
        # A third of xlogy's time. The limit is below the log of any number, so that 0 log 0 is 0.
        weighted_BV = torch.log(exp_BV, out=scratch_BV[: len(exp_BV)]).clamp_(min=-1000.0).mul_(exp_BV)
        exp_BV.mul_(on_p_N1[rows] / sum_B1).sub_(weighted_BV.mul_(grad_entropy_N1[rows] / sum_B1))
    return softmax.exp_NV
