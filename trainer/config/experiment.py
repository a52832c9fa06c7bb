"""A whole experiment: every section, and the combinations that cannot be."""

import re
from typing import Literal

from pydantic import Field, model_validator

from ipvrm_core import estimators
from ipvrm_core.trainer.config.base import Positive, Section
from ipvrm_core.trainer.config.data import Source
from ipvrm_core.trainer.config.evaluation import Eval, Leakage, Verifier
from ipvrm_core.trainer.config.model import Model
from ipvrm_core.trainer.config.policy import Rl
from ipvrm_core.trainer.config.reward_model import RewardModel
from ipvrm_core.trainer.config.training import Generation, Rollout, Sft

OF_TEST = ("benchmarks", "rank_prompts", "choice_prompts", "best_of_n")  # of the evaluation: they need [test]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class Config(Section):
    """A whole experiment: one start, any number of reward models and policy runs."""

    name: str = Field("run", description="in the report's title, and the project in Weights & Biases")
    seed: int = Field(0, description="of all that is drawn by chance")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one")
    precision: Literal["no", "bf16"] = Field("no", description="bf16: float32 weights, bfloat16 products in the layers")
    model: Model
    data: Source | None = None
    test: Source | None = None
    verifier: Verifier = Verifier()
    generation: Generation = Generation()
    sft: Sft | None = None
    rollout: Rollout | None = None
    rm: dict[str, RewardModel] = Field({})
    rl: dict[str, Rl] = Field({})
    eval: Eval = Eval()
    leakage: Leakage = Leakage()
    micro_batch_tokens: Positive = Field(16384, description="tokens per forward/backward pass, padding included")
    packing: bool = Field(False, description="passes without padding: answers end to end in one row")
    activation_checkpointing: bool = Field(
        False, description="keep only the input of each layer and make the rest again in the backward pass"
    )
    checkpoint_every: Positive = Field(20, description="steps between checkpoints of a training phase")
    keep_checkpoints: Positive = Field(2, description="of a training phase; a damaged one is passed over")
    wandb: bool = Field(False, description="also log to Weights & Biases (the package must be installed)")

    @property
    def task(self) -> str | None:
        """The built-in task of the training data."""
        return self.data.task if self.data else None

    @model_validator(mode="after")
    def _correction_is_resolved(self):
        """What config.json shows is what runs."""
        level = "token" if self.generation.sampler == "vllm" else "none"
        for rl in self.rl.values():
            if rl.correction.level is None:
                rl.__dict__["correction"] = rl.correction.model_copy(update={"level": level})
        return self

    @model_validator(mode="after")
    def _who_samples_ahead(self):
        for name in [name for name, rl in self.rl.items() if rl.ahead]:
            if self.generation.sampler != "vllm":
                raise ValueError(
                    f"rl.{name}.ahead = true needs generation.sampler = 'vllm', whose engine has weights of its own: "
                    f"transformers' generate reads the ones that are being updated; got {self.generation.sampler!r}"
                )
            if self.rl[name].correction.level == "none":
                raise ValueError(
                    f"rl.{name}.ahead = true needs rl.{name}.correction.level = 'token' or 'sequence': the answers are "
                    "of weights an update old, and the loss would take them for the policy's own; got 'none'"
                )
        return self

    @model_validator(mode="after")
    def _sections_are_there(self):
        """Nothing but reward models on chats of their own can do without data and test."""
        sft = self.sft is not None
        phases = {"sft": sft, "rollout": self.rollout is not None, "rl": bool(self.rl)}
        data = phases | {
            "sft": sft and (self.sft.data is None or self.sft.stop_accuracy is not None),
            "rm.<name>.experts": any(rm.experts for rm in self.rm.values()),
            "model.scratch (its characters)": self.model.scratch is not None,
        }
        test = phases | {
            "the built-in task of [data]": self.task is not None,
            **{f"eval.{name}": bool(getattr(self.eval, name)) for name in OF_TEST},
            "the evaluation (there are no reward models)": not self.rm,
        }
        for name, readers in (("data", data), ("test", test)):
            found = [reader for reader, reads in readers.items() if reads]
            if getattr(self, name) is None and found:
                raise ValueError(f"[{name}] is missing; needed by {', '.join(found)}")
        return self

    @model_validator(mode="after")
    def _phases_fit(self):
        if self.rollout is None and any(rm.data is None for rm in self.rm.values()):
            raise ValueError(
                "rm needs a [rollout] section: reward models without chats of their own (rm.<name>.data) "
                "train on the policy's own answers"
            )
        for name, rm in self.rm.items():
            self._check_held_out(name, rm)
        if self.rollout and self.rollout.held_out >= self.rollout.prompts:
            raise ValueError(f"rollout.held_out must be < rollout.prompts = {self.rollout.prompts}")
        for name, rl in self.rl.items():
            if rl.reward_model and rl.reward_model.name not in self.rm:
                raise ValueError(
                    f"rl.{name}.reward_model.name must be one of {sorted(self.rm)}; got {rl.reward_model.name!r}"
                )
            if rl.reward_model:
                self._check_use(name, rl)
            if rl.credit == "oracle" and not self.task:
                raise ValueError(f"rl.{name}.credit = 'oracle' needs a built-in task, which knows the truth: data.task")
        for name in [*self.rm, *self.rl]:
            if not NAME.fullmatch(name):
                raise ValueError(
                    "names of reward models and policy runs become folders and words of a command line: at most 64 "
                    f"letters (a-z, A-Z), digits, - and _, the first a letter or digit; got {name[:80]!r}"
                )
        if "start" in self.rl:
            raise ValueError("rl.start must have another name: the evaluation calls the starting policy so")
        if self.task and self.eval.benchmarks:
            raise ValueError("eval.benchmarks are texts: they need data.path; got a built-in task")
        if self.task and self.test.task != self.task:
            raise ValueError(f"test.task must be data.task = {self.task!r}; got {self.test.task!r}")
        source = self.sft and (self.sft.data or self.data)
        if source and not (source.task or source.solution_column):
            raise ValueError("sft needs demonstrations: set solution_column in sft.data, or in data")
        if any(rm.experts for rm in self.rm.values()) and not (self.task or self.data.solution_column):
            raise ValueError("rm.<name>.experts needs demonstrations: set solution_column in data")
        if self.model.scratch and not self.task:
            raise ValueError("model.scratch has the characters of a built-in task: set data.task")
        return self

    @property
    def outcomes_alone(self) -> list[str]:
        """Policy runs without credit for tokens (GRPO), which the others are compared with."""
        uncredited = [name for name, rl in self.rl.items() if not rl.reward_model and rl.credit == "reward_model"]
        needs = {name: estimators.find(self.rl[name].resolved().estimator).token_rewards for name in uncredited}
        return [name for name in uncredited if needs[name] != "own"]

    def _check_held_out(self, name: str, rm: RewardModel) -> None:
        """ValueError for a reward model that could not be validated, or not be evaluated against its reference."""
        if rm.data is None:
            if rm.stop_metric and not self.rollout.held_out:
                raise ValueError(f"rm.{name}.stop_metric needs held-out prompts: rollout.held_out must be > 0; got 0")
            return
        if rm.data.reference is None:
            return
        used = [key for key, rl in self.rl.items() if rl.reward_model and rl.reward_model.name == name]
        if used or self.task or self.eval.rank_prompts or self.eval.choice_prompts or self.eval.best_of_n:
            where = f"rl.{used[0]}" if used else "`ipvrm eval`"
            raise ValueError(
                f"rm.{name}.data.reference must be left out: {where} takes the starting policy as the reference; "
                f"got {rm.data.reference!r}"
            )

    def _check_use(self, name: str, rl: Rl) -> None:
        """ValueError where a policy run asks its reward model for something that the objective does not have."""
        used = self.rm[rl.reward_model.name]
        objective = used.build()
        if rl.reward_model.update != "none" and (objective.pairwise or not objective.trains):
            raise ValueError(
                f"rl.{name}.reward_model.update must be 'none' for the "
                f"{'pairwise' if objective.pairwise else 'training-free'} objective {used.objective!r}; "
                f"got {rl.reward_model.update!r}"
            )
        method = rl.resolved()
        if method.td_reference == "sft" and not (objective.head == "vocabulary" and objective.reference):
            raise ValueError(
                f"rl.{name}.method.td_reference must be 'old' for the objective {used.objective!r}, "
                f"whose scores are no log-ratios; got 'sft'"
            )
        agreement = "agreement" in (method.candidate_form, method.single_candidate)
        if agreement and (method.td_reference != "old" or not objective.reference):
            raise ValueError(
                f"rl.{name}.method: agreement (candidate_form, single_candidate) needs log-ratios to the old policy as "
                f"TD errors; got td_reference = {method.td_reference!r}, objective {used.objective!r}"
            )
        alpha = method.alpha
        if objective.head == "value" and alpha:
            raise ValueError(
                f"rl.{name}.method.alpha must be 0 for rm.{rl.reward_model.name} (objective {used.objective!r}): "
                f"its value head scores sampled tokens only, there is no TD error of other tokens; got {alpha}"
            )
