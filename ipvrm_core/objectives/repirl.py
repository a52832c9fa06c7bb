"""rePIRL: inverse RL. Right answers and demonstrations are the experts, wrong answers stand for the policy."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ipvrm_core.objectives.base import Objective, RewardBatch
from ipvrm_core.sequences.reward_losses import ExpertShare, WeightLength, repirl_loss, repirl_weights


@dataclass(frozen=True)
class Repirl(Objective):
    """sum_failed w_i rbar_i / sum w  -  sum_experts rbar / (|B| n), w = exp(r(tau)) / pi_theta(tau), a constant.

    Source: Wu et al., "rePIRL: Learn PRM with Inverse RL for LLM Reasoning" (2602.07832); rbar is the mean token reward
    beta q_t. Online and offline; demonstrations join through rm.<name>.experts. What the source leaves open:
    length: "mean" takes r(tau) and log pi_theta(tau) in w per token, "sum" as written. Default "mean": w is then the
        derivative of the log partition function of rbar, whose other half the loss is; with sums the log-weights of
        long answers lie tens of nats apart and one answer takes all the weight.
    expert_share: "batch" divides the experts' sum by the number of answers, as written, "experts" by that of experts.
    head: how r is made. "vocabulary": beta q_t, so that DistRL has a TD error for every token. "value": a scalar head.
    """

    name: ClassVar[str] = "repirl"
    dynamic_weights: ClassVar[bool] = False
    reweighs: ClassVar[bool] = True

    beta: float = 1.0
    length: WeightLength = "mean"
    expert_share: ExpertShare = "batch"
    head: Literal["vocabulary", "value"] = "vocabulary"  # type: ignore[misc] # elsewhere a constant, here a setting

    def reweigh(self, score_N, policy_logprobs_N, cu_seqlens, labels_B, weights_B) -> Tensor:
        return repirl_weights(
            self.beta * score_N,
            policy_logprobs_N,
            cu_seqlens,
            labels_B,
            weights_B,
            length=self.length,
            expert_share=self.expert_share,
        )

    def loss(self, score_N: Tensor, batch: RewardBatch) -> Tensor:
        per_sequence_B = repirl_loss(self.beta * score_N, batch.cu_seqlens, batch.labels_B)
        return (batch.weights_B * per_sequence_B).sum()
