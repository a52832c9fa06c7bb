"""The switches of the method, and their two published settings: `paper` and `official` (the authors' code).

One field per row of the table in docs/method.md where the two differ or a user would ask. A trainer configuration
starts from one of METHODS and overrides fields by name; `distrl_advantages` takes a Method.
"""

from dataclasses import dataclass, fields
from typing import Literal

from ipvrm_core.sequences.advantages import Normalize, Outcome, SigmaForm
from ipvrm_core.sequences.aggregation import Aggregation
from ipvrm_core.types import PolicyLossConfig


@dataclass(frozen=True)
class Method:
    """Every switch of the method; the defaults are the paper's (arXiv 2604.13197v2)."""

    # reward model
    online_margin: float = 5.0
    dlw_scale: Literal["raw", "group"] = "raw"
    online_reference: Literal["old", "sft"] = "old"  # of the online loss: the sampling policy, or the start
    td_reference: Literal["old", "sft"] = "old"  # of the TD errors; PRIME and rePIRL take the start
    # candidates
    p_min: float = 0.1
    strict: bool = False
    top_k: int | None = None
    keep_sampled: bool = False
    skip_last_token: bool = False  # no candidates and delta = 0 at the last response token
    # advantages
    sigma_scope: Literal["minibatch", "batch"] = "minibatch"
    sigma_form: SigmaForm = "std_plus_eps"
    outcome: Outcome = "grpo"  # of the whole answer: group-normalised | minus the others' mean | the reward itself
    estimator: str = "gae"  # of the tokens: a file of ipvrm_core/estimators, or package.module:Class
    process_normalize: Normalize = "group"  # of the TD errors that `gae`, `mc` and `td` take
    process_coef: float = 1.0  # A_t = outcome + process_coef * process_t
    gamma: float = 1.0
    lam: float = 1.0
    candidate_baseline: Literal["none", "mean"] = "none"  # "mean": `center_on_candidates`, ours
    # policy loss
    alpha: float = 0.1
    clip_low: float = 0.20
    clip_high: float = 0.28
    dual_clip: float | None = None
    candidate_clip_low: float = 0.20
    candidate_clip_high: float = 0.28
    candidate_dual_clip: float | None = None
    aggregation: Aggregation = "sequence_mean"

    def loss_config(self, temperature: float = 1.0, **override) -> PolicyLossConfig:
        """The PolicyLossConfig of this method."""
        shared = {field.name for field in fields(PolicyLossConfig)} & {field.name for field in fields(self)}
        return PolicyLossConfig(
            **{**{name: getattr(self, name) for name in shared}, "temperature": temperature, **override}
        )

    def candidate_rule(self) -> dict:
        """Keyword arguments of `select_candidates`."""
        return {name: getattr(self, name) for name in ("p_min", "strict", "top_k", "keep_sampled")}


METHODS: dict[str, Method] = {
    "paper": Method(),
    "official": Method(
        dlw_scale="group",
        strict=True,
        top_k=5,
        keep_sampled=True,
        skip_last_token=True,
        sigma_scope="batch",
        sigma_form="floored_std",
        process_normalize="batch",
        process_coef=0.05,
        dual_clip=3.0,
        candidate_clip_high=0.20,
        candidate_dual_clip=3.0,
        aggregation="token_mean",
    ),
}
