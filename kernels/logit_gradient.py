"""dLoss/dx of a row whose loss depends on log p at ids, LSE and entropy; the row's statistics are known.

    dL/dl_v = sum_k c_k [v = id_k] + p_v (g - sum_k c_k) - e p_v (log p_v + H)        dL/dx_v = dL/dl_v / T dy_v/dx_v

with c = dL/dlog p, g = dL/dLSE, e = dL/dH, and dy/dx = 1 - (y / cap)^2 under a soft cap.
Shape letters: N rows, V vocabulary, K ids a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ipvrm_core.kernels.launch import Launch, architecture_of, contiguous, row_launch
from ipvrm_core.kernels.softmax import LOG2_E, add_at_ids, load_logits


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
    p_temperature,
    inv_temperature,
    cap,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAPPED: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr,
    LSE: tl.constexpr,
    ENTROPY: tl.constexpr,
    NARROWING: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    p_row, p_out_row = p_x + i_n * stride_x, p_out + i_n * stride_out
    o_block, o_k = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    if ROW_TEMPERATURE:
        inv_temperature = 1 / tl.load(p_temperature + i_n)
    shift, log_sum = tl.load(p_normalizer + 2 * i_n), tl.load(p_normalizer + 2 * i_n + 1)
    on_p = tl.zeros([], tl.float32)
    for k in range(0, K, BLOCK_K):
        valid = (k + o_k < K) & (tl.load(p_ids + i_n * K + k + o_k, mask=k + o_k < K, other=-1) >= 0)
        on_p -= tl.sum(tl.load(p_c + i_n * K + k + o_k, mask=valid, other=0.0), 0)
    if LSE:
        on_p += tl.load(p_g + i_n)
    e, entropy = tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    if ENTROPY:
        e, entropy = tl.load(p_e + i_n), tl.load(p_entropy + i_n)
    for start in range(0, V, BLOCK):
        o_v = start + o_block
        y = load_logits(p_row, o_v, V, cap, CAPPED)
        d = softmax_gradient(y, shift, log_sum, inv_temperature, on_p, e, entropy, ENTROPY)
        for k in range(0, K, BLOCK_K):
            ids = tl.load(p_ids + i_n * K + k + o_k, mask=k + o_k < K, other=-1)
            c = tl.load(p_c + i_n * K + k + o_k, mask=(k + o_k < K) & (ids >= 0), other=0.0)
            d = add_at_ids(d, o_v, start, ids, c, o_k, BLOCK, BLOCK_K)
        d *= inv_temperature
        if CAPPED:
            d *= 1 - (y / cap) * (y / cap)
        if NARROWING:
            tl.debug_barrier()  # the narrower row is written over logits that other threads are still to read
        tl.store(p_out_row + o_v, d, mask=o_v < V)


def in_place(x_NV: Tensor, out_NV: Tensor) -> bool:
    """Whether `out` lies in the memory of `x`: row n of both begins at the same byte."""
    return out_NV.data_ptr() == x_NV.data_ptr()


def narrowing(x_NV: Tensor, out_NV: Tensor) -> bool:
    """Whether it lies there in a narrower type: a column of `out` is not that of `x`."""
    return in_place(x_NV, out_NV) and out_NV.dtype != x_NV.dtype


def logit_gradient(
    x_NV: Tensor,
    out_NV: Tensor,
    ids_NK: Tensor,
    c_NK: Tensor,
    normalizer_N2: Tensor,
    entropy_N: Tensor,
    *,
    grad_lse_N: Tensor | None = None,
    grad_entropy_N: Tensor | None = None,
    temperature: float = 1.0,
    temperatures_N: Tensor | None = None,
    softcap: float | None = None,
    launch: Launch | None = None,
) -> None:
    """Write dL/dx into `out` [N, V] (rows of stride 1); `out` may be x itself or its memory in a narrower type.

    ids [N, K] int64 with c [N, K] float32; padding (id < 0) is ignored. normalizer, entropy: from `row_logprobs`.
    """
    N, V, K = *x_NV.shape, ids_NK.shape[1]
    launch = launch or row_launch(architecture_of(x_NV.device), x_NV.element_size(), V)
    ids_NK, c_NK, grad_lse_N, grad_entropy_N, normalizer_N2, entropy_N, temperatures_N = contiguous(
        ids_NK, c_NK.to(torch.float32), grad_lse_N, grad_entropy_N, normalizer_N2, entropy_N, temperatures_N
    )
    with torch.cuda.device_of(x_NV):
        logit_gradient_kernel[(N,)](
            x_NV,
            x_NV.stride(0),
            out_NV,
            out_NV.stride(0),
            V,
            K,
            ids_NK,
            c_NK,
            grad_lse_N,
            grad_entropy_N,
            normalizer_N2,
            entropy_N,
            temperatures_N,
            1 / temperature,
            softcap or 1.0,
            BLOCK=launch.block,
            BLOCK_K=min(64, triton.next_power_of_2(max(K, 1))),
            CAPPED=softcap is not None,
            ROW_TEMPERATURE=temperatures_N is not None,
            LSE=grad_lse_N is not None,
            ENTROPY=grad_entropy_N is not None,
            NARROWING=narrowing(x_NV, out_NV),
            num_warps=launch.num_warps,
        )
