"""Generalised advantage estimation over normalised TD errors: the estimator of both presets."""

from typing import ClassVar

from ipvrm_core.estimators.base import Estimator, Need
from ipvrm_core.sequences.advantages import process_advantages


class Gae(Estimator):
    """process_t = sum_{i >= t} (gamma lambda)^(i - t) delta_hat_i, delta_hat normalised (paper eq. 8)."""

    name = "gae"
    token_rewards: ClassVar[Need] = "optional"
    reads: ClassVar[tuple[str, ...]] = ("gamma", "lam")

    def process(self, tokens, method):
        return process_advantages(
            tokens.reward_N,
            tokens.cu_seqlens,
            tokens.groups_B,
            normalize=method.process_normalize,
            sigma=tokens.sigma,
            gamma=method.gamma,
            lam=method.lam,
            process_group=tokens.process_group,
        )
