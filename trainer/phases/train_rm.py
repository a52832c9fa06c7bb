"""Offline training of an implicit reward model on the starting policy's own rollouts."""

from typing import NamedTuple

import torch

from ipvrm_core import dynamic_loss_weights
from ipvrm_core.objectives import Objective
from ipvrm_core.packing import cu_seqlens_from_lengths
from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.config import RewardModel
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.optim import apply_step, make_optimizer
from ipvrm_core.trainer.phases import rollout as rollout_phase
from ipvrm_core.trainer.phases.rollout import Rollouts
from ipvrm_core.trainer.phases.training import Training, phase_folder
from ipvrm_core.trainer.reward import answer_scores, auc, backward_reward_loss, sampled_logprobs
from ipvrm_core.trainer.seeds import epoch_slice, stable_seed


class Labelled(NamedTuple):
    """One answer to learn from; the weight of a pair's two members is 1."""

    answer: Answer
    ref_logprobs: list[float]
    correct: bool
    weight: float


def run(experiment: Experiment, name: str, resume: bool = False) -> None:
    """Train the reward model `name` from the starting policy, which is also its reference; writes rm/<name>/model."""
    settings = experiment.config.rm[name]
    folder = experiment.run / "rm" / name
    with phase_folder(folder, "model", resume) as todo:
        if not todo:
            return
        objective = settings.build()
        rollouts = rollout_phase.read(experiment.run / "rollout")
        split = len(rollouts) - experiment.config.rollout.held_out
        items = select(rollouts[:split], settings, experiment.config.seed)
        if not items:
            raise ValueError(f"rm.{name}: none of {split} prompts has right and wrong answers; nothing to learn from")
        model = experiment.trainable(experiment.start_policy(), "rm", name).train()
        optimizer = make_optimizer(model, settings.optim)
        training = Training(
            experiment,
            folder,
            settings.steps,
            {"model": model},
            {"model": optimizer},
            show=("loss", "grad_norm", "held_out_auc"),
            every=25,
        )
        per_step = settings.batch // len(items[0])
        shuffle = stable_seed(experiment.config.seed, "rm order")  # the same order for every reward model of a run
        for step in training.steps():
            experiment.seed("rm", name, step)
            chosen = epoch_slice(len(items), (step - 1) * per_step, per_step, shuffle)
            loss = _backward(experiment, model, objective, [row for index in chosen for row in items[index]])
            norm = apply_step(optimizer, settings.optim, step, settings.steps)
            numbers = {}
            if split < len(rollouts) and (step % settings.validate_every == 0 or step == settings.steps):
                numbers = validate(experiment, model, rollouts[split:])
            training.log(step, loss=loss, grad_norm=norm, epoch=step * per_step / len(items), **numbers)
        training.finish(model)


def _backward(experiment: Experiment, model, objective: Objective, rows: list[Labelled]) -> float:
    device = experiment.device
    weights_B = torch.tensor([row.weight for row in rows], device=device)
    return backward_reward_loss(
        experiment,
        model,
        objective,
        [row.answer for row in rows],
        torch.tensor([value for row in rows for value in row.ref_logprobs], device=device),
        torch.tensor([float(row.correct) for row in rows], device=device),
        weights_B / len(rows),
    )


def select(rollouts: list[Rollouts], settings: RewardModel, seed: int) -> list[tuple[Labelled, ...]]:
    """What to train on, from prompts that have right and wrong answers; the items are shuffled and batched later.

    pairs: (right, wrong) of the same prompt, each answer in at most one pair, at most `pairs_per_prompt`.
    answers: every answer by itself, weighted 1/(2 mu) or 1/(2 (1 - mu)), so that right and wrong weigh the same.
    """
    items: list[tuple[Labelled, ...]] = []
    for group in rollouts:
        size = len(group.answers)
        order = epoch_slice(size, 0, size, stable_seed(seed, "pairs", group.prompt))
        labels = torch.tensor(group.correct, dtype=torch.float32)
        share = labels.mean().expand(size)
        balanced = dynamic_loss_weights(labels, share, "group").tolist()
        weights = [1.0] * size if settings.selection == "pairs" else balanced
        rows = [Labelled(group.answers[i], group.ref_logprobs[i], group.correct[i], weights[i]) for i in order]
        if settings.selection == "pairs":
            right, wrong = [row for row in rows if row.correct], [row for row in rows if not row.correct]
            items += list(zip(right, wrong, strict=False))[: settings.pairs_per_prompt]
        elif 0 < share[0] < 1:
            items += [(row,) for row in rows]
    return items


def validate(experiment: Experiment, model, rollouts: list[Rollouts]) -> dict[str, float]:
    """AUC of the held-out answers' scores against their verdicts, all prompts pooled."""
    answers = [answer for group in rollouts for answer in group.answers]
    reference_N = torch.tensor([v for group in rollouts for values in group.ref_logprobs for v in values])
    model.eval()
    log_ratio_N = sampled_logprobs(experiment, model, answers).cpu() - reference_N
    model.train()
    lengths = torch.tensor([len(answer.response_ids) for answer in answers])
    sums, means = answer_scores(log_ratio_N, cu_seqlens_from_lengths(lengths))
    labels = torch.tensor([correct for group in rollouts for correct in group.correct])
    if labels.all() or not labels.any():
        return {}  # one kind of answers only: nothing to rank
    return {"held_out_auc": auc(means, labels), "held_out_auc_sum": auc(sums, labels)}
