"""The clipped policy loss of a row and its gradient.

    rho_k = exp(log p_k - log p_old_k)    l_k = -min(rho_k A_k, clip(rho_k) A_k)    c_k = dL/dlog p_k
    dL/dl_v = sum_k c_k [v = id_k] - S p_v - e p_v (log p_v + H),    S = sum_k c_k,  e = -entropy_coef w

Slot 0 is the sampled token with weight w, the others are the candidates with weight alpha w' p_old. Once a visit of
the row has log s, everything else is a few numbers. The sampled token's old log-prob is near the new one, so the shift
of that visit is known (kernels/softmax.py), and it can STORE the exponentials, which are the gradient but for one
factor a row and the columns at ids. Otherwise, and in rows where that does not serve, a second visit writes it.
Shape letters: N rows, V vocabulary, K slots a row (1 + candidates), M metrics.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ipvrm_core.kernels.launch import Launch, architecture_of, contiguous, row_launch
from ipvrm_core.kernels.logit_gradient import in_place, row_scale, sum_at_ids, value_at_ids, write_all
from ipvrm_core.kernels.softmax import load_logits, logit_of, row_statistics

LOG_RATIO_LIMIT = tl.constexpr(40.0)  # that of ipvrm_core.types
METRICS = 8  # loss_sampled, loss_candidates, clip_fraction, candidate_clip_fraction, ratio, kl_old, kl_ref, entropy


class Clip(NamedTuple):
    """rho is clipped to [1 - low, 1 + high]; on negative advantages the loss is capped at dual |A|."""

    low: float
    high: float
    dual: float  # inf: no cap


@triton.jit
def policy_rows_kernel(
    p_x,
    stride_x,
    p_out,
    stride_out,
    V,
    K,
    p_ids,
    p_old,
    p_advantages,
    p_weight,
    p_candidate_weight,
    p_ref,
    p_temperature,
    p_metrics,
    p_scale,
    inv_temperature,
    cap,
    alpha,
    kl_coef,
    entropy_coef,
    low,
    high,
    dual,
    candidate_low,
    candidate_high,
    candidate_dual,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAPPED: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr,
    REFERENCE: tl.constexpr,
    GRADIENT: tl.constexpr,
    ENTROPY: tl.constexpr,
    ON_POLICY: tl.constexpr,
    KL_RATIO: tl.constexpr,
    IN_PLACE: tl.constexpr,
    STORE: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    p_row = p_x + i_n * stride_x
    o_k = tl.arange(0, BLOCK_K)
    if ROW_TEMPERATURE:
        inv_temperature = 1 / tl.load(p_temperature + i_n)
    weight, candidate_weight = tl.load(p_weight + i_n), tl.load(p_candidate_weight + i_n)

    # A masked row is not read at all: its loops have no columns, and what they leave undefined is overwritten.
    live = (weight != 0) | (candidate_weight != 0)
    V_live = tl.where(live, V, 0)
    p_out_row = p_out + i_n * stride_out
    known, reference, near = tl.full([], False, tl.int1), tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    if not ON_POLICY:
        near = tl.load(p_old + i_n * K)
        known, reference = logit_of(p_row, tl.load(p_ids + i_n * K), V_live, cap, CAPPED)
    shift, log_sum, entropy, total = row_statistics(
        p_row, p_out_row, V_live, known, reference, near, inv_temperature, cap, BLOCK, CAPPED, not ON_POLICY, STORE
    )
    shift, log_sum, total = tl.where(live, shift, 0.0), tl.where(live, log_sum, 0.0), tl.where(live, total, 0.0)

    ids = tl.load(p_ids + i_n * K + o_k, mask=o_k < K, other=-1)
    sampled = o_k == 0
    slot_weight = tl.where(sampled, weight, candidate_weight)
    valid = (sampled | (ids >= 0)) & (slot_weight != 0)
    advantage = tl.load(p_advantages + i_n * K + o_k, mask=valid & (o_k < K), other=0.0)
    y = load_logits(p_row, tl.where(ids >= 0, ids, V), V, cap, CAPPED)
    logp = (y - shift) * inv_temperature - log_sum
    # An id beyond V is an error that nobody checked: make it visible.
    logp = tl.where(ids >= V, float("nan"), tl.where(ids >= 0, logp, 0.0))
    old = logp if ON_POLICY else tl.load(p_old + i_n * K + o_k, mask=valid & (o_k < K), other=0.0)
    log_ratio = tl.where(valid, logp - old, 0.0)
    beyond = log_ratio > LOG_RATIO_LIMIT
    log_ratio = tl.where(beyond, LOG_RATIO_LIMIT, log_ratio)
    ratio = tl.exp(log_ratio)
    mass = tl.where(valid, slot_weight * tl.where(sampled, 1.0, tl.exp(old)), 0.0)

    # -min over the two branches: only a ratio beyond the bound on the side A pushes to is clipped.
    up = advantage > 0
    bound = tl.where(up, 1 + tl.where(sampled, high, candidate_high), 1 - tl.where(sampled, low, candidate_low))
    clipped = tl.where(up, ratio > bound, ratio < bound) & (advantage != 0)
    cap_ratio = tl.where(sampled, dual, candidate_dual)
    over = (advantage < 0) & (ratio > cap_ratio)
    bound, clipped = tl.where(over, cap_ratio, bound), clipped | over
    loss = mass * tl.where(clipped, -bound * advantage, -ratio * advantage)
    c = tl.where(clipped | beyond, 0.0, mass * -ratio * advantage) * tl.where(sampled, 1.0, alpha)

    kl_ref = tl.zeros([], tl.float32)
    if REFERENCE:
        log_ref = tl.load(p_ref + i_n, mask=weight != 0, other=0.0) - tl.sum(tl.where(sampled & valid, logp, 0.0), 0)
        log_ref = tl.where(weight != 0, log_ref, 0.0)
        far = log_ref > LOG_RATIO_LIMIT
        log_ref = tl.where(far, LOG_RATIO_LIMIT, log_ref)
        kl_ref = weight * (tl.exp(log_ref) - 1 - log_ref)
        slope = tl.where(far, 0.0, weight * (1 - tl.exp(log_ref)))
        if KL_RATIO:  # rho k3, whose derivative is rho (k3' + k3)
            sampled_ratio = tl.sum(tl.where(sampled, ratio, 0.0), 0)
            flat = tl.sum(tl.where(sampled & beyond, 1, 0), 0) > 0
            kl_ref *= sampled_ratio
            slope = sampled_ratio * slope + tl.where(flat, 0.0, kl_ref)
        c += tl.where(sampled, kl_coef * slope, 0.0)

    p_m = p_metrics + i_n * 8
    tl.store(p_m + 0, tl.sum(tl.where(sampled, loss, 0.0), 0))
    tl.store(p_m + 1, tl.sum(tl.where(sampled, 0.0, loss), 0))
    tl.store(p_m + 2, tl.sum(tl.where(sampled & clipped, mass, 0.0), 0))
    tl.store(p_m + 3, tl.sum(tl.where(~sampled & clipped, mass, 0.0), 0))
    tl.store(p_m + 4, tl.sum(tl.where(sampled, mass * ratio, 0.0), 0))
    tl.store(p_m + 5, tl.sum(tl.where(sampled, mass * (ratio - 1 - log_ratio), 0.0), 0))
    tl.store(p_m + 6, kl_ref)
    tl.store(p_m + 7, tl.where(weight != 0, weight * entropy, 0.0))

    if GRADIENT:
        c = tl.where(ids >= 0, c, 0.0)
        e = -entropy_coef * weight
        on_p, largest_c = -tl.sum(c, 0), tl.max(tl.abs(c), 0)
        stored, share, scale = row_scale(on_p, largest_c, total, inv_temperature)
        if STORE:
            tl.store(p_scale + i_n, scale)
        # A row without any coefficient (masked, or clipped in both branches) is written as zeros without a read.
        quiet = (tl.sum(tl.abs(c), 0) == 0) & (e == 0)
        entropy = tl.where(e != 0, entropy, 0.0)
        V_left = tl.where(stored, 0, V)
        if IN_PLACE:
            tl.debug_barrier()  # every warp gathers for itself: none may write over what another has yet to gather
        write_all(
            p_row, p_out_row, V_left, tl.where(quiet, 0, V_left), shift, log_sum, inv_temperature, on_p, e, entropy,
            cap, BLOCK, CAPPED, ENTROPY,
        )  # fmt: skip
        tl.debug_barrier()  # the columns at ids are written last, by whichever thread
        c = sum_at_ids(ids, ids, c)
        value = value_at_ids(
            y, c, stored, share, total, shift, log_sum, inv_temperature, on_p, e, entropy, cap, CAPPED, ENTROPY
        )
        tl.store(p_out_row + ids, value, mask=(ids >= 0) & (ids < tl.where(quiet, 0, V)))


def policy_rows(
    x_NV: Tensor,
    out_NV: Tensor | None,
    ids_NK: Tensor,
    old_logprobs_NK: Tensor | None,
    advantages_NK: Tensor,
    weights_N: Tensor,
    candidate_weights_N: Tensor,
    ref_logprobs_N: Tensor | None,
    *,
    alpha: float,
    clip: Clip,
    candidate_clip: Clip,
    kl_coef: float = 0.0,
    kl_ratio: bool = False,
    entropy_coef: float = 0.0,
    temperature: float = 1.0,
    temperatures_N: Tensor | None = None,
    softcap: float | None = None,
    metrics_NM: Tensor | None = None,
    scale_N: Tensor | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """Weighted metrics [N, 8] float32. Into `out` [N, V], unless that is None: dL/dx, or G with dL/dx = scale G.

    x, out: rows of stride 1; `out` may be x itself where no scale is asked for. ids [N, K] int64, slot 0 the sampled
    token, < 0 padding, >= V gives NaN. Everything else float32; values under padding or weight 0 change nothing.
    Without old log-probs the present ones take their place, as constants. metrics, scale: memory for the results,
    contiguous; with scale [N] rows are visited once, which needs old log-probs and no entropy gradient.
    """
    (N, V), K = x_NV.shape, ids_NK.shape[1]
    launch = launch or row_launch(architecture_of(x_NV.device), x_NV.element_size(), V)
    if metrics_NM is None:
        metrics_NM = torch.empty(N, METRICS, dtype=torch.float32, device=x_NV.device)
    slots = contiguous(ids_NK, old_logprobs_NK, advantages_NK)
    vectors = contiguous(weights_N, candidate_weights_N, ref_logprobs_N, temperatures_N)
    target_NV = x_NV if out_NV is None else out_NV
    aliased = out_NV is not None and in_place(x_NV, out_NV)
    assert scale_N is None or not (aliased or out_NV is None or old_logprobs_NK is None or entropy_coef)
    with torch.cuda.device_of(x_NV):
        policy_rows_kernel[(N,)](
            x_NV,
            x_NV.stride(0),
            target_NV,
            target_NV.stride(0),
            V,
            K,
            *slots,
            *vectors,
            metrics_NM,
            scale_N,
            1 / temperature,
            softcap or 1.0,
            alpha,
            kl_coef,
            entropy_coef,
            *clip,
            *candidate_clip,
            BLOCK=launch.block,
            BLOCK_K=triton.next_power_of_2(K),
            CAPPED=softcap is not None,
            ROW_TEMPERATURE=temperatures_N is not None,
            REFERENCE=ref_logprobs_N is not None,
            GRADIENT=out_NV is not None,
            ENTROPY=entropy_coef != 0,
            ON_POLICY=old_logprobs_NK is None,
            KL_RATIO=kl_ratio,
            IN_PLACE=aliased,
            STORE=scale_N is not None,
            num_warps=launch.num_warps,
        )
    return metrics_NM
