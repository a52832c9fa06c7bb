"""A reward-model objective in one file: the Brier score of every prefix, (sigma(vbar_t) - r)^2 averaged over t.

As "examples.own_objective:Brier" it serves in a configuration; any module on the path does:

    ipvrm run demo --run runs/brier rm.ipvrm.objective="examples.own_objective:Brier" rm.ipvrm.args.beta=10.0
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ipvrm_core import mean_prefix_values
from ipvrm_core.objectives import Objective, RewardBatch
from ipvrm_core.sequences.segments import expand, segment_mean


@dataclass(frozen=True)
class Brier(Objective):
    """sum_b w_b (1/T_b) sum_t (sigma(vbar_t) - r_b)^2, vbar_t = beta / t sum_{u <= t} q_u."""

    name: ClassVar[str] = "brier"

    beta: float = 10.0

    def loss(self, score_N: Tensor, batch: RewardBatch) -> Tensor:
        chance_N = torch.sigmoid(mean_prefix_values(score_N, batch.cu_seqlens, self.beta))
        label_N = expand(batch.labels_B.to(score_N.dtype), batch.cu_seqlens, len(score_N))
        return (batch.weights_B * segment_mean((chance_N - label_N).square(), batch.cu_seqlens)).sum()
