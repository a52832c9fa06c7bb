"""What the row kernels share: loading logits, the statistics of a row in one sweep, and adding at a few ids.

    y_v = x_v, or cap tanh(x_v / cap) with a soft cap      l_v = y_v / T
    shift = max_v y_v    s = sum_v exp(l_v - shift / T)    log p_v = (y_v - shift) / T - log s

The largest y is subtracted before anything is rounded, so log p keeps its digits where LSE = shift / T + log s cannot
(|l| ~ 1e4). A program takes one row, BLOCK columns at a time; columns beyond V are -inf, whose p is exactly 0.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_logits(p_row, o_v, V, cap, CAPPED: tl.constexpr):
    """y at columns o_v in float32, -inf beyond V."""
    y = tl.load(p_row + o_v, mask=o_v < V, other=-float("inf")).to(tl.float32)
    if CAPPED:
        y = tl.where(o_v < V, cap * _tanh(y / cap), -float("inf"))
    return y


@triton.jit
def _tanh(x):
    """(1 - e) / (1 + e) with e = exp(-2 |x|); its Taylor polynomial where 1 - e would cancel."""
    e = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
    large = tl.where(x < 0, -1.0, 1.0) * (1 - e) / (1 + e)
    square = x * x
    small = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
    return tl.where(tl.abs(x) < 0.2, small, large)


@triton.jit
def row_softmax(p_row, V, inv_temperature, cap, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, CAPPED: tl.constexpr):
    """(shift, log s, entropy, maxima [BLOCKS]) of a row; maxima holds the largest y of each block.

    One exponential an element: sums run lane by lane and are rescaled when a block raises the maximum.
    """
    o_v, o_b = tl.arange(0, BLOCK), tl.arange(0, BLOCKS)
    scale = inv_temperature * LOG2_E
    shift = tl.full([], -float("inf"), tl.float32)
    sum_v = tl.zeros([BLOCK], tl.float32)
    weighted_v = tl.zeros([BLOCK], tl.float32)  # sum of exp(d) d, d = l - shift / T in powers of two
    maxima = tl.full([BLOCKS], -float("inf"), tl.float32)
    for start in range(0, V, BLOCK):
        y = load_logits(p_row, start + o_v, V, cap, CAPPED)
        top = tl.max(y, 0)
        maxima = tl.where(o_b == start // BLOCK, top, maxima)
        new = tl.maximum(shift, top)
        new_shift = tl.where(new == -float("inf"), 0.0, new)  # nothing but -inf so far: -inf - -inf is NaN
        moved = tl.where(shift == -float("inf"), 0.0, (shift - new_shift) * scale)
        factor = tl.where(shift == -float("inf"), 0.0, tl.exp2(moved))
        d = (y - new_shift) * scale
        e = tl.exp2(d)
        weighted_v = factor * (weighted_v + sum_v * moved) + tl.where(e > 0, e * d, 0.0)
        sum_v = factor * sum_v + e
        shift = new
    total = tl.sum(sum_v, 0)
    log_sum = tl.log(total)
    # NaN in a logit makes `total` NaN, and with it every result of the row.
    entropy = log_sum - LN_2 * tl.sum(weighted_v, 0) / total
    return shift, log_sum, entropy, maxima


@triton.jit
def add_at_ids(d, o_v, start, ids, c, o_k, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """d_v + sum_k c_k [v = id_k] for the block of columns that begins at `start`. Equal ids add, in the order of k."""
    inside = (ids >= start) & (ids < start + BLOCK)
    if tl.max(inside.to(tl.int32), 0) > 0:
        for k in range(BLOCK_K):
            here = inside & (o_k == k)
            column = tl.sum(tl.where(here, ids, 0), 0)
            value = tl.sum(tl.where(here, c, 0.0), 0)
            d += tl.where(o_v == column, value, 0.0)  # not in this block: value is 0
    return d
