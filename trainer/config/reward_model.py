"""Offline training of reward models."""

from dataclasses import asdict
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ipvrm_core import objectives
from ipvrm_core.trainer.config.base import Positive, Section, checked
from ipvrm_core.trainer.config.data import Chats
from ipvrm_core.trainer.config.training import Optim


class RewardModel(Section):
    """One reward model, trained offline on the rollouts, or on chats of its own."""

    objective: str = Field("ipvrm", description="a file of ipvrm_core/objectives, or package.module:Class")
    args: dict[str, float | str] = Field({}, description="settings of the objective, e.g. {margin = 5.0}")
    steps: Positive = Field(500, description="of the optimiser, at most")
    batch: Positive = Field(64, description="sequences a step: pairs of a right and a wrong answer to one prompt")
    data: Chats | None = Field(None, description="chats to train on; None: the rollouts")
    pairing: Literal["disjoint", "covering", "none"] = Field(
        "covering",
        description="each answer of a mixed prompt in at most one pair, or in at least one (the rarer repeat); "
        "none: single answers, those of unmixed prompts too. Pairwise data bring their own pairs",
    )
    pairs_per_prompt: Positive | None = Field(None, description="pairs drawn from one prompt; None: as many as it has")
    experts: Annotated[int, Field(ge=0)] = Field(
        0, description="demonstrations that join each step's pairs as right answers"
    )
    optim: Optim = Optim(lr=5e-7)
    validate_every: Positive = Field(100, description="steps between validations; the last step is one")
    stop_metric: (
        Literal[
            "held_out_auc",
            "held_out_auc_sum",
            "held_out_accuracy",
            "held_out_pair_accuracy",
            "held_out_ece_25",
            "held_out_ece_50",
            "held_out_ece_75",
            "held_out_ece_100",
        ]
        | None
    ) = Field(None, description="keep the model that is best in it, and stop when it no longer gets better")
    patience: Positive = Field(3, description="validations in a row without a new best before the stop")

    @model_validator(mode="after")
    def _objective_exists(self):
        objective = self.build()
        self.__dict__["args"] = asdict(objective)  # resolved: what config.json shows is what runs
        if not objective.trains:
            self.__dict__["steps"] = 1  # to measure it
        if self.experts and (objective.pairwise or not objective.trains):
            kind = "pairwise" if objective.pairwise else "training-free"
            raise ValueError(f"experts must be 0 for the {kind} objective {self.objective!r}; got {self.experts}")
        if self.batch % 2:
            raise ValueError(f"batch must be even, for it holds pairs; got {self.batch}")
        self._check_data(objective)
        return self

    def _check_data(self, objective: objectives.Objective) -> None:
        if self.pairing == "none" and objective.pairwise:
            raise ValueError(f"pairing must be 'disjoint' or 'covering' for the pairwise objective {self.objective!r}")
        if self.stop_metric and self.data and not self.data.validates:
            raise ValueError(
                f"stop_metric = {self.stop_metric!r} needs held-out prompts: data.validation must be > 0, or "
                "data.validation_path be set"
            )
        log_ratios = objective.head == "vocabulary" and objective.reference
        if self.stop_metric and self.stop_metric.startswith(("held_out_ece", "held_out_accuracy")) and not log_ratios:
            raise ValueError(
                f"stop_metric must be another for the objective {self.objective!r}, whose scores are no log-ratios: "
                f"sigma(vbar_t) is no probability; got {self.stop_metric!r}"
            )
        if self.stop_metric and not objective.trains:
            raise ValueError(f"stop_metric must be left out for the training-free objective {self.objective!r}")

    def build(self, **override) -> objectives.Objective:
        return checked(objectives.find(self.objective), {**self.args, **override}, "args")
