"""From a batch of answers to advantages: old-policy pass, reward-model update, scoring, TD and outcome credit.

Shape letters: N packed response tokens, B answers, K candidates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ipvrm_core import (
    Candidates,
    center_on_candidates,
    difficulty_boundary,
    dynamic_loss_weights,
    linear_td_errors,
    outcome_advantages,
    prefix_values,
    process_advantages,
    select_candidates,
    sigma_v,
    value_moments,
)
from ipvrm_core.objectives import Objective
from ipvrm_core.packing import cu_seqlens_from_lengths
from ipvrm_core.presets import Preset
from ipvrm_core.reference.segments import expand
from ipvrm_core.trainer.batching import map_rows
from ipvrm_core.trainer.collect import Collected
from ipvrm_core.trainer.config import RlRewardModel
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.models import head_of
from ipvrm_core.trainer.optim import apply_step
from ipvrm_core.trainer.reward import auc, backward_reward_loss


@dataclass(frozen=True)
class Credit:
    """What the policy update needs, per response token. delta_NK and values_N are None without a reward model."""

    cu_seqlens: Tensor
    old_logprobs_N: Tensor
    advantages_N: Tensor
    candidates: Candidates | None
    delta_NK: Tensor | None  # TD errors of the candidates; divided by sigma_V when a minibatch is made
    values_N: Tensor | None
    numbers: dict[str, float]


@torch.no_grad()
def assign(
    experiment: Experiment,
    preset: Preset,
    batch: Collected,
    old: "OldPolicy",
    reward_model: nn.Module | None,
    objective: Objective | None,
) -> Credit:
    """A_t = outcome + gae_coef * A_GAE for the sampled tokens, delta for the candidates."""
    total = len(old.logprobs_N)
    outcome_B = outcome_advantages(batch.rewards_B, batch.groups_B)
    advantages_N = expand(outcome_B, old.cu_seqlens, total)
    if reward_model is None:
        return Credit(old.cu_seqlens, old.logprobs_N, advantages_N, None, None, None, old.numbers)

    delta_N, delta_NK = _td_errors(experiment, reward_model, batch, old, objective.beta)
    last_N = torch.zeros(total, dtype=torch.bool, device=advantages_N.device)
    last_N[old.cu_seqlens[1:] - 1] = True
    values_N = prefix_values(delta_N, old.cu_seqlens, beta=1.0)  # beta is in delta already
    if preset.candidate_baseline == "mean":
        delta_NK = center_on_candidates(delta_NK, old.candidates.ids_NK, old.candidates.logprobs_NK)
    if preset.skip_last_token:
        delta_N = delta_N.masked_fill(last_N, 0.0)
    sigma = sigma_v(value_moments(values_N), preset.sigma_form)
    process_N = process_advantages(
        delta_N,
        old.cu_seqlens,
        batch.groups_B,
        normalize=preset.gae_normalize,
        sigma=sigma,
        gamma=preset.gamma,
        lam=preset.lam,
    )
    numbers = {
        **old.numbers,
        "sigma_v": sigma.item(),
        "rm_auc": _nan_to_none(auc(values_N[last_N], batch.rewards_B)),
        "rm_accuracy": ((values_N[last_N] > 0) == (batch.rewards_B > 0)).float().mean().item(),
        "rm_score_per_token": delta_N.mean().item(),
        "gae_std": _std(process_N),
        "candidate_td_std": _std((delta_NK / sigma)[old.candidates.ids_NK >= 0]) if preset.alpha else 0.0,
    }
    advantages_N = advantages_N + preset.gae_coef * process_N
    return Credit(
        old.cu_seqlens,
        old.logprobs_N,
        advantages_N,
        old.candidates,
        delta_NK,
        values_N,
        {name: value for name, value in numbers.items() if value is not None},
    )


def _nan_to_none(value: float) -> float | None:
    return None if value != value else value


def _std(values: Tensor) -> float | None:
    return values.std().item() if values.numel() > 1 else None


@dataclass(frozen=True)
class OldPolicy:
    """Log-probs and candidate sets under the policy that sampled the batch, from one pass."""

    cu_seqlens: Tensor
    logprobs_N: Tensor
    candidates: Candidates
    numbers: dict[str, float]


def old_policy(experiment: Experiment, model: nn.Module, preset: Preset, batch: Collected) -> OldPolicy:
    """The old-policy pass. Candidates are of the full distribution at the sampling temperature."""
    lengths_B = torch.tensor([len(answer.response_ids) for answer in batch.answers], device=experiment.device)
    cu_seqlens = cu_seqlens_from_lengths(lengths_B)
    last_N = torch.zeros(int(lengths_B.sum()), dtype=torch.bool, device=experiment.device)
    last_N[cu_seqlens[1:] - 1] = True
    head = head_of(model)

    def function(hidden_ND, tokens, rows):
        return select_candidates(
            hidden_ND,
            head.weight,
            tokens.targets_N,
            **preset.candidate_rule(),
            exclude=last_N[rows] if preset.skip_last_token else None,
            temperature=experiment.config.generation.temperature,
            **head.options,
        )

    candidates = Candidates(*map_rows(model, batch.answers, experiment.config.micro_batch_tokens, function))
    mass_N = torch.where(candidates.ids_NK >= 0, candidates.logprobs_NK.exp(), 0.0).sum(-1)
    numbers = {
        "candidates": candidates.counts_N.float().mean().item(),
        "candidate_mass": mass_N.mean().item(),
        "several_candidates": (candidates.counts_N > 1).float().mean().item(),
        "entropy": candidates.entropy_N.mean().item(),
    }
    return OldPolicy(cu_seqlens, candidates.sampled_logprobs_N, candidates, numbers)


def _td_errors(
    experiment: Experiment, model: nn.Module, batch: Collected, old: OldPolicy, beta: float
) -> tuple[Tensor, Tensor]:
    """delta of the sampled tokens [N] and of the candidates [N, K], in one pass of the reward model."""
    head, temperature = head_of(model), experiment.config.generation.temperature
    old_NK = torch.cat([old.logprobs_N[:, None], old.candidates.logprobs_NK], dim=1)

    def function(hidden_ND, tokens, rows):
        ids_NK = torch.cat([tokens.targets_N[:, None], old.candidates.ids_NK[rows]], dim=1)
        options = {"temperature": temperature, **head.options}
        return (linear_td_errors(hidden_ND, head.weight, ids_NK, old_NK[rows], beta, **options),)

    model.eval()
    delta_NK = map_rows(model, batch.answers, experiment.config.micro_batch_tokens, function)[0]
    return delta_NK[:, 0], delta_NK[:, 1:]


def update_reward_model(
    experiment: Experiment,
    preset: Preset,
    settings: RlRewardModel,
    objective: Objective,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Collected,
    ref_logprobs_N: Tensor,
    cu_seqlens: Tensor,
    step: int,
    total: int,
) -> dict[str, float]:
    """One online pass over the batch with the difficulty boundary and the dynamic loss weights (paper eq. 15)."""
    weights_B = dynamic_loss_weights(batch.rewards_B, batch.group_mean_B, preset.dlw_scale)
    boundary_B = difficulty_boundary(batch.group_mean_B)
    order = torch.randperm(len(batch.answers)).tolist()
    bounds = cu_seqlens.tolist()
    model.train()
    losses, norm = [], 0.0
    for start in range(0, len(order), settings.batch):
        index = order[start : start + settings.batch]
        rows_N = torch.cat([torch.arange(bounds[b], bounds[b + 1]) for b in index]).to(ref_logprobs_N.device)
        losses.append(
            backward_reward_loss(
                experiment,
                model,
                objective,
                [batch.answers[b] for b in index],
                ref_logprobs_N[rows_N],
                batch.rewards_B[index],
                weights_B[index] / len(index),
                boundary_B[index],
            )
        )
        norm = apply_step(optimizer, settings.optim, step, total)
    return {"rm_loss": sum(losses) / len(losses), "rm_grad_norm": norm}
