"""What an objective receives and gives back."""

from dataclasses import dataclass
from typing import ClassVar

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
    """A loss over log-ratios q_t. Subclasses set `name` and `pairwise` and define `loss`."""

    name: ClassVar[str]
    pairwise: ClassVar[bool] = False  # wants (winner, loser) pairs rather than single labelled answers

    beta: float

    def loss(self, log_ratio_N: Tensor, batch: RewardBatch) -> Tensor:
        """Weighted sum over the sequences (or pairs) of the batch: [N] -> 0-d, differentiable in log_ratio_N."""
        raise NotImplementedError
