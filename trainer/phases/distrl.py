"""The RL loop: GRPO, GRPO with a process reward, DistRL; which one is a matter of settings (method: docs/method.md)."""

from tqdm import tqdm

from ipvrm_core.trainer.collect import Collected, collect
from ipvrm_core.trainer.config import Rl
from ipvrm_core.trainer.credit import assign, old_policy, update_reward_model
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.optim import make_optimizer
from ipvrm_core.trainer.phases.training import Training, phase_folder
from ipvrm_core.trainer.policy_update import update_policy
from ipvrm_core.trainer.reward import sampled_logprobs

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
        preset = rl.resolved()
        policy = experiment.trainable(experiment.start_policy(), "rl", name)
        models, optimizers = {"policy": policy}, {"policy": make_optimizer(policy, rl.optim)}
        reward_model = objective = reference = None
        if rl.reward_model:
            objective = _online(experiment, rl, preset)
            reward_model = experiment.load(experiment.run / "rm" / rl.reward_model.name / "model")
            if rl.reward_model.update != "none":
                reward_model = experiment.trainable(reward_model, "rl", name, "rm")
                models["reward_model"] = reward_model
                optimizers["reward_model"] = make_optimizer(reward_model, rl.reward_model.optim)
        self_guided = preset.estimator == "msa" and not rl.reward_model
        against_start = rl.reward_model and "sft" in (preset.online_reference, preset.td_reference)
        if rl.kl_coef or self_guided or against_start:
            reference = experiment.start_policy().eval()
        state = {"cursor": 0, "skipped": 0}
        training = todo.enter_context(
            Training(experiment, folder, rl.steps, models, optimizers, show=SHOW, state=state)
        )

        for step in training.steps():
            experiment.seed("rl", name, step)
            batch = collect(experiment, policy, preset, training.state["cursor"], rl.max_rounds)
            training.state["cursor"] = batch.cursor
            if _skipped(training, rl, step, batch):
                continue
            training.uses(batch.answers, rewards=batch.rewards_B.tolist(), groups=batch.groups_B.tolist())
            policy.eval()
            old = old_policy(experiment, policy, preset, batch)
            ref_N = None if reference is None else sampled_logprobs(experiment, reference, batch.answers)
            numbers = dict(batch.numbers)

            def update_rm(batch=batch, old=old, ref_N=ref_N, step=step) -> dict[str, float]:
                return update_reward_model(
                    experiment,
                    preset,
                    rl.reward_model,
                    objective,
                    reward_model,
                    optimizers["reward_model"],
                    batch,
                    ref_N if preset.online_reference == "sft" else old.logprobs_N,
                    old.cu_seqlens,
                    step,
                    rl.steps,
                    old.logprobs_N,
                )

            schedule = rl.reward_model.update if rl.reward_model else "none"
            if schedule == "before":
                numbers |= update_rm()
            credit = assign(experiment, preset, batch, old, reward_model, objective, ref_N, reference)
            numbers |= credit.numbers
            numbers |= update_policy(
                experiment, rl, preset, policy, optimizers["policy"], batch, credit, ref_N if rl.kl_coef else None, step
            )
            if schedule == "after":
                numbers |= update_rm()
            training.log(step, **numbers)
        if "reward_model" in models:
            training.save(reward_model, "reward_model")
        training.finish(policy)


def _skipped(training: Training, rl: Rl, step: int, batch: Collected) -> bool:
    """Whether the step has nothing to learn from: it is logged as skipped, and too many in a row are the last ones."""
    training.state["skipped"] = 0 if batch.answers else training.state["skipped"] + 1
    if batch.answers:
        return False
    training.log(step, **batch.numbers)
    label, count, (low, high) = training.metrics.label, training.state["skipped"], rl.resolved().accuracy_range
    within = "" if (low, high) == (0, 1) else f" and an accuracy in [{low:g}, {high:g}]"
    sampled, unjudged, accuracy = (batch.numbers[key] for key in ("sampled_prompts", "unjudged_prompts", "accuracy"))
    tqdm.write(
        f"{label} step {step} is skipped: none of {sampled} prompts had both right and wrong answers{within} "
        f"(accuracy {accuracy:.3g}, {unjudged} prompts without all verdicts)"
    )
    if count >= rl.max_skipped:
        training.state["stopped"] = True
        tqdm.write(f"{label} ends early at step {step} of {rl.steps}: {count} steps in a row were skipped")
    return True


def _online(experiment: Experiment, rl, preset):
    """The objective of the online update: the offline one, with the online margin where it takes the boundary."""
    settings = experiment.config.rm[rl.reward_model.name]
    objective = settings.build()
    return settings.build(margin=preset.online_margin) if objective.boundary else objective
