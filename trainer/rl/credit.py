"""The credit of a batch: TD errors by the reward model, advantages by the method, and what both look like.

Shape letters: N packed response tokens, B answers, S = 1 + K slots.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ipvrm_core import estimators, prefix_values
from ipvrm_core.credit import Credit, assign_credit, batch_sigma
from ipvrm_core.method import Method
from ipvrm_core.objectives import Objective
from ipvrm_core.sequences.segments import expand
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.reward import auc, scores
from ipvrm_core.trainer.rl.collect import Collected
from ipvrm_core.trainer.rl.old_policy import OldPolicy


@dataclass(frozen=True)
class BatchCredit:
    """Credit in slots; one slot where candidates have none, as without a reward model or with a value head.

    ids_NS, old_logprobs_NS: of the same slots.
    """

    credit: Credit
    ids_NS: Tensor
    old_logprobs_NS: Tensor
    cu_seqlens: Tensor
    numbers: dict[str, float]


@torch.no_grad()
def assign(
    method: Method,
    batch: Collected,
    old: OldPolicy,
    reward_model: LanguageModel | None,
    objective: Objective | None,
    ref_logprobs_N: Tensor | None = None,
    reference: LanguageModel | None = None,
) -> BatchCredit:
    """TD errors of all slots by the reward model, then `assign_credit`.

    ref_logprobs_N: of the starting policy, for an estimator that makes its own token rewards without a reward model.
    reference: the starting policy itself, for td_reference = "sft".
    """
    delta_NS = None
    if reward_model is not None:
        against = reference if method.td_reference == "sft" else None
        delta_NS = td_errors(reward_model, objective, batch, old, against)
    elif estimators.find(method.estimator).token_rewards == "own":
        delta_NS = (old.logprobs_N - ref_logprobs_N)[:, None]
    S = 1 if delta_NS is None or not method.alpha else delta_NS.shape[1]
    ids_NS, old_NS = old.candidates.ids_NS[:, :S], old.candidates.logprobs_NS[:, :S]
    used_NS = None if delta_NS is None else delta_NS[:, :S]
    given = ids_NS, old_NS, batch.rewards_B, old.cu_seqlens, batch.groups_B, method
    credit = assign_credit(used_NS, *given)
    numbers = old.numbers if reward_model is None else {**old.numbers, **_numbers(method, batch, old, delta_NS, credit)}
    return BatchCredit(credit, ids_NS, old_NS, old.cu_seqlens, numbers)


def td_errors(
    model: LanguageModel, objective: Objective, batch: Collected, old: OldPolicy, reference: LanguageModel | None
) -> Tensor:
    """delta of all slots [N, S] in one pass of the reward model, against the old policy or a pass of `reference`.

    With a value head, beta times the scores of the sampled tokens: [N, 1].
    """
    model.eval()
    if objective.head == "value":
        return (objective.beta * scores(model, objective, batch.answers))[:, None]
    against_NS = old.candidates.logprobs_NS
    if not objective.reference:
        against_NS = torch.zeros_like(against_NS)
    elif reference is not None:
        against_NS = reference.slot_logprobs(batch.answers, old.candidates.ids_NS)
    return model.td_errors(batch.answers, old.candidates.ids_NS, against_NS, objective.beta)


def _numbers(method: Method, batch: Collected, old: OldPolicy, delta_NS: Tensor, credit: Credit) -> dict[str, float]:
    sigma, sampled_N = batch_sigma(credit.values_N, method), delta_NS[:, 0]
    scores_B = prefix_values(sampled_N, old.cu_seqlens, beta=1.0)[old.cu_seqlens[1:] - 1]  # beta is in delta already
    outcome_N = expand(batch.outcome(method), old.cu_seqlens, len(sampled_N))
    numbers = {
        "sigma_v": sigma.item(),
        "rm_auc": auc(scores_B, batch.rewards_B),
        "rm_accuracy": ((scores_B > 0) == (batch.rewards_B > 0)).float().mean().item(),
        "rm_score_per_token": sampled_N.mean().item(),
        "process_std": _std(credit.credit_NS[:, 0] - outcome_N),
    }
    if credit.credit_NS.shape[1] > 1:
        shown_NK = old.candidates.ids_NS[:, 1 : credit.credit_NS.shape[1]] >= 0
        numbers["candidate_td_std"] = _std((credit.credit_NS[:, 1:] / sigma)[shown_NK])
    return {name: value for name, value in numbers.items() if value == value}  # nan: there is nothing to say


def _std(values: Tensor) -> float:
    return values.std().item() if values.numel() > 1 else float("nan")
