"""EndoRM: no training; the starting policy's own log-probabilities are the token rewards."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ipvrm_core.objectives.base import Objective
from ipvrm_core.packing import positions


@dataclass(frozen=True)
class Endorm(Objective):
    """r(y_1..y_T) = sum_t decay^(t-1) beta log pi(y_t|s_t), pi the starting policy, which stays as it is.

    Source: Li et al., "Generalist Reward Models: Found Inside Large Language Models" (2506.23235). Their token reward
    (eq. 12) is alpha log pi(y_t|s_t) + V(s_t) - V(s_{t+1}), V = alpha LSE of the logits: the logits as a soft Q, and
    alpha log pi(v|s_t) = Q - V its advantage, known for the whole vocabulary. The V terms are left out here. In the
    plain sum over a whole answer that takes away V(s_1) alone, a constant of the prompt. In the score of a step, a
    prefix or one token, and in any sum with decay < 1, they do not cancel: what is scored there is the log-probability.
    `decay` (0.95 as a baseline in the IPVRM paper) enters the scores of answers and steps only; for the policy's
    returns set method.gamma.
    """

    name: ClassVar[str] = "endorm"
    trains: ClassVar[bool] = False
    reference: ClassVar[bool] = False

    beta: float = 1.0
    decay: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be in (0, 1]; got {self.decay}")

    def token_scores(self, score_N: Tensor, cu_seqlens: Tensor) -> Tensor:
        return score_N * self.decay ** (positions(cu_seqlens, len(score_N)) - 1).to(score_N.dtype)
