"""Offline training of an implicit reward model on the starting policy's own rollouts."""

import torch

from ipvrm_core.packing import cu_seqlens_from_lengths
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.optim import apply_step, make_optimizer
from ipvrm_core.trainer.phases import rollout as rollout_phase
from ipvrm_core.trainer.phases.rollout import Rollouts
from ipvrm_core.trainer.phases.training import Training, phase_folder
from ipvrm_core.trainer.reward import answer_scores, auc, backward_reward_loss, sampled_logprobs

Labelled = tuple  # (Answer, reference log-probs, correct)


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
        pairs = make_pairs(rollouts[:split], settings.pairs_per_prompt, experiment.config.seed)
        if not pairs:
            raise ValueError(
                f"rm.{name}: none of {split} prompts has both right and wrong answers; nothing to learn from"
            )
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
        per_step = settings.batch // 2
        for step in training.steps():
            experiment.seed("rm", name, step)
            chosen = [
                pairs[i] for i in epoch_slice(len(pairs), (step - 1) * per_step, per_step, experiment.config.seed)
            ]
            rows = [row for pair in chosen for row in pair]
            device = experiment.device
            labels_B = torch.tensor([float(row[2]) for row in rows], device=device)
            loss = backward_reward_loss(
                experiment,
                model,
                objective,
                [row[0] for row in rows],
                torch.tensor([value for row in rows for value in row[1]], device=device),
                labels_B,
                torch.full_like(labels_B, 1 / len(rows)),
            )
            norm = apply_step(optimizer, settings.optim, step, settings.steps)
            numbers = {}
            if split < len(rollouts) and (step % settings.validate_every == 0 or step == settings.steps):
                numbers = validate(experiment, model, rollouts[split:])
            training.log(step, loss=loss, grad_norm=norm, epoch=step * per_step / len(pairs), **numbers)
        training.finish(model)


def make_pairs(rollouts: list[Rollouts], per_prompt: int | None, seed: int) -> list[tuple[Labelled, Labelled]]:
    """(right, wrong) answers of the same prompt, each answer in at most one pair; prompts without both give none."""
    pairs = []
    for group in rollouts:
        order = torch.randperm(
            len(group.answers), generator=torch.Generator().manual_seed(seed + group.prompt)
        ).tolist()
        rows = [(group.answers[i], group.ref_logprobs[i], group.correct[i]) for i in order]
        right, wrong = [row for row in rows if row[2]], [row for row in rows if not row[2]]
        pairs += list(zip(right, wrong, strict=False))[:per_prompt]
    return pairs


def epoch_slice(size: int, start: int, count: int, seed: int) -> list[int]:
    """Items start .. start + count of an endless sequence of shuffled epochs: a pure function, so resuming needs no state."""
    chosen = []
    for position in range(start, start + count):
        epoch, place = divmod(position, size)
        if not chosen or place == 0:
            order = torch.randperm(size, generator=torch.Generator().manual_seed(seed * 1000 + epoch)).tolist()
        chosen.append(order[place])
    return chosen


def validate(experiment: Experiment, model, rollouts: list[Rollouts]) -> dict[str, float]:
    """AUC of the held-out answers' scores against their verdicts; the average over prompts is not taken, all are pooled."""
    answers = [answer for group in rollouts for answer in group.answers]
    reference_N = torch.tensor([v for group in rollouts for values in group.ref_logprobs for v in values])
    model.eval()
    log_ratio_N = sampled_logprobs(experiment, model, answers).cpu() - reference_N
    model.train()
    lengths = torch.tensor([len(answer.response_ids) for answer in answers])
    sums, means = answer_scores(log_ratio_N, cu_seqlens_from_lengths(lengths))
    labels = torch.tensor([correct for group in rollouts for correct in group.correct])
    return {"held_out_auc": auc(means, labels), "held_out_auc_sum": auc(sums, labels)}
