"""The section `distrl` of verl's configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from ipvrm_core.integrations.settings import Hosted


@dataclass(frozen=True)
class DistRL(Hosted):
    """The switches of `Method` that verl does not have, and the reward model."""

    theirs: ClassVar[Mapping[str, str]] = {
        "outcome": "algorithm.adv_estimator",
        "clip_low": "actor.clip_ratio_low",
        "clip_high": "actor.clip_ratio_high",
        "dual_clip": "actor.clip_ratio_c",
        "aggregation": "actor.loss_agg_mode",
        "sigma_scope": "data.train_batch_size",
        "td_reference": "nothing: TD errors are against the sampling policy here",
        "online_reference": "nothing: the reward model learns against the sampling policy here",
    }

    reward_model: Annotated[str | None, "path of the reward model"] = None
    learning_rate: Annotated[float, "of AdamW for the reward model that learns"] = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward_model is None:
            raise ValueError("distrl.reward_model must be the path of a reward model; got None")
        if self.estimator == "prime":
            raise ValueError("estimator 'prime' has its own outcome, and verl's is kept; choose another one")
        if self.online != "none" and self.reward_objective().reweighs:
            raise ValueError(f"objective {self.objective!r} looks at all answers of a step, which workers here do not")

    @classmethod
    def of(cls, config) -> "DistRL":
        """From verl's configuration: ValueError for a section that is missing, or for a key that is not known."""
        given: dict[str, Any] = dict(config.get("distrl") or {})
        unknown = given.keys() - cls.__dataclass_fields__.keys()
        if not given or unknown:
            raise ValueError(f"distrl must have keys of {', '.join(cls.__dataclass_fields__)}; got {sorted(given)}")
        return cls(**given)
