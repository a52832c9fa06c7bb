"""Mean and population std over groups of sequences of a packed vector, in two stages.

    a sequence    mean_b = sum_t x_t / T_b,    M_b = sum_t (x_t - mean_b)^2
    its group     merged in the order of the batch (Chan, Golub, LeVeque 1983), with r = T_b / (n + T_b):
                  mean <- mean + r (mean_b - mean),  M <- M + M_b + r n (mean_b - mean)^2,  n <- n + T_b

std = sqrt(M / n). All means are kept as differences from the first token of the sequence or group: values far from 0
lose no digits, and where all are equal the differences are 0: the mean is that value and the std 0, exactly. A result
depends on the tokens of its group and the order of its sequences alone, to the bit.

Shape letters: N packed tokens, B sequences. cu_seqlens [B+1] int as in segments.py; groups [B] any integers, the
sequences of a group need not be neighbours. Each sequence merges its own group (B / BLOCK steps of looking for members
and one for each member), so nothing is sorted or counted and the host waits for nothing. float32; no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ipvrm_core.kernels.segments import launch


@triton.jit
def sequence_moments_kernel(p_x, p_cu, p_shift_B, p_squares_B, BLOCK: tl.constexpr):
    i_b = tl.program_id(0).to(tl.int64)
    start = tl.load(p_cu + i_b).to(tl.int64)
    stop = tl.load(p_cu + i_b + 1).to(tl.int64)
    i = tl.arange(0, BLOCK)
    first = tl.load(p_x + start, start < stop, other=0.0).to(tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for o_x in range(start, stop, BLOCK):
        sums += tl.load(p_x + o_x + i, o_x + i < stop, other=first).to(tl.float32) - first
    shift = tl.div_rn(tl.sum(sums, 0), tl.maximum(stop - start, 1).to(tl.float32))  # mean - first
    squares = tl.zeros([BLOCK], tl.float32)
    for o_x in range(start, stop, BLOCK):
        mask = o_x + i < stop
        x = tl.load(p_x + o_x + i, mask, other=0.0).to(tl.float32)
        centred = tl.where(mask, x - first - shift, 0.0)
        squares += centred * centred
    tl.store(p_shift_B + i_b, shift)
    tl.store(p_squares_B + i_b, tl.sum(squares, 0))


@triton.jit
def group_moments_kernel(
    p_x, p_cu, p_groups, p_shift_B, p_squares_B, p_mean_N, p_std_N, B: tl.int64, BLOCK: tl.constexpr
):
    i_b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    group = tl.load(p_groups + i_b)
    n = tl.full([], 0.0, tl.float32)
    first = tl.full([], 0.0, tl.float32)
    shift = tl.full([], 0.0, tl.float32)
    squares = tl.full([], 0.0, tl.float32)
    for done in range(0, B, BLOCK):
        j = done + i
        start_j = tl.load(p_cu + j, j < B, other=0)
        stop_j = tl.load(p_cu + j + 1, j < B, other=0)
        member = (tl.load(p_groups + j, j < B, other=0) == group) & (start_j < stop_j)
        i_j = tl.min(tl.where(member, j, B), 0)
        while i_j < B:
            o_j = tl.load(p_cu + i_j)
            n_j = (tl.load(p_cu + i_j + 1) - o_j).to(tl.float32)
            first_j = tl.load(p_x + o_j).to(tl.float32)
            first = tl.where(n == 0, first_j, first)
            share = tl.div_rn(n_j, n + n_j)
            step = first_j - first + tl.load(p_shift_B + i_j) - shift
            shift += share * step
            squares += tl.load(p_squares_B + i_j) + share * n * step * step
            n += n_j
            i_j = tl.min(tl.where(member & (j > i_j), j, B), 0)
    std = tl.sqrt_rn(tl.div_rn(squares, tl.maximum(n, 1.0)))
    start = tl.load(p_cu + i_b).to(tl.int64)
    stop = tl.load(p_cu + i_b + 1).to(tl.int64)
    for o_x in range(start, stop, BLOCK):
        tl.store(p_mean_N + o_x + i, first + shift, o_x + i < stop)
        tl.store(p_std_N + o_x + i, std, o_x + i < stop)


def group_moments(x_N: Tensor, cu_seqlens: Tensor, groups_B: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population std over all tokens of each token's group: [N] -> [N], [N]."""
    x_N, cu_seqlens, groups_B = x_N.contiguous(), cu_seqlens.contiguous(), groups_B.contiguous()
    mean_N, std_N = torch.empty_like(x_N), torch.empty_like(x_N)
    B, settings = len(groups_B), launch(x_N.device)
    shift_B, squares_B = x_N.new_empty(2, B, dtype=torch.float32)
    with torch.cuda.device_of(x_N):
        sequence_moments_kernel[(B,)](x_N, cu_seqlens, shift_B, squares_B, **settings)
        group_moments_kernel[(B,)](x_N, cu_seqlens, groups_B, shift_B, squares_B, mean_N, std_N, B, **settings)
    return mean_N, std_N
