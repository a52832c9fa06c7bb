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
from ipvrm_core.sequences.advantages import agreement_advantages
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
    source: str = "reward_model",
) -> BatchCredit:
    """TD errors of all slots by the reward model, then `assign_credit`; or the candidates' credit without one.

    ref_logprobs_N: of the starting policy, for an estimator that makes its own token rewards without a reward model.
    reference: the starting policy itself, for td_reference = "sft". source: "oracle" has `true_advantages` in place of
    A_TD, "policy" the agreement of the policy with itself.
    """
    delta_NS = None
    if reward_model is not None:
        against = reference if method.td_reference == "sft" else None
        delta_NS = td_errors(reward_model, objective, batch, old, against)
    elif estimators.find(method.estimator).token_rewards == "own":
        delta_NS = (old.logprobs_N - ref_logprobs_N)[:, None]
    S = 1 if delta_NS is None or not method.alpha else delta_NS.shape[1]
    S = S if source == "reward_model" else old.candidates.ids_NS.shape[1]
    ids_NS, old_NS = old.candidates.ids_NS[:, :S], old.candidates.logprobs_NS[:, :S]
    used_NS = None if delta_NS is None else delta_NS[:, :S]
    given = ids_NS, old_NS, batch.rewards_B, old.cu_seqlens, batch.groups_B, method
    credit = assign_credit(used_NS, *given, beta=None if objective is None else objective.beta)
    if source != "reward_model":
        if source == "oracle":
            own_NK = true_advantages(batch.due_N, ids_NS[:, 1:])
        else:  # the policy as its own reward model: delta = 0
            own_NK = agreement_advantages(torch.zeros_like(old_NS[:, 1:]), ids_NS[:, 1:], old_NS[:, 1:], beta=1.0)
        credit = Credit(torch.cat([credit.credit_NS[:, :1], own_NK], dim=1), None)
    numbers = old.numbers if reward_model is None else {**old.numbers, **_numbers(method, batch, old, delta_NS, credit)}
    return BatchCredit(credit, ids_NS, old_NS, old.cu_seqlens, numbers)


def true_advantages(due_N: Tensor, ids_NK: Tensor) -> Tensor:
    """1 for the due token, -1 for other candidates, 0 where no token is due and at padding: [N, K]."""
    due_NK = due_N[:, None]
    return torch.where((due_NK >= 0) & (ids_NK >= 0), torch.where(ids_NK == due_NK, 1.0, -1.0), 0.0)


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
        given_NK = credit.advantages(method, sigma)[:, 1:]
        numbers["candidate_td_std"] = _std(given_NK[old.candidates.ids_NS[:, 1:] >= 0])
        if batch.due_N is not None:
            numbers["credit_gain"] = credit_gain(given_NK, batch.due_N, old)
    if batch.due_N is not None and delta_NS.shape[1] > 1:
        numbers |= _credit_numbers(batch.due_N, old, delta_NS[:, 1:])
    return {name: value for name, value in numbers.items() if value == value}  # nan: there is nothing to say


def credit_gain(given_NK: Tensor, due_N: Tensor, old: OldPolicy) -> float:
    """<g(A), g(A*)> / <g(A*), g(A*)> over the batch, A* = `true_advantages`: the share of perfect credit's step that is
    in these advantages, by size and direction. g_v = pi_old(v) (A_v - sum_C pi_old A): the logits' gradient on C_t.
    """
    ids_NK = old.candidates.ids_NS[:, 1:]
    mass_NK = torch.where(ids_NK >= 0, old.candidates.logprobs_NS[:, 1:].exp(), 0.0)

    def gradient(advantages_NK: Tensor) -> Tensor:
        return mass_NK * (advantages_NK - (mass_NK * advantages_NK).sum(1, keepdim=True))

    true_NK = gradient(true_advantages(due_N, ids_NK)) * (due_N >= 0)[:, None]
    return ((gradient(given_NK) * true_NK).sum() / true_NK.square().sum()).item()


def _credit_numbers(due_N: Tensor, old: OldPolicy, delta_NK: Tensor) -> dict[str, float]:
    """Where several candidates stand and the due token is one: how often its TD error, its probability is largest."""
    ids_NK, old_NK = old.candidates.ids_NS[:, 1:], old.candidates.logprobs_NS[:, 1:]
    open_N = (due_N >= 0) & (old.candidates.counts_N > 1) & (ids_NK == due_N[:, None]).any(1)

    def right(score_NK: Tensor) -> float:
        best_N1 = score_NK.masked_fill(ids_NK < 0, -torch.inf).argmax(1, keepdim=True)
        return (ids_NK.gather(1, best_N1)[:, 0] == due_N)[open_N].float().mean().item()

    return {"credit_open": open_N.float().mean().item(), "credit": right(delta_NK), "credit_policy": right(old_NK)}


def _std(values: Tensor) -> float:
    return values.std().item() if values.numel() > 1 else float("nan")
