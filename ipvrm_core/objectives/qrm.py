"""Q-RM: a scalar head on (s_t, y_t), trained on pairs, whose token scores are Q-values."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ipvrm_core.objectives.base import Objective, RewardBatch
from ipvrm_core.sequences.reward_losses import qrm_loss


@dataclass(frozen=True)
class Qrm(Objective):
    """sum_p w_p (-log sigmoid(beta (Zbar_w - Zbar_l) - margin)), Zbar = (1/T) sum_t Z_t.

    Source: Chen et al., "Discriminative Policy Optimization for Token-Level Reward Models", ICML 2025 (2505.23363),
    training objective with beta = 0.2 and gamma = 2 (here `margin`); their code scores (s_t, y_t) with a scalar head on
    the hidden state after y_t. Z is a Q-value, not a difference of values: take the estimator "td", and there is no
    distribution over the vocabulary for DistRL. Needs (winner, loser) pairs of the same prompt, no reference.
    """

    name: ClassVar[str] = "qrm"
    pairwise: ClassVar[bool] = True
    head: ClassVar[Literal["vocabulary", "value"]] = "value"
    reference: ClassVar[bool] = False

    beta: float = 0.2
    margin: float = 2.0

    def loss(self, score_N: Tensor, batch: RewardBatch) -> Tensor:
        if batch.pairs_P2 is None or batch.pair_weights_P is None:
            raise ValueError("objective 'qrm' needs pairs_P2 and pair_weights_P in the batch; got None")
        per_pair_P = qrm_loss(score_N, batch.cu_seqlens, batch.pairs_P2, beta=self.beta, margin=self.margin)
        return (batch.pair_weights_P * per_pair_P).sum()
