"""Offline training of a reward model on the starting policy's own rollouts."""

from typing import NamedTuple

import torch

from ipvrm_core.objectives import Objective
from ipvrm_core.packing import cu_seqlens_from_lengths
from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.config import RewardModel
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.models import add_value_head
from ipvrm_core.trainer.optim import apply_step, make_optimizer
from ipvrm_core.trainer.phases import rollout as rollout_phase
from ipvrm_core.trainer.phases.rollout import Rollouts
from ipvrm_core.trainer.phases.training import Training, phase_folder
from ipvrm_core.trainer.reward import answer_scores, auc, backward_reward_loss, sampled_logprobs, scores
from ipvrm_core.trainer.seeds import epoch_slice, stable_seed


class Labelled(NamedTuple):
    """One answer to learn from."""

    answer: Answer
    ref_logprobs: list[float]
    correct: bool


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
        pairs = make_pairs(rollouts[:split], settings, experiment.config.seed)
        if not pairs and objective.trains:
            raise ValueError(f"rm.{name}: none of {split} prompts has right and wrong answers; nothing to learn from")
        model = experiment.start_policy()
        if not objective.trains:
            _measure_only(experiment, folder, model, objective, rollouts[split:])
            return
        experts = expert_rows(experiment, model.eval(), settings.experts * settings.steps)
        model = experiment.trainable(model, "rm", name).train()
        if objective.head == "value":
            add_value_head(model)
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
        per_step = settings.batch // 2
        shuffle = stable_seed(experiment.config.seed, "rm order")  # the same order for every reward model of a run
        for step in training.steps():
            experiment.seed("rm", name, step)
            chosen = epoch_slice(len(pairs), (step - 1) * per_step, per_step, shuffle)
            rows = [row for index in chosen for row in pairs[index]]
            rows += experts[(step - 1) * settings.experts : step * settings.experts]
            loss = _backward(experiment, model, objective, rows)
            norm = apply_step(optimizer, settings.optim, step, settings.steps)
            numbers = {}
            if split < len(rollouts) and (step % settings.validate_every == 0 or step == settings.steps):
                numbers = validate(experiment, model, rollouts[split:], objective)
            training.log(step, loss=loss, grad_norm=norm, epoch=step * per_step / len(pairs), **numbers)
        training.finish(model)


def _measure_only(experiment: Experiment, folder, model, objective: Objective, held_out: list[Rollouts]) -> None:
    """The starting policy is the reward model: one line of numbers, and its weights as they are."""
    training = Training(experiment, folder, 1, {}, {}, show=("held_out_auc",))
    for step in training.steps():
        training.log(step, **(validate(experiment, model, held_out, objective) if held_out else {}))
    training.finish(model)


def expert_rows(experiment: Experiment, reference, count: int) -> list[Labelled]:
    """`count` demonstrations as right answers, with their log-probs under the starting policy."""
    examples = experiment.examples("rm experts", 0, count) if count else []
    answers = [experiment.demonstration(example) for example in examples]
    if not answers:
        return []
    logprobs_N = sampled_logprobs(experiment, reference, answers).cpu()
    pieces = logprobs_N.split([len(answer.response_ids) for answer in answers])
    return [Labelled(answer, piece.tolist(), True) for answer, piece in zip(answers, pieces, strict=True)]


def _backward(experiment: Experiment, model, objective: Objective, rows: list[Labelled]) -> float:
    device = experiment.device
    return backward_reward_loss(
        experiment,
        model,
        objective,
        [row.answer for row in rows],
        torch.tensor([value for row in rows for value in row.ref_logprobs], device=device),
        torch.tensor([float(row.correct) for row in rows], device=device),
        torch.full((len(rows),), 1 / len(rows), device=device),
    )


def make_pairs(rollouts: list[Rollouts], settings: RewardModel, seed: int) -> list[tuple[Labelled, Labelled]]:
    """(right, wrong) answers of the same prompt, so that both kinds weigh the same; prompts without both give none.

    disjoint: every answer in at most one pair. covering: in at least one, the rarer kind repeats. Of one prompt at most
    `pairs_per_prompt` pairs.
    """
    pairs = []
    for group in rollouts:
        size = len(group.answers)
        order = epoch_slice(size, 0, size, stable_seed(seed, "pairs", group.prompt))
        rows = [Labelled(group.answers[i], group.ref_logprobs[i], group.correct[i]) for i in order]
        right, wrong = [row for row in rows if row.correct], [row for row in rows if not row.correct]
        if not right or not wrong:
            continue
        count = (min if settings.pairing == "disjoint" else max)(len(right), len(wrong))
        chosen = [(right[i % len(right)], wrong[i % len(wrong)]) for i in range(count)]
        pairs += chosen[: settings.pairs_per_prompt]
    return pairs


def validate(experiment: Experiment, model, rollouts: list[Rollouts], objective: Objective) -> dict[str, float]:
    """AUC of the held-out answers' scores against their verdicts, all prompts pooled."""
    answers = [answer for group in rollouts for answer in group.answers]
    reference_N = torch.tensor([v for group in rollouts for values in group.ref_logprobs for v in values])
    was_training = model.training
    model.eval()
    score_N = scores(experiment, model, objective, answers, reference_N.to(experiment.device)).cpu()
    model.train(was_training)
    cu_seqlens = cu_seqlens_from_lengths(torch.tensor([len(answer.response_ids) for answer in answers]))
    sums, means = answer_scores(objective.token_scores(score_N, cu_seqlens), cu_seqlens)
    labels = torch.tensor([correct for group in rollouts for correct in group.correct])
    if labels.all() or not labels.any():
        return {}  # one kind of answers only: nothing to rank
    return {"held_out_auc": auc(means, labels), "held_out_auc_sum": auc(sums, labels)}
