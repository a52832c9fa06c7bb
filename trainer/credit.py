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
    masked_step_advantages,
    outcome_advantages,
    prefix_values,
    prime_advantages,
    process_advantages,
    rloo_advantages,
    select_candidates,
    sigma_v,
    value_moments,
)
from ipvrm_core.objectives import Objective
from ipvrm_core.packing import cu_seqlens_from_lengths
from ipvrm_core.method import Preset
from ipvrm_core.sequences.segments import expand
from ipvrm_core.trainer.batching import map_rows
from ipvrm_core.trainer.collect import Collected
from ipvrm_core.trainer.config import RlRewardModel
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.models import head_of
from ipvrm_core.trainer.optim import apply_step
from ipvrm_core.trainer.reward import auc, backward_reward_loss, scores


@dataclass(frozen=True)
class Credit:
    """What the policy update needs, per response token.

    delta_NK is None without a reward model or where it scores sampled tokens only, values_N without a reward model.
    """

    cu_seqlens: Tensor
    old_logprobs_N: Tensor
    advantages_N: Tensor
    candidates: Candidates | None
    delta_NK: Tensor | None  # TD errors of the candidates; divided by sigma_V when a minibatch is made
    values_N: Tensor | None  # their spread is sigma_V; with skip_last_token the last one adds nothing
    numbers: dict[str, float]


@torch.no_grad()
def assign(
    experiment: Experiment,
    preset: Preset,
    batch: Collected,
    old: "OldPolicy",
    reward_model: nn.Module | None,
    objective: Objective | None,
    ref_logprobs_N: Tensor | None = None,
    reference: nn.Module | None = None,
) -> Credit:
    """A_t = outcome + gae_coef * process for the sampled tokens, delta for the candidates.

    ref_logprobs_N: of the starting policy, for the self-guided masked step advantage (SPRO) without a reward model.
    reference: the starting policy itself, for td_reference = "sft".
    """
    total = len(old.logprobs_N)
    advantages_N = expand(_outcome(preset, batch), old.cu_seqlens, total)
    if reward_model is None:
        if preset.estimator == "msa":
            own_N = old.logprobs_N - ref_logprobs_N
            advantages_N = advantages_N + preset.gae_coef * masked_step_advantages(
                own_N, old.cu_seqlens, batch.groups_B
            )
        return Credit(old.cu_seqlens, old.logprobs_N, advantages_N, None, None, None, old.numbers)

    delta_N, delta_NK = _td_errors(
        experiment, reward_model, batch, old, objective, reference if preset.td_reference == "sft" else None
    )
    last_N = torch.zeros(total, dtype=torch.bool, device=advantages_N.device)
    last_N[old.cu_seqlens[1:] - 1] = True
    scores_B = prefix_values(delta_N, old.cu_seqlens, beta=1.0)[last_N]  # beta is in delta already
    if preset.candidate_baseline == "mean" and delta_NK is not None:
        delta_NK = center_on_candidates(delta_NK, old.candidates.ids_NK, old.candidates.logprobs_NK)
    if preset.skip_last_token:
        delta_N = delta_N.masked_fill(last_N, 0.0)
    values_N = prefix_values(delta_N, old.cu_seqlens, beta=1.0)
    sigma = sigma_v(value_moments(values_N), preset.sigma_form)
    if preset.estimator == "prime":  # whitens outcome and process together
        advantages_N = process_N = prime_advantages(
            delta_N, batch.rewards_B, old.cu_seqlens, batch.groups_B, coef=preset.gae_coef
        )
    else:
        process_N = _process(preset, delta_N, sigma, old.cu_seqlens, batch.groups_B)
        advantages_N = advantages_N + preset.gae_coef * process_N
    numbers = {
        **old.numbers,
        "sigma_v": sigma.item(),
        "rm_auc": _nan_to_none(auc(scores_B, batch.rewards_B)),
        "rm_accuracy": ((scores_B > 0) == (batch.rewards_B > 0)).float().mean().item(),
        "rm_score_per_token": delta_N.mean().item(),
        "gae_std": _std(process_N),
    }
    if delta_NK is not None:
        shown = old.candidates.ids_NK >= 0
        numbers["candidate_td_std"] = _std((delta_NK / sigma)[shown]) if preset.alpha else 0.0
    return Credit(
        old.cu_seqlens,
        old.logprobs_N,
        advantages_N,
        old.candidates,
        delta_NK,
        values_N,
        {name: value for name, value in numbers.items() if value is not None},
    )


