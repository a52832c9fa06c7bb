"""Candidates, TD errors, advantages and loss of an on-policy step in one go over the chunks of both heads.

pi_old is the policy itself, so its logits, for which select_candidates and distrl_loss would each make a product, are
made once: policy logits, reward-model logits, dh (and dW) are 3 products with a frozen head where the three calls take
4, and the old policy's forward pass is not made at all.

Shape letters: N rows, n rows of one chunk, D hidden size, V vocabulary, S = 1 + K slots, M metrics.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ipvrm_core.fused.head import HeadGradients, wide_dtype
from ipvrm_core.fused.policy_terms import policy_terms, total_loss
from ipvrm_core.fused.rows import row_work
from ipvrm_core.fused.select_candidates import candidates_of, slots
from ipvrm_core.fused.shard import VocabularyShard
from ipvrm_core.fused.transform import LogitTransform
from ipvrm_core.fused.upstream import times_upstream
from ipvrm_core.reference.candidates import log_threshold
from ipvrm_core.types import METRICS, PolicyBatch, PolicyLossConfig


class RewardHead(NamedTuple):
    """The reward model's [N, D'], [V, D'], [V] and the numbers that make an advantage of its log-probs."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None
    beta: float
    sigma: float | Tensor  # sigma_V


class OnPolicyLoss(torch.autograd.Function):
    """(loss 0-d, metrics [M], the fields of Candidates, TD errors [N, S]); the gradient flows through the loss."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        batch: PolicyBatch,
        reward: RewardHead,
        rule: dict,
        settings: PolicyLossConfig,
        shard: VocabularyShard | None,
        max_buffer_bytes: int,
        triton: bool,
        need: list[bool],
    ):
        transform = LogitTransform(settings.temperature, batch.temperatures_N, settings.softcap)
        common = {"masked_N": batch.masked_N, "shard": shard}
        V, half = len(weight) if shard is None else shard.vocabulary, max(1, max_buffer_bytes // 2)
        k, K = slots(rule["p_min"], V, rule["top_k"], rule["keep_sampled"])
        wide, N = wide_dtype(hidden, weight, bias), len(hidden)
        ids_NS, counts_N = batch.ids_NS.new_empty(N, 1 + K), batch.ids_NS.new_empty(N)
        shapes = (N, 1 + K), (N,), (N, 1 + K), (N, len(METRICS))
        old_NS, entropy_N, delta_NS, metrics_NM = (hidden.new_empty(shape, dtype=wide) for shape in shapes)
        work = row_work(triton, hidden, weight, bias, transform, half, with_gradient=any(need), **common)
        judge = row_work(triton, *reward[:3], transform, half, near_N=old_NS[:, 0], **common)
        work.head.n = judge.head.n = min(work.head.n, judge.head.n)
        gradients, last_rule = HeadGradients(work.head, need, shard=shard), (rule["top_k"], rule["keep_sampled"])
        threshold = log_threshold(rule["p_min"], rule["strict"])

        def terms(rows: slice, *found: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
            exclude_n = None if rule["exclude"] is None else rule["exclude"][rows]
            in_order = triton and shard is None
            chosen = candidates_of(found, batch.ids_NS[rows, 0], K, in_order, *last_rule, exclude_n)
            ids_NS[rows], old_NS[rows], counts_N[rows], entropy_N[rows] = chosen
            ids_nS, old_nS, _, entropy_n = chosen
            delta_NS[rows] = judge.td_errors(rows, judge.head.logits(rows), ids_nS, old_nS, reward.beta)
            advantages_nS = delta_NS[rows] / reward.sigma
            advantages_nS[:, 0] = batch.advantages_NS[rows, 0]
            batch_n = replace(batch.rows(rows), ids_NS=ids_nS, advantages_NS=advantages_nS)
            made = policy_terms(old_nS, entropy_n, batch_n, settings)
            metrics_NM[rows] = made.metrics_NM
            return ids_nS, made.c_NS, made.grad_entropy_N if settings.entropy_coef else None

        for rows, x_nV in work.head.chunks():
            target_nV = gradients.target(rows, x_nV) if any(need) else None
            gradient = work.on_policy(rows, x_nV, target_nV, batch.ids_NS[rows, 0], k, threshold, partial(terms, rows))
            if gradient is not None:
                gradients.add(rows, gradient)
        ctx.need, ctx.triton = need, triton
        ctx.save_for_backward(*gradients.result(hidden, weight, bias))
        metrics_M = metrics_NM.sum(0)
        rest = (metrics_M, ids_NS, old_NS, counts_N, entropy_N, delta_NS)
        ctx.mark_non_differentiable(*rest)
        return total_loss(dict(zip(METRICS, metrics_M.unbind(), strict=True)), settings), *rest

    @staticmethod
    def backward(ctx, grad_loss, *_):
        return *times_upstream(ctx, grad_loss), *[None] * 8
