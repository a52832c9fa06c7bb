"""dLoss/dx of a row whose loss depends on log p at ids, LSE and entropy; the row's statistics are known.

    dL/dl_v = sum_k c_k [v = id_k] + p_v a - e p_v (log p_v + H)        dL/dx_v = dL/dl_v / T dy_v/dx_v

with c = dL/dlog p, g = dL/dLSE, e = dL/dH, a = g - sum_k c_k, and dy/dx = 1 - (y / cap)^2 under a soft cap.

Where a visit has already left e_v dy/dx with sum_v e_v = total in `out` (kernels/softmax.py), p_v a is that times the
factor a / total. Then the few columns at ids are written, the factor is handed out as the row's scale, and no logit is
read again. That needs e = 0, and an a that is not lost beside the c: of other rows the gradient is written whole, and
their scale is 1.
Shape letters: N rows, V vocabulary, K ids a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ipvrm_core.kernels.launch import Launch, architecture_of, contiguous, row_launch
from ipvrm_core.kernels.softmax import LOG2_E, load_logits

# c total / a is stored beside e: both must be finite in bfloat16, and 1 / a in float32.
LARGEST_SHARE = tl.constexpr(2.0**60)
LEAST_ON_P = tl.constexpr(1e-30)


@triton.jit
def softmax_gradient(y, shift, log_sum, inv_temperature, on_p, e, entropy, ENTROPY: tl.constexpr):
    """p_v on_p - e p_v (log p_v + H) for the y of a block."""
    logp = (y - shift) * inv_temperature - log_sum
    p = tl.exp2(logp * LOG2_E)
    d = p * on_p
    if ENTROPY:
        d -= tl.where(p > 0, e * p * (logp + entropy), 0.0)
    return d


@triton.jit
def write_all(
    p_row,
    p_out_row,
    V,
    V_read,
    shift,
    log_sum,
    inv_temperature,
    on_p,
    e,
    entropy,
    cap,
    BLOCK: tl.constexpr,
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """The gradient without its part at the ids. Beyond V_read, which is 0 or V, zeros without a read."""
    for start in range(0, V, BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        y = load_logits(p_row, o_v, V_read, cap, CAPPED)
        d = softmax_gradient(y, shift, log_sum, inv_temperature, on_p, e, entropy, ENTROPY) * inv_temperature
        if CAPPED:
            d *= tl.where(o_v < V_read, 1 - (y / cap) * (y / cap), 0.0)
        tl.store(p_out_row + o_v, d, mask=o_v < V)


@triton.jit
def row_scale(on_p, largest_c, total, inv_temperature):
    """(stored, share, scale): whether what the visit stored serves, total / a, and the row's scale."""
    silent = (on_p == 0) & (largest_c == 0)
    lost = (tl.abs(on_p) * LARGEST_SHARE < largest_c) | (tl.abs(on_p) < LEAST_ON_P)  # false of NaN, which shows
    stored = (total > 0) & (silent | ~lost)
    share = tl.where(silent | ~stored, 0.0, total / on_p)
    return stored, share, tl.where(stored, on_p / tl.where(total > 0, total, 1.0) * inv_temperature, 1.0)


