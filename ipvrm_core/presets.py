"""The two published settings of the method, `paper` and `official` (the authors' code), as data.

One field per row of the table in docs/method.md where the two differ or a user would ask. A trainer configuration
starts from a preset and overrides fields by name; the library functions never read a preset by themselves.
"""

from dataclasses import dataclass, fields
from typing import Literal

from ipvrm_core.reference.advantages import Estimator, Outcome, SigmaForm
from ipvrm_core.reference.aggregation import Aggregation
from ipvrm_core.types import PolicyLossConfig


@dataclass(frozen=True)
class Preset:
    """Every switch of the method; the defaults are the paper's (arXiv 2604.13197v2)."""

    # reward model
    beta: float = 10.0
    offline_margin: float = 5.0
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
    estimator: Estimator = "gae"  # of the tokens; see docs/method.md
    gae_normalize: Literal["group", "batch"] = "group"
    gae_coef: float = 1.0
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
    # batch
    rollouts: int = 4
    prompts: int = 512
    keep_prompts: int = 256
    too_few_mixed: Literal["sample_on", "fill"] = "sample_on"
    accuracy_range: tuple[float, float] = (0.0, 1.0)  # of mixed prompts, those with mu inside; rePIRL: 0.2, 0.8

    def keeps(self, right: int) -> bool:
        """Whether a prompt with so many right answers of `rollouts` is one to learn from."""
        low, high = self.accuracy_range
        return 0 < right < self.rollouts and low <= right / self.rollouts <= high

    def loss_config(self, temperature: float = 1.0, **override) -> PolicyLossConfig:
        """The PolicyLossConfig of this preset."""
        shared = {field.name for field in fields(PolicyLossConfig)} & {field.name for field in fields(self)}
        return PolicyLossConfig(
            **{**{name: getattr(self, name) for name in shared}, "temperature": temperature, **override}
        )

    def candidate_rule(self) -> dict:
        """Keyword arguments of `select_candidates`."""
        return {name: getattr(self, name) for name in ("p_min", "strict", "top_k", "keep_sampled")}


PRESETS: dict[str, Preset] = {
    "paper": Preset(),
    "official": Preset(
        offline_margin=0.0,  # as documented there; the online flag defaults to 5
        dlw_scale="group",
        strict=True,
        top_k=5,
        keep_sampled=True,
        skip_last_token=True,
        sigma_scope="batch",
        sigma_form="floored_std",
        gae_normalize="batch",
        gae_coef=0.05,
        dual_clip=3.0,
        candidate_clip_high=0.20,
        candidate_dual_clip=3.0,
        aggregation="token_mean",
        rollouts=16,
        prompts=1024,
        keep_prompts=512,
        too_few_mixed="fill",
    ),
}
