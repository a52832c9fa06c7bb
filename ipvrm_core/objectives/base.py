"""What an objective receives and gives back, and what it may declare about itself.

The trainer hands an objective one score a token: q_t = log pi_phi(y_t|s_t) - log pi_ref(y_t|s_t) of its language model
(`head = "vocabulary"`), or the output of a scalar head on the hidden state after y_t (`head = "value"`).

Shape letters: N packed response tokens, B sequences, P pairs.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor


@dataclass(frozen=True)
class RewardBatch:
    """Labelled answers, packed: N response tokens, B sequences, P pairs.

    weights_B, pair_weights_P already contain the global normaliser (and the dynamic loss weights online), so that the
    losses of micro-batches add up. boundary_B: V(x) = logit(mu), online only. pairs_P2: (winner, loser), pairwise only.
    """

    cu_seqlens: Tensor
    labels_B: Tensor
    weights_B: Tensor
    boundary_B: Tensor | None = None
    pairs_P2: Tensor | None = None
    pair_weights_P: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """A loss over token scores. Subclasses set `name`, define `loss`, and override what differs from these defaults."""

    name: ClassVar[str]
    pairwise: ClassVar[bool] = False  # wants (winner, loser) pairs rather than single labelled answers
    trains: ClassVar[bool] = True  # False: the starting policy itself is the reward model
    head: ClassVar[Literal["vocabulary", "value"]] = "vocabulary"  # "value": no score for tokens that were not sampled
    reference: ClassVar[bool] = True  # False: the score is log pi_phi alone
    boundary: ClassVar[bool] = False  # online: adds V(x) to the values and takes the preset's online margin
    dynamic_weights: ClassVar[bool] = True  # online: weighs answers by 1 - mu and mu, else all alike
    reweighs: ClassVar[bool] = False  # `reweigh` looks at all scores of an optimiser step before its loss

    beta: float

    def loss(self, score_N: Tensor, batch: RewardBatch) -> Tensor:
        """Weighted sum over the sequences (or pairs) of the batch: [N] -> 0-d, differentiable in score_N."""
        raise NotImplementedError

    def reweigh(
        self, score_N: Tensor, policy_logprobs_N: Tensor, cu_seqlens: Tensor, labels_B: Tensor, weights_B: Tensor
    ) -> Tensor:
        """New weights_B from the whole step's batch, a constant; the policy is the one that sampled the answers."""
        return weights_B

    def token_scores(self, score_N: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Whose sum over a span is the span's score in evaluation, up to a positive factor: [N] -> [N]."""
        return score_N
