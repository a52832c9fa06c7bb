"""C = { v : log p_v >= threshold } of every row, ascending and compacted, with log-probs, the sampled and the entropy.

The first sweep leaves the row's statistics and the largest logit of each block. The second reads only blocks whose
largest logit reaches the threshold: at most e^-threshold of them, on average little more than one.
Shape letters: N rows, V vocabulary, K slots a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ipvrm_core.kernels.launch import Launch, architecture_of, contiguous, row_launch
from ipvrm_core.kernels.softmax import load_logits, row_softmax


@triton.jit
def candidate_rows_kernel(
    p_x,
    stride_x,
    V,
    K,
    p_sampled,
    p_temperature,
    p_ids,
    p_logprobs,
    p_count,
    p_sampled_logprob,
    p_entropy,
    inv_temperature,
    cap,
    threshold,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAPPED: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    p_row = p_x + i_n * stride_x
    o_b = tl.arange(0, BLOCKS)
    if ROW_TEMPERATURE:
        inv_temperature = 1 / tl.load(p_temperature + i_n)
    shift, log_sum, entropy, maxima = row_softmax(p_row, V, inv_temperature, cap, BLOCK, BLOCKS, CAPPED)
    tl.store(p_entropy + i_n, entropy)

    o_part = tl.arange(0, PART)
    o_row = i_n * K
    count = tl.zeros([], tl.int32)
    for start in range(0, V, BLOCK):
        top = tl.max(tl.where(o_b == start // BLOCK, maxima, -float("inf")), 0)
        # Same operations in the same order as for a single logit: rounding cannot put a member into a skipped block.
        if (top - shift) * inv_temperature - log_sum >= threshold:
            for part in range(start, start + BLOCK, PART):  # in parts: a prefix sum over a block needs much memory
                o_v = part + o_part
                logprobs = (load_logits(p_row, o_v, V, cap, CAPPED) - shift) * inv_temperature - log_sum
                member = logprobs >= threshold
                slot = count + tl.cumsum(member.to(tl.int32), 0) - 1
                kept = member & (slot < K)
                tl.store(p_ids + o_row + slot, o_v.to(tl.int64), mask=kept)
                tl.store(p_logprobs + o_row + slot, logprobs, mask=kept)
                count += tl.sum(member.to(tl.int32), 0)
    count = tl.minimum(count, K)
    tl.store(p_count + i_n, count.to(tl.int64))
    for start in range(0, K, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        padding = (o_k >= count) & (o_k < K)
        tl.store(p_ids + o_row + o_k, tl.full([BLOCK_K], -1, tl.int64), mask=padding)
        tl.store(p_logprobs + o_row + o_k, tl.zeros([BLOCK_K], tl.float32), mask=padding)
    sampled = tl.load(p_sampled + i_n)
    o_sampled = tl.zeros([1], tl.int64) + tl.where(sampled >= 0, sampled, V)
    y = tl.sum(load_logits(p_row, o_sampled, V, cap, CAPPED), 0)
    logp = tl.where(sampled >= 0, (y - shift) * inv_temperature - log_sum, 0.0)
    tl.store(p_sampled_logprob + i_n, tl.where(sampled >= V, float("nan"), logp))


def candidate_rows(
    x_NV: Tensor,
    sampled_ids_N: Tensor,
    K: int,
    *,
    threshold: float,
    temperature: float = 1.0,
    temperatures_N: Tensor | None = None,
    softcap: float | None = None,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(ids [N, K] int64 padded with -1, log-probs [N, K] padded with 0, counts [N], sampled log-prob [N], entropy [N]).

    x [N, V] of stride 1 within a row. A K of e^-threshold holds every set; a smaller one keeps its lowest ids.
    """
    N, V = x_NV.shape
    launch = launch or row_launch(architecture_of(x_NV.device), x_NV.element_size(), V)
    ids_NK = torch.empty(N, K, dtype=torch.int64, device=x_NV.device)
    logprobs_NK, sampled_N, entropy_N = (
        torch.empty(shape, dtype=torch.float32, device=x_NV.device) for shape in ((N, K), (N,), (N,))
    )
    counts_N = torch.empty_like(sampled_ids_N)
    sampled_ids_N, temperatures_N = contiguous(sampled_ids_N, temperatures_N)
    with torch.cuda.device_of(x_NV):
        candidate_rows_kernel[(N,)](
            x_NV,
            x_NV.stride(0),
            V,
            K,
            sampled_ids_N,
            temperatures_N,
            ids_NK,
            logprobs_NK,
            counts_N,
            sampled_N,
            entropy_N,
            1 / temperature,
            softcap or 1.0,
            threshold,
            BLOCK=launch.block,
            BLOCKS=triton.next_power_of_2(triton.cdiv(V, launch.block)),
            PART=min(launch.block, max(128, 32 * launch.num_warps)),
            BLOCK_K=min(64, triton.next_power_of_2(max(K, 1))),
            CAPPED=softcap is not None,
            ROW_TEMPERATURE=temperatures_N is not None,
            num_warps=launch.num_warps,
        )
    return ids_NK, logprobs_NK, counts_N, sampled_N, entropy_N
