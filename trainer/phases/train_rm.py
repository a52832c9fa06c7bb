"""Offline training of a reward model, on the starting policy's own rollouts or on chats of its own."""

from pathlib import Path

import torch
from tqdm import tqdm

from ipvrm_core.objectives import Objective
from ipvrm_core.packing import cu_seqlens_from_lengths
from ipvrm_core.trainer import inputs
from ipvrm_core.trainer.config import RewardModel
from ipvrm_core.trainer.evaluation.reward_model.calibration import (
    PLACES,
    expected_calibration_error,
    prefix_probabilities,
    reliability,
)
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.files import write_json
from ipvrm_core.trainer.identity import model_digests
from ipvrm_core.trainer.models import add_value_head
from ipvrm_core.trainer.optim import apply_step, make_optimizer, vanishing_steps
from ipvrm_core.trainer.phases.best import Best
from ipvrm_core.trainer.phases.rm_chats import from_chats, other_reference, read_chats
from ipvrm_core.trainer.phases.rm_data import Labelled, RewardData, expert_rows, from_rollouts
from ipvrm_core.trainer.phases.rollout import Rollouts
from ipvrm_core.trainer.phases.training import Training, phase_folder
from ipvrm_core.trainer.reward import answer_scores, auc, backward_reward_loss, needs_reference, scores
from ipvrm_core.trainer.seeds import epoch_slice, stable_seed


def run(experiment: Experiment, name: str, resume: bool = False) -> None:
    """Train the reward model `name` from the starting policy; writes rm/<name>/model.

    Its reference is the starting policy too, unless its chats name another. rm/<name>/calibration.json holds the
    reliability bins of the saved model, rm/<name>/data.json what became of the rows of chats.
    """
    settings = experiment.config.rm[name]
    folder = experiment.run / "rm" / name
    with phase_folder(folder, "model", resume) as todo:
        if not todo:
            return
        objective = settings.build()
        if settings.data is None:
            data = from_rollouts(experiment, settings)  # before any model: this is quick to fail
            _check_units(data, name, objective)
            model = reference = experiment.start_policy()
        else:
            rendered = read_chats(experiment, name, settings.data)
            model = reference = experiment.start_policy()
            if settings.data.reference:
                inputs.keep(experiment.run, {f"rm.{name}.data.reference": model_digests(settings.data.reference)})
                reference = other_reference(experiment, settings.data.reference, model)
            data = from_chats(experiment, name, rendered, objective, reference.eval())
            _check_units(data, name, objective)
            write_json(folder / "data.json", data.counts)
            tqdm.write(f"rm/{name} data: " + "  ".join(f"{key} {value}" for key, value in data.counts.items()))
        if not objective.trains:
            _measure_only(experiment, folder, model, objective, data.held_out)
            return
        experts = expert_rows(experiment, reference.eval(), settings.experts * settings.steps)
        del reference
        model = experiment.trainable(model, "rm", name).train()
        if objective.head == "value":
            add_value_head(model.model)
        _train(experiment, name, folder, model, objective, data, experts)


def _train(
    experiment: Experiment,
    name: str,
    folder: Path,
    model,
    objective: Objective,
    data: RewardData,
    experts: list[Labelled],
) -> None:
    settings = experiment.config.rm[name]
    optimizer = make_optimizer(model.model, settings.optim)
    warning = vanishing_steps(model.model, settings.optim, settings.steps)
    if warning:
        tqdm.write(f"rm.{name}.optim: {warning}")
    show = ("loss", "grad_norm", "held_out_auc")
    size = 1 if settings.pairing == "none" else 2
    per_step = settings.batch // size
    shuffle = stable_seed(experiment.config.seed, "rm order")  # the same order for every reward model of a run
    with Training(
        experiment, folder, settings.steps, {"model": model.model}, {"model": optimizer}, show=show, every=25
    ) as training:
        best = Best(folder, settings.stop_metric, settings.patience, training.state)
        for step in training.steps():
            experiment.seed("rm", name, step)
            chosen = epoch_slice(len(data.units), (step - 1) * per_step, per_step, shuffle)
            rows = [row for index in chosen for row in data.units[index]]
            rows += experts[(step - 1) * settings.experts : step * settings.experts]
            training.uses([row.answer for row in rows], correct=[row.correct for row in rows])
            loss = _backward(experiment, model, objective, rows)
            norm = apply_step(optimizer, settings.optim, step, settings.steps)
            numbers = {}
            if data.held_out and _validates(settings, step):
                numbers, bins = measure(experiment, model, data.held_out, objective)
                if best.see(step, numbers, model.model, optimizer) and bins:
                    write_json(folder / "calibration.json", {"step": step, "percent_of_answer": bins})
            training.log(step, loss=loss, grad_norm=norm, epoch=step * per_step / len(data.units), **numbers)
        best.restore(model.model, optimizer)
        training.finish(model.model)
        best.forget()


