"""One step: the normalised TD error itself."""

from dataclasses import replace

from ipvrm_core.estimators.gae import Gae


class TemporalDifference(Gae):
    """process_t = delta_hat_t (paper eq. 6): `gae` with lambda = 0."""

    name = "td"
    token_rewards = "required"
    reads = ()

    def process(self, tokens, method):
        return super().process(tokens, replace(method, lam=0.0))
