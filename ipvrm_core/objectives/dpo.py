"""DPO-RM: the reward model that direct preference optimisation trains implicitly."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ipvrm_core.objectives.base import Objective, RewardBatch
from ipvrm_core.sequences.reward_losses import dpo_reward_loss


@dataclass(frozen=True)
class Dpo(Objective):
    """sum_p w_p (-log sigmoid(beta (Q_w - Q_l))), Q = sum_t q_t. Needs (winner, loser) pairs of the same prompt."""

    name: ClassVar[str] = "dpo"
    pairwise: ClassVar[bool] = True

    beta: float = 0.05

    def loss(self, score_N: Tensor, batch: RewardBatch) -> Tensor:
        if batch.pairs_P2 is None or batch.pair_weights_P is None:
            raise ValueError("objective 'dpo' needs pairs_P2 and pair_weights_P in the batch; got None")
        per_pair_P = dpo_reward_loss(score_N, batch.cu_seqlens, batch.pairs_P2, beta=self.beta)
        return (batch.pair_weights_P * per_pair_P).sum()