def _validates(settings: RewardModel, step: int) -> bool:
    return step % settings.validate_every == 0 or step == settings.steps


def _check_units(data: RewardData, name: str, objective: Objective) -> None:
    if not data.units and objective.trains:
        advice = "" if objective.pairwise else f". rm.{name}.pairing = 'none' takes single answers"
        raise ValueError(f"rm.{name}: none of the prompts has right and wrong answers: there are no pairs{advice}")


def _measure_only(experiment: Experiment, folder, model, objective: Objective, held_out: list[Rollouts]) -> None:
    """The starting policy is the reward model: one line of numbers, and its weights as they are."""
    with Training(experiment, folder, 1, {}, {}, show=("held_out_auc",)) as training:
        for step in training.steps():
            training.log(step, **(validate(experiment, model, held_out, objective) if held_out else {}))
        training.finish(model.model)


def _backward(experiment: Experiment, model, objective: Objective, rows: list[Labelled]) -> float:
    device = experiment.device
    return backward_reward_loss(
        model,
        objective,
        [row.answer for row in rows],
        torch.tensor([value for row in rows for value in row.ref_logprobs], device=device),
        torch.tensor([float(row.correct) for row in rows], device=device),
        torch.full((len(rows),), 1 / len(rows), device=device),
    )


def validate(experiment: Experiment, model, rollouts: list[Rollouts], objective: Objective) -> dict[str, float]:
    """The numbers of `measure`."""
    return measure(experiment, model, rollouts, objective)[0]


def measure(
    experiment: Experiment, model, rollouts: list[Rollouts], objective: Objective
) -> tuple[dict[str, float], dict[str, list[dict]]]:
    """How the held-out answers' scores fit their verdicts, all prompts pooled: (numbers, reliability bins by place).

    held_out_auc, held_out_auc_sum: of mean and sum of the token scores. held_out_pair_accuracy: share of (right, wrong)
    answers to one prompt whose means are in this order, ties half. Where scores are log-ratios also held_out_accuracy:
    share of answers with (vbar_T > 0) = label, and held_out_ece_<p>: expected calibration error of sigma(vbar_t) after
    p percent of an answer. Empty where all answers are right, or all wrong.
    """
    answers = [answer for group in rollouts for answer in group.answers]
    reference_N = torch.tensor([v for group in rollouts for values in group.ref_logprobs for v in values])
    was_training = model.training
    model.eval()
    score_N = scores(model, objective, answers, reference_N.to(experiment.device)).cpu()
    model.train(was_training)
    lengths = [len(answer.response_ids) for answer in answers]
    cu_seqlens = cu_seqlens_from_lengths(torch.tensor(lengths))
    sums, means = answer_scores(objective.token_scores(score_N, cu_seqlens), cu_seqlens)
    labels = torch.tensor([correct for group in rollouts for correct in group.correct])
    if labels.all() or not labels.any():
        return {}, {}  # one kind of answers only: nothing to rank
    numbers = {"held_out_auc": auc(means, labels), "held_out_auc_sum": auc(sums, labels)}
    numbers |= _pair_accuracy(means, labels, [len(group.answers) for group in rollouts])
    bins = {}
    if needs_reference(objective):
        numbers["held_out_accuracy"] = ((means > 0) == labels).double().mean().item()
        for place in PLACES:
            found = prefix_probabilities(score_N, lengths, objective.beta, place)
            bins[str(place)] = reliability(found, labels)
            numbers[f"held_out_ece_{place}"] = expected_calibration_error(bins[str(place)])
    return numbers, bins


def _pair_accuracy(means: torch.Tensor, labels: torch.Tensor, sizes: list[int]) -> dict[str, float]:
    won = pairs = 0.0
    for scored, labelled in zip(means.split(sizes), labels.split(sizes), strict=True):
        count = int(labelled.sum()) * int((~labelled).sum())
        if count:
            won, pairs = won + auc(scored, labelled) * count, pairs + count
    return {"held_out_pair_accuracy": won / pairs} if pairs else {}