def _outcome(preset: Preset, batch: Collected) -> Tensor:
    """The advantage of a whole answer, [B]: GRPO, RLOO, or the reward itself (REINFORCE without a baseline)."""
    if preset.outcome == "grpo":
        return outcome_advantages(batch.rewards_B, batch.groups_B)
    return rloo_advantages(batch.rewards_B, batch.groups_B) if preset.outcome == "rloo" else batch.rewards_B


def _process(preset: Preset, delta_N: Tensor, sigma: Tensor, cu_seqlens: Tensor, groups_B: Tensor) -> Tensor:
    """The advantage of each token, [N]. td: the normalised error itself; mc: their suffix sum; gae: between the two."""
    if preset.estimator == "none":
        return torch.zeros_like(delta_N)
    if preset.estimator == "msa":
        return masked_step_advantages(delta_N, cu_seqlens, groups_B)
    lam = {"td": 0.0, "mc": 1.0, "gae": preset.lam}[preset.estimator]
    return process_advantages(
        delta_N,
        cu_seqlens,
        groups_B,
        normalize=preset.gae_normalize,
        sigma=sigma,
        gamma=preset.gamma,
        lam=lam,
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
    experiment: Experiment,
    model: nn.Module,
    batch: Collected,
    old: OldPolicy,
    objective: Objective,
    reference: nn.Module | None,
) -> tuple[Tensor, Tensor | None]:
    """delta of the sampled tokens [N] and of the candidates [N, K], in one pass of the reward model.

    Against the old policy, or a pass of `reference`. With a value head, beta times the scores of the sampled tokens,
    and None.
    """
    model.eval()
    if objective.head == "value":
        return objective.beta * scores(experiment, model, objective, batch.answers), None
    against_NK = torch.cat([old.logprobs_N[:, None], old.candidates.logprobs_NK], dim=1)
    if not objective.reference:
        against_NK = torch.zeros_like(against_NK)
    elif reference is not None:
        against_NK = _errors(experiment, reference, batch, old, torch.zeros_like(against_NK), 1.0)
    delta_NK = _errors(experiment, model, batch, old, against_NK, objective.beta)
    return delta_NK[:, 0], delta_NK[:, 1:]


def _errors(
    experiment: Experiment, model: nn.Module, batch: Collected, old: OldPolicy, against_NK: Tensor, beta: float
) -> Tensor:
    """beta (log p - against) of the sampled token and the candidates at every position, [N, 1 + K]."""
    head, temperature = head_of(model), experiment.config.generation.temperature

    def function(hidden_ND, tokens, rows):
        ids_NK = torch.cat([tokens.targets_N[:, None], old.candidates.ids_NK[rows]], dim=1)
        options = {"temperature": temperature, **head.options}
        return (linear_td_errors(hidden_ND, head.weight, ids_NK, against_NK[rows], beta, **options),)

    return map_rows(model, batch.answers, experiment.config.micro_batch_tokens, function)[0]


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
    policy_logprobs_N: Tensor | None = None,
) -> dict[str, float]:
    """One online pass over the batch with the difficulty boundary and the dynamic loss weights (paper eq. 15).

    Both only where the objective takes them. policy_logprobs_N: log pi_old, where the reference is another.
    """
    weights_B = torch.ones_like(batch.rewards_B)
    if objective.dynamic_weights:
        weights_B = dynamic_loss_weights(batch.rewards_B, batch.group_mean_B, preset.dlw_scale)
    boundary_B = difficulty_boundary(batch.group_mean_B) if objective.boundary else None
    policy_logprobs_N = ref_logprobs_N if policy_logprobs_N is None else policy_logprobs_N
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
                None if boundary_B is None else boundary_B[index],
                policy_logprobs_N[rows_N],
            )
        )
        norm = apply_step(optimizer, settings.optim, step, total)
    return {"rm_loss": sum(losses) / len(losses), "rm_grad_norm": norm}
