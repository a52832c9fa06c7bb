"""The PPO part: epochs over minibatches of whole answers, micro-batches inside, one fused loss.

Shape letters: N packed response tokens of a minibatch, K candidates.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from ipvrm_core import (
    PolicyBatch,
    PolicyLossConfig,
    branch_weights,
    distrl_loss,
    normalizers,
    sigma_v,
    td_advantages,
    value_moments,
)
from ipvrm_core.packing import cu_seqlens_from_lengths
from ipvrm_core.method import Preset
from ipvrm_core.sequences.aggregation import candidate_mass
from ipvrm_core.trainer.batching import TokenBatch, micro_batches, response_hidden
from ipvrm_core.trainer.collect import Collected
from ipvrm_core.trainer.config import Rl
from ipvrm_core.trainer.credit import Credit
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.models import head_of
from ipvrm_core.trainer.optim import apply_step


def update_policy(
    experiment: Experiment,
    rl: Rl,
    preset: Preset,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Collected,
    credit: Credit,
    ref_logprobs_N: Tensor | None,
    step: int,
) -> dict[str, float]:
    """All PPO steps on one batch; metrics are means over the minibatches."""
    loss_config = preset.loss_config(
        experiment.config.generation.temperature,
        kl_coef=rl.kl_coef,
        entropy_coef=rl.entropy_coef,
        **({} if credit.delta_NK is not None else {"alpha": 0.0}),
    )
    model.train()
    sums: dict[str, float] = {}
    count = 0
    for index in _minibatches(len(batch.answers), rl):
        numbers = _one_step(experiment, loss_config, preset, model, batch, credit, ref_logprobs_N, index)
        numbers["grad_norm"] = apply_step(optimizer, rl.optim, step, rl.steps)
        sums = {name: sums.get(name, 0.0) + value for name, value in numbers.items()}
        count += 1
    return {name: value / count for name, value in sums.items()}


def _minibatches(size: int, rl: Rl) -> Iterator[list[int]]:
    for _ in range(rl.epochs):
        order = torch.randperm(size).tolist()
        for start in range(0, size, rl.minibatch):
            yield order[start : start + rl.minibatch]


def _one_step(
    experiment: Experiment,
    loss_config: PolicyLossConfig,
    preset: Preset,
    model: nn.Module,
    batch: Collected,
    credit: Credit,
    ref_logprobs_N: Tensor | None,
    index: list[int],
) -> dict[str, float]:
    """Gradient of one minibatch, accumulated over micro-batches that share its normalisers."""
    answers = [batch.answers[b] for b in index]
    bounds = credit.cu_seqlens.tolist()
    rows_N = torch.cat([torch.arange(bounds[b], bounds[b + 1]) for b in index]).to(experiment.device)
    policy_batch = make_policy_batch(preset, credit, answers, rows_N, ref_logprobs_N)
    head = head_of(model)
    loss_config = replace(loss_config, softcap=head.softcap)
    sums: dict[str, Tensor] = {}
    row = 0
    for part in micro_batches(answers, experiment.config.micro_batch_tokens):
        tokens = TokenBatch.make(answers[part], experiment.device)
        rows = slice(row, row + len(tokens.targets_N))
        row = rows.stop
        with experiment.accelerator.autocast():
            hidden = response_hidden(model, tokens)
        loss, metrics = distrl_loss(hidden, head.weight, policy_batch.rows(rows), loss_config, bias=head.bias)
        experiment.accelerator.backward(loss)
        metrics = {"loss": loss.detach(), **metrics}
        sums = {name: sums[name] + value if sums else value for name, value in metrics.items()}
    names = [name for name in sums if name != "entropy"]  # the old-policy pass reports the entropy already
    return dict(zip(names, torch.stack([sums[name] for name in names]).tolist(), strict=True))


def make_policy_batch(
    preset: Preset, credit: Credit, answers: list, rows_N: Tensor, ref_logprobs_N: Tensor | None
) -> PolicyBatch:
    """The rows of one minibatch with its TD scale, aggregation weights and normalisers."""
    lengths_B = torch.tensor([len(answer.response_ids) for answer in answers], device=rows_N.device)
    cu_seqlens = cu_seqlens_from_lengths(lengths_B)
    sampled_N = torch.tensor([t for answer in answers for t in answer.response_ids], device=rows_N.device)
    if credit.delta_NK is None or preset.alpha == 0:
        ids_NK = sampled_N.new_empty(len(sampled_N), 0)
        old_NK = td_NK = credit.old_logprobs_N.new_empty(len(sampled_N), 0)
    else:
        ids_NK, old_NK = credit.candidates.ids_NK[rows_N], credit.candidates.logprobs_NK[rows_N]
        scope_N = credit.values_N[rows_N] if preset.sigma_scope == "minibatch" else credit.values_N
        td_NK = td_advantages(credit.delta_NK[rows_N], sigma_v(value_moments(scope_N), preset.sigma_form))
    mask_N = torch.ones_like(sampled_N, dtype=torch.bool)
    totals = normalizers(cu_seqlens, mask_N, candidate_mass(ids_NK, old_NK))
    token_weights_N, candidate_weights_N = branch_weights(cu_seqlens, mask_N, totals, preset.aggregation)
    return PolicyBatch(
        sampled_ids_N=sampled_N,
        old_logprobs_N=credit.old_logprobs_N[rows_N],
        advantages_N=credit.advantages_N[rows_N],
        token_weights_N=token_weights_N,
        candidate_ids_NK=ids_NK,
        candidate_old_logprobs_NK=old_NK,
        candidate_advantages_NK=td_NK,
        candidate_weights_N=candidate_weights_N,
        ref_logprobs_N=None if ref_logprobs_N is None else ref_logprobs_N[rows_N],
    )
