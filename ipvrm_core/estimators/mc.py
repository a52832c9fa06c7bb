"""Monte Carlo: the discounted sum of all normalised TD errors to come."""

from dataclasses import replace

from ipvrm_core.estimators.gae import Gae


class MonteCarlo(Gae):
    """process_t = sum_{i >= t} gamma^(i - t) delta_hat_i (paper eq. 7): `gae` with lambda = 1."""

    name = "mc"
    token_rewards = "required"
    reads = ("gamma",)

    def process(self, tokens, method):
        return super().process(tokens, replace(method, lam=1.0))
