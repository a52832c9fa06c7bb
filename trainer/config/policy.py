"""Policy runs: GRPO, GRPO with a process reward, DistRL."""

from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ipvrm_core import estimators
from ipvrm_core.method import METHODS, Method
from ipvrm_core.reference.candidates import candidate_slots
from ipvrm_core.trainer.config.base import Positive, Section, checked
from ipvrm_core.trainer.config.training import Optim

MOST = 1_000_000  # prompts, answers to one, candidates
BATCHES = {  # what the presets leave to [rl.<name>.batch]
    "paper": {"prompts": 512, "keep_prompts": 256, "rollouts": 4, "too_few_mixed": "sample_on"},
    "official": {"prompts": 1024, "keep_prompts": 512, "rollouts": 16, "too_few_mixed": "fill"},
    "ipvrm-core": {"prompts": 512, "keep_prompts": 256, "rollouts": 4, "too_few_mixed": "sample_on"},
}


class RlRewardModel(Section):
    """How an RL run uses a reward model."""

    name: str = Field(description="a key of the `rm` table")
    update: Literal["none", "before", "after"] = Field(
        "before", description="relative to scoring the batch: with before, the updated model scores it"
    )
    optim: Optim = Optim(lr=1e-4)
    batch: Positive = Field(64, description="sequences per reward-model step")
    passes: Positive = Field(1, description="over the batch of a step")


class Batch(Section):
    """What is sampled for a step, and which of it is kept. None: as the preset has it."""

    prompts: Positive | None = Field(None, description="sampled in a round; paper 512, official 1024")
    keep_prompts: Positive | None = Field(None, description="of these, trained on; paper 256, official 512")
    rollouts: Positive | None = Field(None, description="answers to each prompt; paper 4, official 16")
    accuracy_range: Annotated[tuple[float, float], Field(strict=False)] = Field(
        (0.0, 1.0), description="of mixed prompts, those with a share of right answers inside; rePIRL: 0.2, 0.8"
    )
    too_few_mixed: Literal["sample_on", "fill"] | None = Field(
        None, description="sample further prompts (paper), or complete the batch with unmixed ones (official)"
    )
    max_rounds: Positive = Field(4, description="sampling rounds at most, when too few prompts are mixed")

    def keeps(self, right: int) -> bool:
        """Whether a prompt with so many right answers of `rollouts` is one to learn from."""
        low, high = self.accuracy_range
        return 0 < right < self.rollouts and low <= right / self.rollouts <= high

    def check(self) -> None:
        """ValueError for sizes that are a slip of the finger or do not fit each other."""
        for name in ("prompts", "rollouts"):
            if getattr(self, name) > MOST:
                raise ValueError(f"batch.{name} must be at most {MOST}; got {getattr(self, name)}")
        if self.keep_prompts > self.prompts:
            raise ValueError(f"batch.keep_prompts must be in 1 .. prompts = {self.prompts}; got {self.keep_prompts}")
        if self.rollouts < 2:
            raise ValueError(f"batch.rollouts must be >= 2 for a group to have a spread; got {self.rollouts}")
        self._check_accuracy_range()

    def _check_accuracy_range(self) -> None:
        """ValueError for a range that keeps no prompt, or prompts outside that would be filled in all the same."""
        low, high = given = self.accuracy_range
        if not 0 <= low <= high <= 1:
            raise ValueError(f"batch.accuracy_range must be [low, high] with 0 <= low <= high <= 1; got {list(given)}")
        if not any(self.keeps(right) for right in range(self.rollouts + 1)):
            raise ValueError(
                f"batch.accuracy_range must hold one of the shares 1/{self.rollouts} .. "
                f"{self.rollouts - 1}/{self.rollouts} of rollouts = {self.rollouts}; got {list(given)}"
            )
        if given != (0, 1) and self.too_few_mixed == "fill":
            raise ValueError(
                f"batch.too_few_mixed must be 'sample_on' with batch.accuracy_range = {list(given)}: 'fill' would "
                "complete the batch with prompts outside of it; got 'fill'"
            )


class Correction(Section):
    """Weights of the loss for what the sampler computes otherwise than the trainer: truncated importance sampling."""

    level: Literal["none", "token", "sequence"] | None = Field(
        None,
        description="whose ratio trainer / sampler is the weight: the token's own, or the whole answer's; None: token "
        'with generation.sampler = "vllm", else none',
    )
    mode: Literal["cap", "mask"] = Field("cap", description="a ratio above the limit counts as the limit, or as 0")
    limit: Annotated[float, Field(ge=1)] = Field(2.0, description="of the ratio")


