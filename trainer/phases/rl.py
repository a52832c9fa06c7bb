"""Policy runs: the loop over RL steps, with checkpoints and an end (trainer/rl/step.py has the step)."""

from tqdm import tqdm

from ipvrm_core import estimators
from ipvrm_core.objectives import Objective
from ipvrm_core.trainer.config import Rl
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.optim import make_optimizer
from ipvrm_core.trainer.phases.training import Training, phase_folder
from ipvrm_core.trainer.rl.ahead import Ahead
from ipvrm_core.trainer.rl.collect import Collected
from ipvrm_core.trainer.rl.step import Learner, rl_step
from ipvrm_core.trainer.roles import roles

SHOW = (
    "accuracy",
    "kept_prompts",
    "candidates",
    "sigma_v",
    "rm_auc",
    "loss_sampled",
    "loss_candidates",
    "kl_old",
    "grad_norm",
)


def run(experiment: Experiment, name: str, resume: bool = False) -> None:
    """Train the policy run `name`; writes rl/<name>/model, and rl/<name>/reward_model where it was updated."""
    rl = experiment.config.rl[name]
    folder = experiment.run / "rl" / name
    with phase_folder(folder, "model", resume) as todo:
        if not todo:
            return
        learner = make_learner(experiment, name)
        models = {key: getattr(learner, key).model for key in learner.optimizers}
        state = {"cursor": 0, "skipped": 0}
        training = todo.enter_context(
            Training(experiment, folder, rl.steps, models, learner.optimizers, show=SHOW, state=state)
        )
        todo.callback(learner.sampler.close)
        learner.sampler.sync(learner.policy)  # the weights may be a checkpoint's
        if rl.ahead:
            kept = training.state.get("ahead")
            learner.ahead = todo.enter_context(Ahead(experiment, learner, learner.sampler, kept))
        for step in training.steps():
            batch, numbers = rl_step(experiment, learner, step, training.state["cursor"], training.uses)
            training.state["cursor"] = batch.cursor
            if learner.ahead:
                training.state["ahead"] = learner.ahead.to_json()
            training.log(step, **numbers)
            _note_skipped(training, rl, step, batch)
        if "reward_model" in models:
            training.save(models["reward_model"], "reward_model")
        training.finish(models["policy"])


def make_learner(experiment: Experiment, name: str) -> Learner:
    """The models of the policy run `name` before its first step."""
    rl = experiment.config.rl[name]
    method = rl.resolved()
    models = roles(experiment, name)
    policy = models.policy()
    learner = Learner(name, rl, method, policy, experiment.sampler(policy), {})
    learner.optimizers["policy"] = make_optimizer(policy.model, rl.optim)
    if rl.reward_model:
        learner.objective = _online(experiment, rl)
        trained = rl.reward_model.update != "none"
        learner.reward_model = models.reward_model(rl.reward_model.name, trained)
        if trained:
            learner.optimizers["reward_model"] = make_optimizer(learner.reward_model.model, rl.reward_model.optim)
    own_rewards = not rl.reward_model and estimators.find(method.estimator).token_rewards == "own"
    against_start = rl.reward_model and "sft" in (method.online_reference, method.td_reference)
    if rl.kl_coef or own_rewards or against_start:
        learner.reference = models.reference()
    return learner


def _online(experiment: Experiment, rl: Rl) -> Objective:
    """The objective of the online update: the offline one, with the online margin where it takes the boundary."""
    settings = experiment.config.rm[rl.reward_model.name]
    objective = settings.build()
    return settings.build(margin=rl.resolved().online_margin) if objective.boundary else objective


def _note_skipped(training: Training, rl: Rl, step: int, batch: Collected) -> None:
    """A step that had nothing to learn from is said to be skipped, and too many in a row are the last ones."""
    training.state["skipped"] = 0 if batch.answers else training.state["skipped"] + 1
    if batch.answers:
        return
    label, count, (low, high) = training.metrics.label, training.state["skipped"], rl.batch.accuracy_range
    within = "" if (low, high) == (0, 1) else f" and an accuracy in [{low:g}, {high:g}]"
    sampled, unjudged, accuracy = (batch.numbers[key] for key in ("sampled_prompts", "unjudged_prompts", "accuracy"))
    tqdm.write(
        f"{label} step {step} is skipped: none of {sampled} prompts had both right and wrong answers{within} "
        f"(accuracy {accuracy:.3g}, {unjudged} prompts without all verdicts)"
    )
    if count >= rl.max_skipped:
        training.state["stopped"] = True
        tqdm.write(f"{label} ends early at step {step} of {rl.steps}: {count} steps in a row were skipped")
