"""SPRO (Fei et al., 2507.01551): masked step advantage, which needs no reward model."""

from ipvrm_core.estimators.base import Estimator
from ipvrm_core.sequences.advantages import masked_step_advantages


class MaskedStep(Estimator):
    """process_t = R_t minus its mean over the group's answers that reach t, R_t the running sum of token rewards."""

    name = "msa"
    token_rewards = "own"

    def process(self, tokens, method):
        return masked_step_advantages(tokens.reward_N, tokens.cu_seqlens, tokens.groups_B, tokens.process_group)
