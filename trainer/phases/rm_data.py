"""What a reward model is trained and validated on: units of one or two labelled answers, and held-out answers."""

from dataclasses import dataclass, field
from typing import NamedTuple

from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.config import RewardModel
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.phases import rollout as rollout_phase
from ipvrm_core.trainer.phases.rollout import Rollouts
from ipvrm_core.trainer.seeds import epoch_slice, stable_seed


class Labelled(NamedTuple):
    """One answer to learn from."""

    answer: Answer
    ref_logprobs: list[float]
    correct: bool


Unit = tuple[Labelled, ...]  # a right and a wrong answer to one prompt, or a single answer


@dataclass(frozen=True)
class RewardData:
    """units: what a step's batch is drawn from; counts: what became of the rows, for people."""

    units: list[Unit]
    held_out: list[Rollouts]
    counts: dict[str, int] = field(default_factory=dict)


def from_rollouts(experiment: Experiment, settings: RewardModel) -> RewardData:
    """The starting policy's own answers, with the log-probs that the rollout phase kept."""
    rollouts = rollout_phase.read(experiment.run / "rollout")
    split = experiment.config.rollout.prompts - experiment.config.rollout.held_out
    training, held_out = ([group for group in rollouts if (group.prompt < split) == kind] for kind in (True, False))
    return RewardData(make_units(training, settings, experiment.config.seed), held_out)


def make_units(groups: list[Rollouts], settings: RewardModel, seed: int) -> list[Unit]:
    if settings.pairing != "none":
        return make_pairs(groups, settings, seed)
    return [(Labelled(*row),) for group in groups for row in zip(*_columns(group), strict=True)]


def _columns(group: Rollouts):
    return group.answers, group.ref_logprobs, group.correct


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


def expert_rows(experiment: Experiment, reference, count: int) -> list[Labelled]:
    """`count` demonstrations as right answers, with their log-probs under the reference."""
    examples = experiment.examples("rm experts", 0, count) if count else []
    answers = [experiment.text.demonstration(example) for example in examples]
    if not answers:
        return []
    logprobs_N = reference.logprobs(answers).cpu()
    pieces = logprobs_N.split([len(answer.response_ids) for answer in answers])
    return [Labelled(answer, piece.tolist(), True) for answer, piece in zip(answers, pieces, strict=True)]
