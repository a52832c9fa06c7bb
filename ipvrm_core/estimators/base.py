"""What an estimator receives and gives back, and what it may declare about itself.

Shape letters: N packed response tokens, B answers.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ipvrm_core.method import Method
from ipvrm_core.sequences.groups import Groups
from ipvrm_core.sequences.segments import expand


@dataclass(frozen=True)
class TokenRewards:
    """A batch of answers, packed.

    reward_N: of the sampled tokens: TD errors delta_t(y_t), or the scores of a value head. outcome_B: the advantage of
    the whole answer (`Method.outcome`). rewards_B: the outcome itself, r. groups_B: the prompt. sigma: sigma_V, 0-d.
    process_group: of torch.distributed, whose batches belong together.
    """

    reward_N: Tensor
    outcome_B: Tensor
    rewards_B: Tensor
    cu_seqlens: Tensor
    groups_B: Groups
    sigma: Tensor
    process_group: object = None


# "required": cannot do without; "optional": none without; "own": without a reward model the policy's own log-ratio to
# its start stands for them.
Need = Literal["required", "optional", "own"]


class Estimator:
    """A_t = outcome + process_coef * process_t. Subclasses set `name`, define `process`, and override what differs."""

    name: ClassVar[str]
    token_rewards: ClassVar[Need] = "required"
    reads: ClassVar[tuple[str, ...]] = ()  # of gamma and lam; the others must stay at 1
    outcomes: ClassVar[tuple[str, ...]] = ("grpo", "rloo", "reinforce")  # that it goes with

    def process(self, tokens: TokenRewards, method: Method) -> Tensor:
        """process_t of every token: [N]."""
        raise NotImplementedError

    def advantages(self, tokens: TokenRewards, method: Method) -> Tensor:
        """A_t of every token: [N]."""
        outcome_N = expand(tokens.outcome_B, tokens.cu_seqlens, len(tokens.reward_N))
        return outcome_N + method.process_coef * self.process(tokens, method)
