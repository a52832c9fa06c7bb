"""The DistRL objective: the clipped policy loss on the sampled token and on its candidates."""

from dataclasses import replace

import torch
from torch import Tensor

from ipvrm_core.dispatch import resolve
from ipvrm_core.fused.distrl_loss import DistrlLossInPlace, pack_batch, pack_config
from ipvrm_core.fused.distrl_loss import distrl_loss as fused
from ipvrm_core.fused.shard import VocabularyShard
from ipvrm_core.ops import checks
from ipvrm_core.reference import policy_loss as reference
from ipvrm_core.types import METRICS, PolicyBatch, PolicyLossConfig, PolicyLossOutput


def distrl_loss(
    hidden: Tensor,
    weight: Tensor,
    batch: PolicyBatch,
    config: PolicyLossConfig | None = None,
    *,
    bias: Tensor | None = None,
    backend: str = "auto",
    shard: VocabularyShard | None = None,
    bfloat16_logits: bool = False,
    max_buffer_bytes: int | None = None,
) -> PolicyLossOutput:
    """L = sum_t w_t l(rho_t(y_t), A_t) + alpha sum_t w'_t sum_{v in C_t} pi_old(v) l(rho_t(v), A_TD_t(v)) + ...

    with l(rho, A) = -min(rho A, clip(rho) A) and pi = softmax((h W^T + b) / T); KL and entropy terms, the soft cap and
    all settings are in PolicyLossConfig. hidden [N, D], weight [V, D], bias [V]; batch of N rows. Returns the loss
    (0-d, float32 or float64) and the detached metrics of types.METRICS. N = 0: all are 0, gradients are zeros.

    The gradient flows into hidden, weight and bias through `loss`, once (no second derivative), and is made in the
    forward: 2 products for a frozen weight, 3 with its gradient, 1 when nothing needs a gradient or under no_grad.
    It is kept from forward to backward: [N, D] and [V, D] in the dtypes of hidden and weight. Under activation
    checkpointing the forward runs twice, so leave the loss out of it.

    Rows of weight 0 in both branches contribute nothing. On a CPU they do not enter the products; on a GPU that would
    take a wait for their number, so leave them out beforehand: live = ~batch.masked_N, hidden[live], batch.rows(live).

    shard: weight (and bias) are this rank's part of a head that is split over a process group, `VocabularyShard.of`;
    everything else is equal on all ranks, and so are the results; gradients of weight and bias are those of the part.

    bfloat16_logits: the Triton kernels read x = h W^T + b rounded to bfloat16 (by up to 2^-9 of a logit), 4 bytes a
    logit with its gradient instead of 6; for hidden and weight in bfloat16. What it costs: docs/results/checks.md.

    max_buffer_bytes bounds the private [rows, V] buffers, one row at least; None is the device's default.
    Raises ValueError for wrong shapes, dtypes or devices, for kl_coef > 0 without ref_logprobs_N, for bfloat16_logits
    with another dtype or backend and, on CPU, for ids >= V. Source: the paper, see reference/policy_loss.py.
    """
    return _run(hidden, weight, bias, batch, config, backend, max_buffer_bytes, shard, bfloat16_logits=bfloat16_logits)


def distrl_loss_from_logits(
    logits: Tensor,
    batch: PolicyBatch,
    config: PolicyLossConfig | None = None,
    *,
    inplace: bool = False,
    backend: str = "auto",
    max_buffer_bytes: int | None = None,
) -> PolicyLossOutput:
    """`distrl_loss` of given logits [N, V]; the gradient is one [N, V] in their dtype.

    inplace: the gradient takes the memory of the logits, which are lost in this call (where a gradient is wanted); the
    backward works once. Nothing upstream may need the logits for its own backward; a linear head does not. Not with
    backend 'reference'. float16: gradients below 6e-8 round to 0, and a later loss scale cannot bring them back.
    """
    return _run(logits, None, None, batch, config, backend, max_buffer_bytes, inplace=inplace)


def _run(
    hidden, weight, bias, batch, config, backend, max_buffer_bytes, shard=None, inplace=False, bfloat16_logits=False
) -> PolicyLossOutput:
    config = config or PolicyLossConfig()
    hidden, weight, bias = checks.local_parts(hidden, weight, bias, shard)
    N, V = checks.check_head(hidden, weight, bias)
    V, packed = checks.checked_shard(shard, backend, V)
    checks.check_ids("ids_NS", batch.ids_NS, (N, None), V, hidden)
    if config.kl_coef and batch.ref_logprobs_N is None:
        raise ValueError("kl_coef > 0 needs batch.ref_logprobs_N; got None")
    if batch.temperatures_N is not None:
        if config.temperature != 1:
            raise ValueError(f"temperature must be 1 beside batch.temperatures_N; got {config.temperature}")
        batch = replace(batch, temperatures_N=batch.temperatures_N.masked_fill(batch.masked_N, 1.0))
        checks.checked_transform(batch.temperatures_N, None, N, hidden)
    if weight is not None and checks.readable(batch.token_weights_N) and batch.masked_N.any():
        live = (~batch.masked_N).nonzero()[:, 0]  # the others would be zeros in every product
        hidden, batch = hidden[live], batch.rows(live)
    budget = checks.checked_budget(max_buffer_bytes, hidden, weight)
    backend = resolve(backend, hidden, weight, bias)
    checks.check_bfloat16_logits(bfloat16_logits, backend, hidden, weight, shard)
    if backend == "reference":
        if inplace:
            raise ValueError("inplace=True needs backend 'triton' or 'chunked'; got 'reference'")
        if weight is None:
            return reference.distrl_loss_from_logits(hidden, batch, config)
        return reference.distrl_loss(hidden, weight, batch, config, bias_V=bias)

    need = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    given, settings = (pack_batch(batch), pack_config(config)), (budget, backend == "triton")
    if inplace and need[0]:
        loss, metrics_M = DistrlLossInPlace.apply(hidden, *given, *settings)
    else:
        loss, metrics_M, *_ = fused(hidden, weight, bias, *given, packed, bfloat16_logits, *settings, need)
    return PolicyLossOutput(loss, dict(zip(METRICS, metrics_M.unbind(), strict=True)))
