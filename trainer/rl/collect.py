"""One batch of on-policy answers: oversample prompts, verify, keep those whose answers are mixed and in the range."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ipvrm_core.method import Method
from ipvrm_core.sequences.advantages import answer_advantages
from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.config import Batch
from ipvrm_core.trainer.data.example import Example
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.sampling.base import Sample, Sampler
from ipvrm_core.trainer.sampling.verified import right_share
from ipvrm_core.trainer.truth import due_tokens
from ipvrm_core.trainer.verify import Verdict
from ipvrm_core.trainer.verify.base import all_decided


class Group(NamedTuple):
    """The answers to one prompt."""

    example: Example
    samples: list[Sample]
    verdicts: list[Verdict]

    @property
    def judged(self) -> bool:
        return all_decided(self.verdicts)

    @property
    def right(self) -> int:
        return sum(verdict.correct for verdict in self.verdicts)


@dataclass(frozen=True)
class Collected:
    """B = kept prompts x rollouts answers, groups contiguous; none where there is nothing to learn from. On the CPU
    until it is moved.
    """

    answers: list[Answer]
    rewards_B: Tensor  # 0/1 float32
    groups_B: Tensor  # int64
    group_mean_B: Tensor  # mu of the answer's prompt
    cursor: int  # the next unused training example
    numbers: dict[str, float]
    sampler_logprobs_N: Tensor | None = None  # of the tokens, by whoever sampled them; None: it is not known
    due_N: Tensor | None = None  # the token that a built-in task demands, -1 where it leaves it open
    staleness: int = 0  # updates of the policy since it sampled the answers

    def outcome(self, method: Method) -> Tensor:
        """The advantage of each whole answer: [B]."""
        return answer_advantages(self.rewards_B, self.groups_B, method.outcome)

    def to(self, device: torch.device) -> "Collected":
        return replace(self, **{name: tensor.to(device) for name, tensor in self._tensors().items()})

    def to_json(self) -> dict:
        """In JSON's types, and exactly: a float32 is a float."""
        return {**vars(self), **{name: tensor.tolist() for name, tensor in self._tensors().items()}}

    @classmethod
    def from_json(cls, kept: dict) -> "Collected":
        answers = [Answer(*each) for each in kept["answers"]]
        tensors = {name: torch.tensor(kept[name]) for name in kept if name.endswith(("_B", "_N")) and kept[name]}
        return cls(**{**kept, "answers": answers, **tensors})

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


def collect(experiment: Experiment, sampler: Sampler, batch: Batch, cursor: int, stream: str = "rl") -> Collected:
    """Sample `prompts` prompts x `rollouts` answers and keep the first `keep_prompts` of the mixed ones, 0 < mu < 1,
    with mu in `accuracy_range`. A prompt with an answer that has no verdict is left out altogether.

    Too few of them: `sample_on` samples further prompts, `fill` completes the quota with the others (unmixed: zero
    outcome advantage, no reward-model loss), and samples further ones only while not a single prompt is kept. After
    `max_rounds` rounds either goes on with what is there.
    """
    groups: list[Group] = []
    enough = batch.keep_prompts if batch.too_few_mixed == "sample_on" else 1
    for _ in range(batch.max_rounds):
        groups += _round(experiment, sampler, experiment.examples(stream, cursor, batch.prompts), batch.rollouts)
        cursor += batch.prompts
        judged = [group for group in groups if group.judged]
        good = [group for group in judged if batch.keeps(group.right)]
        if len(good) >= enough:
            break
    kept = good[: batch.keep_prompts]
    if good and batch.too_few_mixed == "fill":
        others = [group for group in judged if not batch.keeps(group.right)]
        kept = kept + others[: batch.keep_prompts - len(kept)]
    rewards_GS = torch.tensor([[float(verdict.correct) for verdict in group.verdicts] for group in kept])
    rewards_GS = rewards_GS.view(len(kept), batch.rollouts)  # also where none is kept
    statuses = Counter(verdict.status for group in groups for verdict in group.verdicts)
    return Collected(
        answers=[Answer(sample.prompt_ids, sample.response_ids) for group in kept for sample in group.samples],
        rewards_B=rewards_GS.flatten(),
        groups_B=torch.arange(len(kept)).repeat_interleave(batch.rollouts),
        group_mean_B=rewards_GS.mean(1).repeat_interleave(batch.rollouts),
        cursor=cursor,
        sampler_logprobs_N=torch.tensor(
            [value for group in kept for sample in group.samples for value in sample.logprobs]
        ),
        due_N=_due(experiment, kept),
        numbers={
            **_round_numbers(groups[: batch.prompts]),
            "sampled_prompts": len(groups),
            "kept_prompts": len(kept),
            "unjudged_prompts": len(groups) - len(judged),
            **{f"verdict_{name}": statuses[name] for name in ("no_answer", "unfinished", "timeout", "error")},
        },
    )


def _round(experiment: Experiment, sampler: Sampler, examples: Sequence[Example], size: int) -> list[Group]:
    samples, verdicts = experiment.asker.ask(sampler, examples, experiment.drawing(size))
    pieces = [slice(start, start + size) for start in range(0, len(samples), size)]
    return [Group(example, samples[own], verdicts[own]) for example, own in zip(examples, pieces, strict=True)]


def _due(experiment: Experiment, kept: Sequence[Group]) -> Tensor | None:
    if experiment.task is None:
        return None
    examples = [group.example for group in kept for _ in group.samples]
    responses = [sample.response_ids for group in kept for sample in group.samples]
    return due_tokens(experiment.task, experiment.text, examples, responses)


def _round_numbers(groups: Sequence[Group]) -> dict[str, float]:
    """Statistics of the first round only: later rounds are the same policy on more prompts."""
    samples = [sample for group in groups for sample in group.samples]
    judged = [group for group in groups if group.judged]
    return {
        "accuracy": right_share([verdict for group in groups for verdict in group.verdicts]),
        "mixed_prompts": sum(0 < group.right < len(group.samples) for group in judged) / max(1, len(judged)),
        "response_length": sum(len(sample.response_ids) for sample in samples) / len(samples),
        "finished": sum(sample.finished for sample in samples) / len(samples),
    }
