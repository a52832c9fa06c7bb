"""One RL step, read from top to bottom: GRPO, GRPO with a process reward, DistRL; which one is a matter of settings."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ipvrm_core.method import Method
from ipvrm_core.objectives import Objective
from ipvrm_core.trainer.config import Rl
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.rl.ahead import Ahead
from ipvrm_core.trainer.rl.clock import Clock
from ipvrm_core.trainer.rl.collect import Collected, collect
from ipvrm_core.trainer.rl.correction import correct
from ipvrm_core.trainer.rl.credit import assign
from ipvrm_core.trainer.rl.old_policy import old_policy
from ipvrm_core.trainer.rl.policy_update import update_policy
from ipvrm_core.trainer.rl.reward_update import update_reward_model
from ipvrm_core.trainer.sampling.base import Sampler


@dataclass
class Learner:
    """What the steps of a policy run have in common. reference: the start, where something is compared with it."""

    name: str
    rl: Rl
    method: Method
    policy: LanguageModel
    sampler: Sampler
    optimizers: dict[str, torch.optim.Optimizer]  # policy, and reward_model where that is updated
    reward_model: LanguageModel | None = None
    objective: Objective | None = None
    reference: LanguageModel | None = None
    ahead: Ahead | None = None  # rl.<name>.ahead: who samples the next batch while this one is learnt from

    def seed(self, step: int) -> tuple:
        """What everything that is drawn in a step depends on, besides the run's own seed."""
        return "rl", self.name if self.rl.seed is None else self.rl.seed, step

    @property
    def stream(self) -> str:
        """Of the training examples."""
        return "rl" if self.rl.seed is None else f"rl {self.rl.seed}"


def rl_step(
    experiment: Experiment, learner: Learner, step: int, cursor: int, uses: Callable
) -> tuple[Collected, dict[str, float]]:
    """Sample, judge and keep a batch; credit every token and candidate; update. Without a batch nothing else.

    cursor: the next unused training example. uses: is told what the step trains on. Returns the batch and the numbers.
    """
    rl, method, clock = learner.rl, learner.method, Clock()
    experiment.seed(*learner.seed(step))
    if learner.ahead:
        batch = learner.ahead.take(step, cursor)
    else:
        batch = collect(experiment, learner.sampler, rl.batch, cursor, learner.stream)
    clock.read("sampling")
    numbers = {**batch.numbers, "staleness": batch.staleness}
    if not batch.answers:
        return batch, {**numbers, **clock.seconds}
    batch = batch.to(experiment.device)
    if not learner.ahead:
        learner.sampler.rest()
    uses(batch.answers, rewards=batch.rewards_B.tolist(), groups=batch.groups_B.tolist())

    old = old_policy(learner.policy, method, batch.answers)
    correction, mismatch = correct(rl.correction, batch.sampler_logprobs_N, old.logprobs_N, old.cu_seqlens)
    ref_N = None if learner.reference is None else learner.reference.logprobs(batch.answers)
    clock.read("log_probs")

    def update_rm() -> dict[str, float]:
        against_N = ref_N if method.online_reference == "sft" else old.logprobs_N
        parts = learner.reward_model, learner.optimizers["reward_model"], learner.objective, rl.reward_model
        numbers = update_reward_model(*parts, method, batch, old, against_N, step, rl.steps)
        clock.read("reward_model")
        return numbers

    schedule = rl.reward_model.update if rl.reward_model else "none"
    rm_numbers = update_rm() if schedule == "before" else {}
    scorer = learner.reward_model, learner.objective, ref_N, learner.reference
    credit = assign(method, batch, old, *scorer, rl.credit)
    clock.read("credit")
    policy_numbers = update_policy(
        learner.policy,
        learner.optimizers["policy"],
        rl,
        method,
        batch.answers,
        credit,
        ref_N if rl.kl_coef else None,
        step,
        correction,
    )
    clock.read("policy")
    if schedule == "after":
        rm_numbers = update_rm()
    if learner.ahead:
        learner.ahead.wait()
    learner.sampler.sync(learner.policy)
    clock.read("sync")
    return batch, {**numbers, **mismatch, **rm_numbers, **credit.numbers, **policy_numbers, **clock.seconds}
