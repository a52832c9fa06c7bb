"""A reward model at work: its token scores, its loss on a batch, and how well it ranks answers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ipvrm_core.objectives import Objective, RewardBatch
from ipvrm_core.packing import cu_seqlens_from_lengths, lengths_of
from ipvrm_core.trainer.batching import Answer, TokenBatch
from ipvrm_core.trainer.language_model import LanguageModel


def scores(
    model: LanguageModel, objective: Objective, answers: Sequence[Answer], ref_logprobs_N: Tensor | None = None
) -> Tensor:
    """What the objective sees of every response token, packed [N], no gradient: log-ratios, log-probs or values.

    ref_logprobs_N is needed where `objective.reference` says so and the head is the vocabulary's.
    """
    if objective.head == "value":
        return model.values(answers)
    score_N = model.logprobs(answers)
    return score_N - ref_logprobs_N if needs_reference(objective) else score_N


def needs_reference(objective: Objective) -> bool:
    """Whether its scores are differences to a reference's log-probs."""
    return objective.head == "vocabulary" and objective.reference


def backward_reward_loss(
    model: LanguageModel,
    objective: Objective,
    answers: Sequence[Answer],
    ref_logprobs_N: Tensor,
    labels_B: Tensor,
    weights_B: Tensor,
    boundary_B: Tensor | None = None,
    policy_logprobs_N: Tensor | None = None,
) -> float:
    """Accumulate the gradient of sum_b w_b loss_b over micro-batches; returns the loss.

    A pairwise objective takes sequences (2 p, 2 p + 1) as winner and loser of pair p, which are never cut apart, and
    weighs the pair by twice the winner's weight. One that reweighs scores all answers first, in a pass of its own;
    policy_logprobs_N are those of the policy that sampled the answers (None: the reference is that policy).
    """
    if objective.reweighs:
        policy_N = ref_logprobs_N if policy_logprobs_N is None else policy_logprobs_N
        cu_seqlens = cu_seqlens_from_lengths(torch.tensor([len(answer.response_ids) for answer in answers]))
        score_N = scores(model, objective, answers, ref_logprobs_N)
        weights_B = objective.reweigh(score_N, policy_N, cu_seqlens.to(labels_B.device), labels_B, weights_B)
    unit = 2 if objective.pairwise else 1
    total, row = 0.0, 0
    for part in model.parts(answers, unit=unit):
        batch = model.batch(answers[part], after=objective.head == "value")
        rows = slice(row, row + len(batch.targets_N))
        row = rows.stop
        score_N = _batch_scores(model, objective, batch, ref_logprobs_N[rows])
        loss = objective.loss(
            score_N,
            RewardBatch(
                cu_seqlens=batch.cu_seqlens,
                labels_B=labels_B[part],
                weights_B=weights_B[part],
                boundary_B=None if boundary_B is None else boundary_B[part],
                pairs_P2=torch.arange(part.stop - part.start, device=score_N.device).view(-1, 2) if unit == 2 else None,
                pair_weights_P=2 * weights_B[part][::2] if unit == 2 else None,
            ),
        )
        loss.backward()
        total += loss.item()
    return total


def _batch_scores(model: LanguageModel, objective: Objective, batch: TokenBatch, ref_logprobs_N: Tensor) -> Tensor:
    if objective.head == "value":
        return model.batch_values(batch)
    score_N = model.batch_logprobs(batch)
    return score_N - ref_logprobs_N if needs_reference(objective) else score_N


def answer_scores(score_N: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """(sum_t q_t, mean_t q_t) of every answer: [N] -> [B], [B]. beta only scales them."""
    sums_B = torch.stack([piece.sum() for piece in score_N.split(lengths_of(cu_seqlens).tolist())])
    return sums_B, sums_B / lengths_of(cu_seqlens)


def auc(scores: Tensor, labels: Tensor) -> float:
    """P(score of a right answer > score of a wrong one), ties count half; nan when there is only one kind."""
    right, wrong = scores[labels > 0].double(), scores[labels <= 0].double().sort().values
    if not len(right) or not len(wrong):
        return float("nan")
    below = torch.searchsorted(wrong, right) + torch.searchsorted(wrong, right, right=True)
    return (below.sum() / (2 * len(right) * len(wrong))).item()
