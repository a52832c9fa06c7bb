"""What a user sets in a framework that has a policy loss of its own."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal

from ipvrm_core import estimators, objectives
from ipvrm_core.method import Method
from ipvrm_core.objectives import Objective
from ipvrm_core.reference.candidates import candidate_slots


@dataclass(frozen=True)
class Hosted(Method):
    """The switches of `Method` that the framework does not have, and what the reward model is and learns.

    sigma_V is that of a batch of rollouts, over all processes.
    """

    theirs: ClassVar[Mapping[str, str]] = {}  # switches that the framework decides: by which of its own

    sigma_scope: Literal["minibatch", "batch"] = "batch"
    objective: Annotated[str, "the reward model's: a file of ipvrm_core/objectives, or package.module:Class"] = "ipvrm"
    objective_args: Annotated[Mapping[str, Any], "its settings besides beta"] = field(default_factory=dict)
    beta: Annotated[float | None, "of TD errors and objective; None: the objective's own, 10 for ipvrm"] = None
    online: Annotated[
        Literal["none", "before", "after"], "the reward model learns from each batch, before or after it scores it"
    ] = "none"
    right_above: Annotated[float, "the reward above which an answer is right to the objective"] = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        defaults = {setting.name: setting.default for setting in fields(self)}
        for name, theirs in self.theirs.items():
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"{name} is the framework's: set {theirs}; got {getattr(self, name)!r}")
        if self.online not in ("none", "before", "after"):
            raise ValueError(f"online must be one of 'none', 'before', 'after'; got {self.online!r}")
        estimators.find(self.estimator)
        candidate_slots(self.p_min, top_k=self.top_k)
        self.loss_config()
        objective = self.reward_objective()
        if objective.head == "value":
            raise ValueError(f"the reward model must be a language model; {self.objective!r} has a value head")
        if self.online != "none" and (objective.pairwise or not objective.trains):
            raise ValueError(f"online={self.online!r} needs an objective of single answers; got {self.objective!r}")

    def reward_objective(self) -> Objective:
        """What the reward model was trained by; where it learns online, with the online margin."""
        found = objectives.find(self.objective)
        settings = dict(self.objective_args)
        if self.beta is not None:
            settings["beta"] = self.beta
        if found.boundary and self.online != "none":
            settings.setdefault("margin", self.online_margin)
        return found(**settings)

    def needs_reference(self, reward_model: bool) -> bool:
        """Whether the start of the policy is looked at."""
        own = not reward_model and estimators.find(self.estimator).token_rewards == "own"
        return own or "sft" in (self.td_reference, self.online_reference if self.online != "none" else None)
