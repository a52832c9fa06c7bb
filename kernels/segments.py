"""Scans and sums that stay inside a sequence of a packed vector.

    scan             y_t = x_t + d y_{t-1} = sum_{u <= t} d^(t-u) x_u    d = 1: prefix values
    scan, reverse    y_t = x_t + d y_{t+1} = sum_{i >= t} d^(i-t) x_i    GAE; d = 1: the gradient of prefix values
    total            y_b = sum_{t in b} x_t

Shape letters: N packed tokens, B sequences, T the length of one. cu_seqlens [B+1] int: sequence b owns the rows
cu_seqlens[b] : cu_seqlens[b+1], possibly none. One program a sequence, in blocks of a fixed size that start at its own
first token (reverse: last): to the bit, a result does not depend on where the sequence lies or on what else is in the
batch. Sums in float32, results in x's dtype; no atomics, no wait for the device. cu_seqlens is not checked here.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def launch(device: torch.device) -> dict[str, int]:
    """The same for every length, as it fixes the order of the additions; interpreted, a test's lengths span several."""
    return {"BLOCK": 16, "num_warps": 1} if device.type == "cpu" else {"BLOCK": 1024, "num_warps": 4}


@triton.jit
def _then(d_left, y_left, d_right, y_right):
    """Two stretches of y <- d y + x as one: its decay and the y it ends with when started from 0."""
    return d_left * d_right, d_right * y_left + y_right


@triton.jit
def scan_kernel(p_x, p_cu, p_y, decay, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    i_b = tl.program_id(0).to(tl.int64)
    start = tl.load(p_cu + i_b).to(tl.int64)
    stop = tl.load(p_cu + i_b + 1).to(tl.int64)
    i = tl.arange(0, BLOCK)
    d = tl.zeros([BLOCK], tl.float32) + decay
    carry = tl.full([], 0.0, tl.float32)  # y of the token before the block
    for done in range(0, stop - start, BLOCK):
        o_x = stop - 1 - done - i if REVERSE else start + done + i
        mask = done + i < stop - start
        x = tl.load(p_x + o_x, mask, other=0.0).to(tl.float32)
        power, y = tl.associative_scan((d, x), 0, _then)
        y += power * carry
        tl.store(p_y + o_x, y, mask)
        carry = tl.sum(tl.where(i == BLOCK - 1, y, 0.0), 0)


def scan(x_N: Tensor, cu_seqlens: Tensor, decay: float = 1.0, reverse: bool = False) -> Tensor:
    """y_t = x_t + decay * (y_{t-1}, or y_{t+1} in reverse) within the sequence: [N] -> [N]."""
    x_N, cu_seqlens = x_N.contiguous(), cu_seqlens.contiguous()
    y_N = torch.empty_like(x_N)
    grid = (len(cu_seqlens) - 1,)
    with torch.cuda.device_of(x_N):
        scan_kernel[grid](x_N, cu_seqlens, y_N, decay, REVERSE=reverse, **launch(x_N.device))
    return y_N


@triton.jit
def total_kernel(p_x, p_cu, p_y, BLOCK: tl.constexpr):
    i_b = tl.program_id(0).to(tl.int64)
    start = tl.load(p_cu + i_b).to(tl.int64)
    stop = tl.load(p_cu + i_b + 1).to(tl.int64)
    i = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for o_x in range(start, stop, BLOCK):
        sums += tl.load(p_x + o_x + i, o_x + i < stop, other=0.0).to(tl.float32)
    tl.store(p_y + i_b, tl.sum(sums, 0))


def total(x_N: Tensor, cu_seqlens: Tensor) -> Tensor:
    """y_b = sum_{t in b} x_t, 0 for an empty sequence: [N] -> [B]."""
    x_N, cu_seqlens = x_N.contiguous(), cu_seqlens.contiguous()
    y_B = x_N.new_empty(len(cu_seqlens) - 1)
    with torch.cuda.device_of(x_N):
        total_kernel[(len(y_B),)](x_N, cu_seqlens, y_B, **launch(x_N.device))
    return y_B
