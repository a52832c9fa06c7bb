"""The outcome alone."""

import torch

from ipvrm_core.estimators.base import Estimator


class Outcome(Estimator):
    """process_t = 0."""

    name = "none"
    token_rewards = "optional"

    def process(self, tokens, method):
        return torch.zeros_like(tokens.reward_N)
