"""Policy runs: GRPO, GRPO with a process reward, DistRL."""

from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ipvrm_core.method import METHODS, Method
from ipvrm_core.reference.candidates import candidate_slots
from ipvrm_core.trainer.config.base import Positive, Section, checked
from ipvrm_core.trainer.config.training import Optim

MOST = 1_000_000  # prompts, answers to one, candidates


class RlRewardModel(Section):
    """How an RL run uses a reward model."""

    name: str = Field(description="a key of the `rm` table")
    update: Literal["none", "before", "after"] = Field(
        "before", description="relative to scoring the batch: with before, the updated model scores it"
    )
    optim: Optim = Optim(lr=1e-4)
    batch: Positive = Field(64, description="sequences per reward-model step")


class Rl(Section):
    """One policy run. Without `reward_model` it is plain GRPO; with alpha = 0 it is GRPO with a process reward."""

    reward_model: RlRewardModel | None = None
    preset: Literal["paper", "official"] = "paper"
    method: dict[str, Any] = Field({}, description="fields of the preset to override, e.g. {alpha = 1.0}")
    steps: Positive = 100
    epochs: Positive = Field(1, description="passes over a batch of rollouts")
    minibatch: Positive = Field(256, description="sequences per policy step")
    max_rounds: Positive = Field(4, description="sampling rounds at most, when too few prompts are mixed")
    max_skipped: Positive = Field(
        5, description="a step without any mixed prompt is skipped; after so many in a row training ends early"
    )
    kl_coef: Annotated[float, Field(ge=0)] = 0.0
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    optim: Optim = Optim(lr=1e-6)

    @model_validator(mode="after")
    def _method_is_possible(self):
        preset = self.resolved()
        self._check_sizes(preset)
        if not 1 <= preset.keep_prompts <= preset.prompts:
            raise ValueError(f"keep_prompts must be in 1 .. prompts = {preset.prompts}; got {preset.keep_prompts}")
        if preset.rollouts < 2:
            raise ValueError(f"rollouts must be >= 2 for a group to have a spread; got {preset.rollouts}")
        for name in ("beta", "offline_margin"):
            if getattr(preset, name) != getattr(METHODS[self.preset], name):
                raise ValueError(f"method.{name} belongs to the reward model: set it in rm.<name>.args")
        self._check_estimator(preset)
        self._check_accuracy_range(preset)
        preset.loss_config(kl_coef=self.kl_coef, entropy_coef=self.entropy_coef)
        self.__dict__["method"] = asdict(preset)  # resolved: what config.json shows is what runs
        return self

    def _check_sizes(self, preset: Method) -> None:
        """ValueError for a rule that cannot be, and for sizes that are a slip of the finger."""
        if 0 < preset.p_min < 1 / MOST:
            raise ValueError(f"method.p_min must be at least {1 / MOST:g}; got {preset.p_min}")
        candidate_slots(preset.p_min, top_k=preset.top_k)
        for name in ("prompts", "rollouts"):
            if getattr(preset, name) > MOST:
                raise ValueError(f"method.{name} must be at most {MOST}; got {getattr(preset, name)}")

    def _check_estimator(self, preset: Method) -> None:
        """ValueError for settings that the estimator could not follow."""
        estimator = preset.estimator
        if estimator in ("td", "mc", "prime") and self.reward_model is None:
            raise ValueError(
                f"method.estimator = {estimator!r} needs a reward_model: it works on token rewards; got None"
            )
        if estimator == "prime" and preset.outcome != "rloo":
            raise ValueError(f"method.outcome must be 'rloo' for method.estimator = 'prime'; got {preset.outcome!r}")
        fixed = {"gae": (), "mc": ("lam",)}.get(estimator, ("gamma", "lam"))
        for name in fixed:
            if getattr(preset, name) != 1:
                raise ValueError(
                    f"method.{name} must be 1 for method.estimator = {estimator!r}, which does not use it; "
                    f"got {getattr(preset, name)}"
                )

    def _check_accuracy_range(self, preset: Method) -> None:
        """ValueError for a range that keeps no prompt, or prompts outside that would be filled in all the same."""
        low, high = given = preset.accuracy_range
        if not 0 <= low <= high <= 1:
            raise ValueError(f"method.accuracy_range must be [low, high] with 0 <= low <= high <= 1; got {list(given)}")
        if not any(preset.keeps(right) for right in range(preset.rollouts + 1)):
            raise ValueError(
                f"method.accuracy_range must hold one of the shares 1/{preset.rollouts} .. "
                f"{preset.rollouts - 1}/{preset.rollouts} of rollouts = {preset.rollouts}; got {list(given)}"
            )
        if given != (0, 1) and preset.too_few_mixed == "fill":
            raise ValueError(
                f"method.too_few_mixed must be 'sample_on' with method.accuracy_range = {list(given)}: 'fill' would "
                "complete the batch with prompts outside of it; got 'fill'"
            )

    def resolved(self) -> Method:
        """The preset with `method` applied."""
        return checked(Method, {**asdict(METHODS[self.preset]), **self.method}, "method")
