"""The candidates' loss beside TRL's, in the weights of its loss_type; and the fused loss in place of TRL's.

Shape letters: B answers, T padded length, N tokens of the mask, n of a chunk, S = 1 + K slots.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ipvrm_core.heads import Head, at_forward
from ipvrm_core.integrations.advantages import at_answers
from ipvrm_core.integrations.trl.passes import Batch
from ipvrm_core.integrations.trl.settings import BY_ROWS, trl_version
from ipvrm_core.ops.distrl_loss import distrl_loss
from ipvrm_core.ops.row_loss import row_loss
from ipvrm_core.reference.policy_loss import bounded_exp, ppo_terms
from ipvrm_core.types import LogProbs, PolicyBatch, PolicyLossConfig


def token_weights(trainer, inputs, mask_BT: Tensor) -> Tensor:
    """The weight of each token in TRL's loss_type: its loss is the sum of weight times the token's loss. [B, T]."""
    training, kind, m = trainer.model.training, trainer.loss_type, mask_BT.float()
    accumulation = trainer.current_gradient_accumulation_steps if training else 1
    if kind in ("grpo", "sapo"):
        return m / m.sum(1, keepdim=True).clamp(min=1) / len(m) / accumulation
    if kind == "bnpo":
        return m / m.sum().clamp(min=1) / accumulation
    if kind == "dr_grpo":
        return m / (len(m) * trainer.max_completion_length) / accumulation
    if kind == "luspo":
        return m / len(m) / accumulation
    if kind not in ("dapo", "cispo", "vespo"):
        raise ValueError(f"loss_type {kind!r} is not known to DistRL")
    tokens = inputs["num_items_in_batch"].clamp(min=1) / trainer.accelerator.num_processes
    if training and trl_version() >= (1, 9):  # before, TRL took the tokens of a generation batch for those of a step
        tokens = tokens * accumulation / trainer.args.steps_per_generation
    return m / tokens


def with_candidates(trainer, inputs, own_loss: Callable[[], Tensor]) -> Tensor:
    """own_loss(), which runs TRL's forward, + alpha times the candidates' loss on the hidden states of that forward."""
    batch = Batch.of(inputs)
    rows, config = _policy_batch(trainer, inputs, batch, sampled=False), trainer.distrl.loss_config()

    def candidates(hidden_ND: Tensor, head: Head):
        return distrl_loss(hidden_ND, head.weight, rows, head.settle(config, trainer.temperature), bias=head.bias)

    with at_forward(trainer.model, at_answers(batch.mask_BT, candidates)) as found:
        loss = own_loss()
    ((term, metrics),) = found
    for name in ("loss_candidates", "candidate_clip_fraction"):
        trainer.log_distrl(name, metrics[name])
    return loss + term


def fused(trainer, model, inputs) -> Tensor:
    """TRL's loss and the candidates' in one function of the hidden states."""
    batch = Batch.of(inputs)
    rows = _policy_batch(trainer, inputs, batch, sampled=True)
    config = trainer.distrl.loss_config(
        clip_low=trainer.epsilon_low,
        clip_high=trainer.epsilon_high,
        dual_clip=trainer.args.delta,
        kl_coef=trainer.beta,
        kl_ratio=bool(trainer.args.use_bias_correction_kl),
    )

    def loss(hidden_ND: Tensor, head: Head):
        settled = head.settle(config, trainer.temperature)
        if trainer.loss_type not in BY_ROWS:
            return distrl_loss(hidden_ND, head.weight, rows, settled, bias=head.bias)
        how = head.options(trainer.temperature)
        return row_loss(hidden_ND, head.weight, rows.ids_NS, row_terms(trainer, rows, settled), **how), {}

    at_head = at_answers(batch.mask_BT, loss)
    with trainer.accelerator.autocast():
        total, metrics = model(input_ids=batch.ids_BL, attention_mask=batch.attention_BL, at_head=at_head)
    weight = rows.token_weights_N.sum().clamp(min=torch.finfo(torch.float32).tiny)
    for name, value in metrics.items():
        trainer.log_distrl(name, value if "candidate" in name else value / weight)
    return total


def row_terms(trainer, batch: PolicyBatch, config: PolicyLossConfig) -> Callable[[LogProbs, slice], Tensor]:
    """For `row_loss`: TRL's loss types that are not clipped products, and the candidates beside them.

    cispo: -stopgrad(min(rho, epsilon_high)) A log pi; sapo: -4/tau sigmoid(tau (rho - 1)) A, tau by the sign of A.
    """
    slots_NS = batch.old_logprobs_NS
    assert slots_NS is not None  # of `_policy_batch`
    low, high = trainer.args.sapo_temperature_neg, trainer.args.sapo_temperature_pos
    clips = config.candidate_clip_low, config.candidate_clip_high, config.candidate_dual_clip

    def sampled(new_n: Tensor, old_n: Tensor, advantages_n: Tensor) -> Tensor:
        ratio_n = bounded_exp(new_n - old_n)
        if trainer.loss_type == "cispo":
            return -ratio_n.clamp(max=trainer.epsilon_high).detach() * advantages_n * new_n
        tau_n = torch.where(advantages_n > 0, high, low)
        return -torch.sigmoid(tau_n * (ratio_n - 1)) * 4 / tau_n * advantages_n

    def terms(logprobs: LogProbs, rows: slice) -> Tensor:
        own, new_nS = batch.rows(rows), logprobs.logprobs_NK
        old_nS, advantages_nS = slots_NS[rows].to(new_nS.dtype), own.advantages_NS.to(new_nS.dtype)
        loss = (own.token_weights_N * sampled(new_nS[:, 0], old_nS[:, 0], advantages_nS[:, 0])).sum()
        mass_nK = old_nS[:, 1:].exp().masked_fill(own.ids_NS[:, 1:] < 0, 0.0) * own.candidate_weights_N[:, None]
        return (
            loss + config.alpha * (mass_nK * ppo_terms((new_nS - old_nS)[:, 1:], advantages_nS[:, 1:], *clips)[0]).sum()
        )

    return terms


def _policy_batch(trainer, inputs, batch: Batch, sampled: bool) -> PolicyBatch:
    """The rows of a micro-batch in the weights of TRL's loss_type; sampled=False: the candidates alone."""
    ids_NS, old_NS, advantages_NS = (torch.cat(column) for column in zip(*inputs["distrl"], strict=True))
    mask_BT = batch.mask_BT
    weights_N = token_weights(trainer, inputs, mask_BT)[mask_BT]
    if not sampled:
        return PolicyBatch(ids_NS, old_NS, advantages_NS, torch.zeros_like(weights_N), weights_N)
    advantages_NS = torch.cat([inputs["advantages"][mask_BT][:, None], advantages_NS[:, 1:]], dim=1)
    if inputs.get("old_per_token_logps") is not None:
        old_NS = torch.cat([inputs["old_per_token_logps"][mask_BT][:, None], old_NS[:, 1:]], dim=1)
    ref_N = inputs["ref_per_token_logps"][mask_BT] if trainer.beta else None
    token_weights_N = weights_N
    if "importance_sampling_ratio" in inputs:
        token_weights_N = weights_N * inputs["importance_sampling_ratio"].expand(mask_BT.shape)[mask_BT]
    return PolicyBatch(ids_NS, old_NS, advantages_NS, token_weights_N, weights_N, ref_N)
