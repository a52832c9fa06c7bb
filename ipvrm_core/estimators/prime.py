"""PRIME (Cui et al., 2502.01456): leave-one-out outcome and token rewards, whitened together."""

from ipvrm_core.estimators.base import Estimator
from ipvrm_core.sequences.advantages import prime_advantages


class Prime(Estimator):
    """A = whiten(RLOO outcome + process_coef * suffix sum of the RLOO token rewards); see `prime_advantages`."""

    name = "prime"
    outcomes = ("rloo",)

    def advantages(self, tokens, method):
        rest = tokens.rewards_B, tokens.cu_seqlens, tokens.groups_B
        how = {"coef": method.process_coef, "process_group": tokens.process_group}
        return prime_advantages(tokens.reward_N, *rest, **how)