@triton.jit
def value_at_ids(
    y, c, stored, share, total, shift, log_sum, inv_temperature, on_p, e, entropy, cap,
    CAPPED: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """What stands in `out` at ids with logits y, c the sum of all coefficients of that id."""
    d = softmax_gradient(y, shift, log_sum, inv_temperature, on_p, e, entropy, ENTROPY)
    kept = total * tl.exp2(((y - shift) * inv_temperature - log_sum) * LOG2_E)
    value = tl.where(stored, kept + c * share, (d + c) * inv_temperature)
    if CAPPED:
        value *= 1 - (y / cap) * (y / cap)
    return value


@triton.jit
def sum_at_ids(ids, other_ids, other_c):
    """sum_j c_j [other_id_j = id_k]: equal ids add."""
    if other_ids.shape[0] <= 32:
        return tl.sum(tl.where(ids[:, None] == other_ids[None, :], other_c[None, :], 0.0), 1)
    total, o_k = tl.zeros(ids.shape, tl.float32), tl.arange(0, other_ids.shape[0])
    for k in range(other_ids.shape[0]):  # the square of so many does not fit the registers
        here = o_k == k
        id = tl.sum(tl.where(here, other_ids, 0), 0)
        total += tl.where(ids == id, tl.sum(tl.where(here, other_c, 0.0), 0), 0.0)
    return total


@triton.jit
def logit_gradient_kernel(
    p_x,
    stride_x,
    p_out,
    stride_out,
    V,
    K,
    p_ids,
    p_c,
    p_g,
    p_e,
    p_normalizer,
    p_entropy,
    p_total,
    p_scale,
    p_temperature,
    inv_temperature,
    cap,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAPPED: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr,
    LSE: tl.constexpr,
    ENTROPY: tl.constexpr,
    STORED: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    p_row, p_out_row = p_x + i_n * stride_x, p_out + i_n * stride_out
    o_k = tl.arange(0, BLOCK_K)
    if ROW_TEMPERATURE:
        inv_temperature = 1 / tl.load(p_temperature + i_n)
    shift, log_sum = tl.load(p_normalizer + 2 * i_n), tl.load(p_normalizer + 2 * i_n + 1)
    on_p, largest_c = tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    for k in range(0, K, BLOCK_K):
        valid = (k + o_k < K) & (tl.load(p_ids + i_n * K + k + o_k, mask=k + o_k < K, other=-1) >= 0)
        c = tl.load(p_c + i_n * K + k + o_k, mask=valid, other=0.0)
        on_p -= tl.sum(c, 0)
        largest_c = tl.maximum(largest_c, tl.max(tl.abs(c), 0))
    if LSE:
        on_p += tl.load(p_g + i_n)
    e, entropy, total = tl.zeros([], tl.float32), tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    if ENTROPY:
        e, entropy = tl.load(p_e + i_n), tl.load(p_entropy + i_n)
    if STORED:
        total = tl.load(p_total + i_n)
    stored, share, scale = row_scale(on_p, largest_c, total, inv_temperature)
    if STORED:
        tl.store(p_scale + i_n, scale)
    V_left = tl.where(stored, 0, V)
    write_all(
        p_row, p_out_row, V_left, V_left, shift, log_sum, inv_temperature, on_p, e, entropy, cap, BLOCK, CAPPED, ENTROPY
    )
    tl.debug_barrier()  # the columns at ids are written last, by whichever thread
    for k in range(0, K, BLOCK_K):
        ids = tl.load(p_ids + i_n * K + k + o_k, mask=k + o_k < K, other=-1)
        c = tl.zeros([BLOCK_K], tl.float32)
        for j in range(0, K, BLOCK_K):
            others = tl.load(p_ids + i_n * K + j + o_k, mask=j + o_k < K, other=-1)
            c += sum_at_ids(ids, others, tl.load(p_c + i_n * K + j + o_k, mask=j + o_k < K, other=0.0))
        inside = (ids >= 0) & (ids < V)
        y = load_logits(p_row, tl.where(inside, ids, V), V, cap, CAPPED)
        value = value_at_ids(
            y, c, stored, share, total, shift, log_sum, inv_temperature, on_p, e, entropy, cap, CAPPED, ENTROPY
        )
        tl.store(p_out_row + ids, value, mask=inside)


def in_place(x_NV: Tensor, out_NV: Tensor) -> bool:
    """Whether `out` lies in the memory of `x`. Tensors without memory (device meta) are apart, unless they are one."""
    return out_NV is x_NV or 0 != out_NV.data_ptr() == x_NV.data_ptr()


def logit_gradient(
    x_NV: Tensor,
    out_NV: Tensor,
    ids_NK: Tensor,
    c_NK: Tensor,
    normalizer_N2: Tensor,
    entropy_N: Tensor,
    *,
    total_N: Tensor | None = None,
    grad_lse_N: Tensor | None = None,
    grad_entropy_N: Tensor | None = None,
    temperature: float = 1.0,
    temperatures_N: Tensor | None = None,
    softcap: float | None = None,
    launch: Launch | None = None,
) -> Tensor | None:
    """Write G into `out` [N, V] (rows of stride 1, apart from x): dL/dx = G, or scale G with the returned scale [N].

    ids [N, K] int64 with c [N, K] float32; padding (id < 0) is ignored. normalizer, entropy, total: from
    `row_logprobs`; with total, `out` holds what that call stored in it, and there is a scale. Not with grad_entropy.
    """
    N, V, K = *x_NV.shape, ids_NK.shape[1]
    assert not in_place(x_NV, out_NV)
    assert total_N is None or grad_entropy_N is None
    launch = launch or row_launch(architecture_of(x_NV.device), x_NV.element_size(), V)
    scale_N = None if total_N is None else torch.empty_like(total_N)
    small = (grad_lse_N, grad_entropy_N, normalizer_N2, entropy_N, total_N, scale_N, temperatures_N)
    with torch.cuda.device_of(x_NV):
        logit_gradient_kernel[(N,)](
            x_NV,
            x_NV.stride(0),
            out_NV,
            out_NV.stride(0),
            V,
            K,
            *contiguous(ids_NK, c_NK.to(torch.float32), *small),
            1 / temperature,
            softcap or 1.0,
            BLOCK=launch.block,
            BLOCK_K=min(64, triton.next_power_of_2(max(K, 1))),
            CAPPED=softcap is not None,
            ROW_TEMPERATURE=temperatures_N is not None,
            LSE=grad_lse_N is not None,
            ENTROPY=grad_entropy_N is not None,
            STORED=total_N is not None,
            num_warps=launch.num_warps,
        )
    return scale_N
