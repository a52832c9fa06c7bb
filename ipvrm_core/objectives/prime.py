"""PRIME: the Implicit PRM, updated online with every answer weighing the same."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ipvrm_core.objectives.base import Objective, RewardBatch
from ipvrm_core.sequences.reward_losses import implicit_prm_loss


@dataclass(frozen=True)
class Prime(Objective):
    """sum_b w_b BCE-with-logits(beta sum_t q_t, r_b), w_b = 1/B online as offline: no difficulty weights.

    Source: Cui et al., "Process Reinforcement through Implicit Rewards" (2502.01456), cross-entropy form, beta 0.05.
    The policy half of PRIME is `prime_advantages`: method = { outcome = "rloo", estimator = "prime", alpha = 0.0 }.
    Needs answers with 0/1 outcomes.
    """

    name: ClassVar[str] = "prime"
    dynamic_weights: ClassVar[bool] = False

    beta: float = 0.05

    def loss(self, score_N: Tensor, batch: RewardBatch) -> Tensor:
        per_sequence_B = implicit_prm_loss(score_N, batch.cu_seqlens, batch.labels_B, beta=self.beta)
        return (batch.weights_B * per_sequence_B).sum()
