"""IPVRM: every prefix predicts eventual correctness (paper eq. 9, 15-18)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ipvrm_core.objectives.base import Objective, RewardBatch
from ipvrm_core.sequences.reward_losses import Weighting, ipvrm_loss


@dataclass(frozen=True)
class Ipvrm(Objective):
    """sum_b w_b sum_t w_t softplus(m - s_b (vbar_t + V(x_b))), s = 2 r - 1; V(x) = 0 offline.

    Needs answers with 0/1 outcomes; pairs are not required, mixed prompts help.
    """

    name: ClassVar[str] = "ipvrm"
    boundary: ClassVar[bool] = True

    beta: float = 10.0
    margin: float = 5.0
    weighting: Weighting = "uniform"

    def loss(self, score_N: Tensor, batch: RewardBatch) -> Tensor:
        per_sequence_B = ipvrm_loss(
            score_N,
            batch.cu_seqlens,
            batch.labels_B,
            beta=self.beta,
            margin=self.margin,
            weighting=self.weighting,
            boundary_B=batch.boundary_B,
        )
        return (batch.weights_B * per_sequence_B).sum()
