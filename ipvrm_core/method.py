"""The switches of the method, and their settings: `paper` and `official` (the authors' code), and ours, `ipvrm-core`.

One field per row of the table in docs/method.md where the two differ or a user would ask. A trainer configuration
starts from one of METHODS and overrides fields by name; `distrl_advantages` takes a Method.
"""

import math
from dataclasses import dataclass, fields
from typing import Annotated, Literal

from ipvrm_core.sequences.advantages import CandidateForm, Normalize, Outcome, SigmaForm
from ipvrm_core.types import PolicyLossConfig


@dataclass(frozen=True)
class Method:
    """Every switch of the method, with its meaning; the defaults are the paper's (arXiv 2604.13197v2)."""

    # reward model
    online_margin: Annotated[float, "margin of the online loss, where the objective has the difficulty boundary"] = 5.0
    online_boundary: Annotated[bool, "the difficulty boundary in the online loss, where the objective has it"] = True
    dlw_scale: Annotated[
        Literal["raw", "group", "none"], "online weights 1 - mu, mu as they are, or with a sum of n; none: all alike"
    ] = "raw"
    online_reference: Annotated[Literal["old", "sft"], "of the online loss: the sampling policy, or the start"] = "old"
    td_reference: Annotated[Literal["old", "sft"], "of the TD errors, the same; PRIME and rePIRL take sft"] = "old"
    # candidates
    p_min: Annotated[float, "least probability of a candidate token"] = 0.1
    strict: Annotated[bool, "the probability must exceed p_min"] = False
    top_k: Annotated[int | None, "the most probable of them only; None: all"] = None
    keep_sampled: Annotated[bool, "the sampled token is a candidate whatever its probability"] = False
    skip_last_token: Annotated[bool, "no candidates and no TD error at the last token of an answer"] = False
    # advantages
    sigma_scope: Annotated[Literal["minibatch", "batch"], "whose prefix values give sigma_V"] = "minibatch"
    sigma_form: Annotated[SigmaForm, "how sigma_V, which divides TD errors, is kept from 0"] = "std_plus_eps"
    sigma_min: Annotated[float, "sigma_V is raised to it; with sigma_max = sigma_min it is fixed; ours"] = 0.0
    sigma_max: Annotated[float | None, "sigma_V is lowered to it; None: no bound; ours"] = None
    outcome: Annotated[Outcome, "of the whole answer: (r - mu) / std of its group, r - the others' mean, or r"] = "grpo"
    estimator: Annotated[str, "of the tokens: a file of ipvrm_core/estimators, or package.module:Class"] = "gae"
    process_normalize: Annotated[Normalize, "over what gae, mc and td normalise TD errors"] = "group"
    process_coef: Annotated[float, "A_t = outcome + process_coef * process_t"] = 1.0
    gamma: Annotated[float, "discount of later TD errors"] = 1.0
    lam: Annotated[float, "lambda of GAE, a further discount"] = 1.0
    candidate_baseline: Annotated[Literal["none", "mean"], "mean: centre A on the candidates; ours"] = "none"
    single_candidate: Annotated[
        Literal["same", "zero", "agreement"], "A where a position has one: as elsewhere, 0, or 2 pi_phi - 1; ours"
    ] = "same"
    candidate_form: Annotated[
        CandidateForm, "of A: delta / sigma_V (paper), bounded, of the largest; or 2 pi_phi - 1"
    ] = "sigma_v"
    # policy loss
    alpha: Annotated[float, "weight of the candidates' loss; 0: sampled tokens alone"] = 0.1
    clip_low: Annotated[float, "the ratio of a sampled token is clipped at 1 - clip_low"] = 0.20
    clip_high: Annotated[float, "and at 1 + clip_high from above"] = 0.28
    dual_clip: Annotated[float | None, "with A < 0 its loss is at most dual_clip * |A|; None: no limit"] = None
    candidate_clip_low: Annotated[float, "clip_low of the candidates"] = 0.20
    candidate_clip_high: Annotated[float, "clip_high of the candidates"] = 0.28
    candidate_dual_clip: Annotated[float | None, "dual_clip of the candidates"] = None
    aggregation: Annotated[Literal["sequence_mean", "token_mean"], "how token losses become one"] = "sequence_mean"

    def __post_init__(self) -> None:
        if not 0 <= self.sigma_min < math.inf:
            raise ValueError(f"sigma_min must be >= 0 and finite; got {self.sigma_min}")
        if self.sigma_max is not None and not max(self.sigma_min, 1e-12) <= self.sigma_max < math.inf:
            raise ValueError(
                f"sigma_max must be > 0, finite and >= sigma_min = {self.sigma_min}, or None; got {self.sigma_max}"
            )

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
    # Ours, measured with the Implicit PRM in docs/results/credit.md: the sign of what the reward model prefers where
    # there is a choice, how sure it is where there is none; bounded as perfect credit is.
    "ipvrm-core": Method(
        candidate_baseline="mean",
        candidate_form="sign",
        single_candidate="agreement",
        process_normalize="batch",
        process_coef=0.05,
        alpha=1.0,
    ),
}
