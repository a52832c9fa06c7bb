"""Implicit PRM: the sum of log-ratios predicts the outcome (cross-entropy form); PRIME uses it online."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ipvrm_core.objectives.base import Objective, RewardBatch
from ipvrm_core.sequences.reward_losses import implicit_prm_loss


@dataclass(frozen=True)
class ImplicitPrm(Objective):
    """sum_b w_b BCE-with-logits(beta sum_t q_t, r_b). Needs answers with 0/1 outcomes; no boundary term online."""

    name: ClassVar[str] = "implicit_prm"

    beta: float = 0.05

    def loss(self, score_N: Tensor, batch: RewardBatch) -> Tensor:
        per_sequence_B = implicit_prm_loss(score_N, batch.cu_seqlens, batch.labels_B, beta=self.beta)
        return (batch.weights_B * per_sequence_B).sum()