class Rl(Section):
    """One policy run. Without `reward_model` it is plain GRPO; with alpha = 0 it is GRPO with a process reward."""

    reward_model: RlRewardModel | None = None
    preset: Literal["paper", "official", "ipvrm-core"] = Field(
        "paper", description="where method and batch start from; ipvrm-core is ours, the batch the paper's"
    )
    method: Annotated[dict[str, Any], Method] = Field({}, description="What differs from the preset.")
    batch: Batch = Batch()
    credit: Literal["reward_model", "oracle", "policy"] = Field(
        "reward_model",
        description="of the candidates. oracle: 1 for the token that a built-in task demands, -1 for the others: "
        "perfect credit. policy: 2 pi_old - 1, which sharpens and knows nothing: what credit must beat",
    )
    seed: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="of problems, answers and minibatches: equal for runs that are to be compared, another for a "
        "repetition; None: the run's name is one",
    )
    ahead: bool = Field(
        False,
        description="sample the next batch while the policy learns from this one, with the weights before that update: "
        'for generation.sampler = "vllm", and what correction is for (docs/vllm.md)',
    )
    correction: Correction = Correction()
    steps: Positive = Field(100, description="batches of rollouts that are learnt from")
    epochs: Positive = Field(1, description="passes over a batch of rollouts")
    minibatch: Positive = Field(256, description="sequences per policy step")
    max_skipped: Positive = Field(
        5, description="a step without any mixed prompt is skipped; after so many in a row training ends early"
    )
    kl_coef: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight of KL(policy || starting policy) in the loss"
    )
    entropy_coef: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight of the entropy, which the loss then raises"
    )
    optim: Optim = Optim(lr=1e-6)

    @model_validator(mode="after")
    def _method_is_possible(self):
        chosen = {name: value for name, value in self.batch.model_dump().items() if value is not None}
        batch = self.batch.model_copy(update={**BATCHES[self.preset], **chosen})
        batch.check()
        self._check_known()
        method = self.resolved()
        if 0 < method.p_min < 1 / MOST:
            raise ValueError(f"method.p_min must be at least {1 / MOST:g}; got {method.p_min}")
        candidate_slots(method.p_min, top_k=method.top_k)
        self._check_estimator(method)
        if self.credit != "reward_model" and (self.reward_model or not method.alpha):
            raise ValueError(
                f"credit = {self.credit!r} needs method.alpha > 0 and no reward_model: it takes the place of its TD "
                f"errors; got alpha = {method.alpha}, {'a' if self.reward_model else 'no'} reward_model"
            )
        method.loss_config(kl_coef=self.kl_coef, entropy_coef=self.entropy_coef)
        self.__dict__ |= {"method": asdict(method), "batch": batch}  # resolved: what config.json shows is what runs
        return self

    def _check_known(self) -> None:
        """ValueError for settings that stand elsewhere."""
        elsewhere = {"beta": "rm.<name>.args", "margin": "rm.<name>.args", "offline_margin": "rm.<name>.args (margin)"}
        elsewhere |= dict.fromkeys(Batch.model_fields, "rl.<name>.batch")
        for name in self.method.keys() & elsewhere.keys():
            raise ValueError(f"method.{name} is no setting of the method: set it in {elsewhere[name]}")

    def _check_estimator(self, method: Method) -> None:
        """ValueError for settings that the estimator could not follow."""
        name = method.estimator
        try:
            estimator = estimators.find(name)
        except ValueError as error:
            raise ValueError(f"method.{error}") from None  # it begins with "estimator"
        if estimator.token_rewards == "required" and self.reward_model is None:
            raise ValueError(f"method.estimator = {name!r} needs a reward_model: it works on token rewards; got None")
        if method.outcome not in estimator.outcomes:
            raise ValueError(
                f"method.outcome must be {' or '.join(map(repr, estimator.outcomes))} for method.estimator = {name!r}; "
                f"got {method.outcome!r}"
            )
        for setting in {"gamma", "lam"} - set(estimator.reads):
            if getattr(method, setting) != 1:
                raise ValueError(
                    f"method.{setting} must be 1 for method.estimator = {name!r}, which does not use it; "
                    f"got {getattr(method, setting)}"
                )

    def resolved(self) -> Method:
        """The preset with `method` applied."""
        return checked(Method, {**asdict(METHODS[self.preset]), **self.method}, "method")
