"""What the row kernels share: loading logits, and the statistics of a row in one sweep.

    y_v = x_v, or cap tanh(x_v / cap) with a soft cap      l_v = y_v / T
    s = sum_v exp(l_v - shift / T)                         log p_v = (y_v - shift) / T - log s

Shift is the largest y, which the sweep finds as it goes. Or it is known beforehand: of one token z of the row someone
knows nearly log p_z (the sampler, the old policy), and then shift = y_z. Either is subtracted before anything is
rounded, so log p keeps its digits where LSE = shift / T + log s cannot (|l| ~ 1e4). A program takes one row, BLOCK
columns at a time; columns beyond V are -inf, whose p is exactly 0.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# A near log p is taken as one in [-20, 0]. Then the sum of the exponentials is at least e^-20, because p_z <= 1; beyond
# 2^40 (p_z is below e^-27) it is not trusted.
LEAST_NEAR = tl.constexpr(-20.0)
LARGEST_TOTAL = tl.constexpr(2.0**40)


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
def _exponentials(
    p_x, p_out, o_v, V, reference, a, b, cap, WHOLE: tl.constexpr, CAPPED: tl.constexpr, STORE: tl.constexpr
):
    """(e, e d) of a block with d = (y - reference) a + b and e = 2^d; STORE: e dy/dx goes to `out`."""
    mask = None if WHOLE else o_v < V
    y = tl.load(p_x + o_v).to(tl.float32) if WHOLE and not CAPPED else load_logits(p_x, o_v, V, cap, CAPPED)
    d = (y - reference) * a + b
    e = tl.exp2(d)
    if STORE:
        kept = e
        if CAPPED:
            kept = tl.where(o_v < V, e * (1 - (y / cap) * (y / cap)), 0.0)
        tl.store(p_out + o_v, kept, mask=mask)
    return e, e * tl.maximum(d, -150.0)  # at d = -inf the product is 0 and not NaN


@triton.jit
def known_softmax(
    p_row,
    p_out_row,
    V,
    reference,
    near,
    inv_temperature,
    cap,
    BLOCK: tl.constexpr,
    CAPPED: tl.constexpr,
    STORE: tl.constexpr,
):
    """(total, log s, entropy) of a row in one visit that reduces nothing on its way, with

        e_v = exp((y_v - reference) / T + near)    total = sum_v e_v    p_v = e_v / total

    STORE: `out` receives e_v dy_v/dx_v, which is the gradient of a loss but for one factor a row.
    """
    o_v = tl.arange(0, BLOCK)
    a, b = inv_temperature * LOG2_E, near * LOG2_E
    sum_v, weighted_v = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    whole = 0 if CAPPED else V // BLOCK * BLOCK  # what a soft cap costs, a mask more does not change
    for start in range(0, whole, BLOCK):
        e, ed = _exponentials(p_row, p_out_row, start + o_v, V, reference, a, b, cap, True, CAPPED, STORE)
        sum_v += e
        weighted_v += ed
    even = V // 16 * 16  # up to here a mask keeps loads and stores of 16 bytes whole
    for start in range(whole, even, BLOCK):
        e, ed = _exponentials(p_row, p_out_row, start + o_v, even, reference, a, b, cap, False, CAPPED, STORE)
        sum_v += e
        weighted_v += ed
    total, weighted = tl.sum(sum_v, 0), tl.sum(weighted_v, 0)
    if even < V:
        o_rest = even + tl.arange(0, 16)
        e, ed = _exponentials(p_row, p_out_row, o_rest, V, reference, a, b, cap, False, CAPPED, STORE)
        total += tl.sum(e, 0)
        weighted += tl.sum(ed, 0)
    log_total = tl.log(total)
    return total, log_total - near, log_total - LN_2 * weighted / total


@triton.jit
def logit_of(p_row, token, V, cap, CAPPED: tl.constexpr):
    """(whether there is such a token, its y or 0)."""
    there = (token >= 0) & (token < V)
    o_token = tl.zeros([1], tl.int64) + tl.where(there, token, V)
    return there, tl.where(there, tl.sum(load_logits(p_row, o_token, V, cap, CAPPED), 0), 0.0)


@triton.jit
def row_statistics(
    p_row,
    p_out_row,
    V,
    known,
    reference,
    near,
    inv_temperature,
    cap,
    BLOCK: tl.constexpr,
    CAPPED: tl.constexpr,
    KNOWN: tl.constexpr,
    STORE: tl.constexpr,
):
    """(shift, log s, entropy, total) of a row; total is 0 where `out` does not hold e of that sum.

    KNOWN: `near` is about log p of a token with the logit `reference`; one visit then. In rows where it is not known,
    or NaN, or wrong by so much that the sum does not serve, the row is visited (again) as if nothing were known.
    """
    if KNOWN:
        known &= near == near
        near = tl.minimum(tl.maximum(tl.where(known, near, 0.0), LEAST_NEAR), 0.0)
        total, log_sum, entropy = known_softmax(
            p_row, p_out_row, tl.where(known, V, 0), reference, near, inv_temperature, cap, BLOCK, CAPPED, STORE
        )
        known &= total <= LARGEST_TOTAL  # false of NaN
        shift_2, log_sum_2, entropy_2, _ = row_softmax(
            p_row, tl.where(known, 0, V), inv_temperature, cap, BLOCK, 1, CAPPED
        )
        shift, log_sum = tl.where(known, reference, shift_2), tl.where(known, log_sum, log_sum_2)
        entropy = tl.where(known, entropy, entropy_2)
        total = tl.where(known, total, 0.0) if STORE else tl.zeros([], tl.float32)
    else:
        shift, log_sum, entropy, _ = row_softmax(p_row, V, inv_temperature, cap, BLOCK, 1, CAPPED)
        total = tl.zeros([], tl.float32)
    return shift, log_sum, entropy, total
