"""Log-probabilities at ids, LSE and entropy of every row, in one visit; TD errors when the old ones are given.

    log p_k = (y_{id_k} - shift) / T - log s        delta_k = beta (log p_k - log p_old_k)

Where about log p of the first id is known beforehand (kernels/softmax.py), the visit can leave the row's exponentials
behind, from which `logit_gradient` makes the gradient without reading the logits again.
Shape letters: N rows, V vocabulary, K ids a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ipvrm_core.kernels.launch import Launch, architecture_of, contiguous, row_launch
from ipvrm_core.kernels.softmax import load_logits, logit_of, row_statistics


@triton.jit
def row_logprobs_kernel(
    p_x,
    stride_x,
    p_out,
    stride_out,
    V,
    K,
    p_ids,
    p_near,
    p_reference,
    p_old,
    p_temperature,
    p_logprobs,
    p_lse,
    p_normalizer,
    p_entropy,
    p_total,
    inv_temperature,
    cap,
    beta,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAPPED: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr,
    KNOWN: tl.constexpr,
    GIVEN: tl.constexpr,
    STORE: tl.constexpr,
    TD: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    p_row = p_x + i_n * stride_x
    p_out_row = p_out + i_n * stride_out
    if ROW_TEMPERATURE:
        inv_temperature = 1 / tl.load(p_temperature + i_n)
    known, reference, near = tl.full([], False, tl.int1), tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    if KNOWN:
        near = tl.load(p_near + i_n).to(tl.float32)
        if GIVEN:
            known, reference = True, tl.load(p_reference + i_n)
        else:
            known, reference = logit_of(p_row, tl.load(p_ids + i_n * K), V, cap, CAPPED)
    shift, log_sum, entropy, total = row_statistics(
        p_row, p_out_row, V, known, reference, near, inv_temperature, cap, BLOCK, CAPPED, KNOWN, STORE
    )
    tl.store(p_lse + i_n, shift * inv_temperature + log_sum)
    tl.store(p_normalizer + 2 * i_n, shift)
    tl.store(p_normalizer + 2 * i_n + 1, log_sum)
    tl.store(p_entropy + i_n, entropy)
    if STORE:
        tl.store(p_total + i_n, total)
    for start in range(0, K, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        ids = tl.load(p_ids + i_n * K + o_k, mask=o_k < K, other=-1)
        y = load_logits(p_row, tl.where(ids >= 0, ids, V), V, cap, CAPPED)
        logprobs = (y - shift) * inv_temperature - log_sum
        if TD:
            old = tl.load(p_old + i_n * K + o_k, mask=(o_k < K) & (ids >= 0), other=0.0).to(tl.float32)
            logprobs = beta * (logprobs - old)
        # An id beyond V is an error that nobody checked: make it visible.
        logprobs = tl.where(ids >= V, float("nan"), tl.where(ids >= 0, logprobs, 0.0))
        tl.store(p_logprobs + i_n * K + o_k, logprobs, mask=o_k < K)


def row_logprobs(
    x_NV: Tensor,
    ids_NK: Tensor,
    *,
    near_N: Tensor | None = None,
    reference_N: Tensor | None = None,
    out_NV: Tensor | None = None,
    temperature: float = 1.0,
    temperatures_N: Tensor | None = None,
    softcap: float | None = None,
    old_logprobs_NK: Tensor | None = None,
    beta: float = 1.0,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """(log p at ids [N, K], or delta if the old ones are given; LSE; entropy; (shift, log s) [N, 2]; total), float32.

    x [N, V] of stride 1 within a row; ids [N, K] int64, < 0 is padding (0 comes out), >= V gives NaN. near [N]: about
    log p of ids[:, 0], or of a token with the logit `reference` [N]; NaN where nobody knows; results do not depend on
    it beyond their rounding. out [N, V], apart from x, receives the exponentials for `logit_gradient`, and total their
    sum, 0 in rows where it has none; without `near` and `out` there is no total.
    """
    N, V, K = *x_NV.shape, ids_NK.shape[1]
    launch = launch or row_launch(architecture_of(x_NV.device), x_NV.element_size(), V)
    known = near_N is not None and (K > 0 or reference_N is not None)
    store = known and out_NV is not None
    logprobs_NK, lse_N, entropy_N, normalizer_N2, total_N = (
        torch.empty(shape, dtype=torch.float32, device=x_NV.device) for shape in ((N, K), (N,), (N,), (N, 2), (N,))
    )
    target_NV = out_NV if store else x_NV
    with torch.cuda.device_of(x_NV):
        row_logprobs_kernel[(N,)](
            x_NV,
            x_NV.stride(0),
            target_NV,
            target_NV.stride(0),
            V,
            K,
            *contiguous(ids_NK, near_N, reference_N, old_logprobs_NK, temperatures_N),
            logprobs_NK,
            lse_N,
            normalizer_N2,
            entropy_N,
            total_N,
            1 / temperature,
            softcap or 1.0,
            beta,
            BLOCK=launch.block,
            BLOCK_K=min(64, triton.next_power_of_2(max(K, 1))),
            CAPPED=softcap is not None,
            ROW_TEMPERATURE=temperatures_N is not None,
            KNOWN=known,
            GIVEN=reference_N is not None,
            STORE=store,
            TD=old_logprobs_NK is not None,
            num_warps=launch.num_warps,
        )
    return logprobs_NK, lse_N, entropy_N, normalizer_N2, total_N if store else None
