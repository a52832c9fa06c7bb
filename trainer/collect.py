"""One batch of on-policy answers: oversample prompts, verify, keep those whose answers are mixed and in the range."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ipvrm_core.method import Preset
from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.phases.rollout import generation_settings, sample_and_verify


@dataclass(frozen=True)
class Collected:
    """B = kept prompts x rollouts answers, groups contiguous."""

    answers: list[Answer]
    rewards_B: Tensor  # 0/1 float32
    groups_B: Tensor  # int64
    group_mean_B: Tensor  # mu of the answer's prompt
    cursor: int  # the next unused training example
    numbers: dict[str, float]


def collect(experiment: Experiment, model: nn.Module, preset: Preset, cursor: int, max_rounds: int) -> Collected:
    """Sample `prompts` prompts x `rollouts` answers and keep the first `keep_prompts` that the preset keeps: the mixed
    ones, 0 < mu < 1, with mu in `accuracy_range`.

    Too few of them: `sample_on` samples further prompts, at most `max_rounds` rounds, then goes on with what is there;
    `fill` completes the quota with the others (unmixed: zero outcome advantage, no reward-model loss). RuntimeError
    when not a single prompt is kept: there is nothing to learn from.
    """
    good, others, first = [], [], None
    statuses: dict[str, int] = {"no_answer": 0, "timeout": 0, "error": 0}
    for _ in range(max_rounds if preset.too_few_mixed == "sample_on" else 1):
        examples = experiment.examples("rl", cursor, preset.prompts)
        cursor += preset.prompts
        samples, verdicts = sample_and_verify(
            experiment, model, examples, preset.rollouts, **generation_settings(experiment)
        )
        for verdict in verdicts:
            if verdict.status != "ok":
                statuses[verdict.status] += 1
        for start in range(0, len(samples), preset.rollouts):
            group = list(range(start, start + preset.rollouts))
            target = good if preset.keeps(sum(verdicts[i].correct for i in group)) else others
            target.append([(samples[i], verdicts[i].correct) for i in group])
        if first is None:
            first = _round_numbers(samples, verdicts, preset.rollouts)
        if len(good) >= preset.keep_prompts:
            break
    if not good:
        low, high = preset.accuracy_range
        within = "" if (low, high) == (0, 1) else f" and an accuracy in [{low:g}, {high:g}]"
        raise RuntimeError(
            f"none of the last {len(others)} prompts had both right and wrong answers{within}; nothing to learn from"
        )
    kept = good[: preset.keep_prompts]
    if preset.too_few_mixed == "fill":
        kept = kept + others[: preset.keep_prompts - len(kept)]
    rewards_GS = torch.tensor([[float(correct) for _, correct in group] for group in kept])
    size = preset.rollouts
    return Collected(
        answers=[Answer(sample.prompt_ids, sample.response_ids) for group in kept for sample, _ in group],
        rewards_B=rewards_GS.flatten().to(experiment.device),
        groups_B=torch.arange(len(kept)).repeat_interleave(size).to(experiment.device),
        group_mean_B=rewards_GS.mean(1).repeat_interleave(size).to(experiment.device),
        cursor=cursor,
        numbers={**first, "kept_prompts": len(kept), **{f"verdict_{name}": count for name, count in statuses.items()}},
    )


def _round_numbers(samples, verdicts, size: int) -> dict[str, float]:
    """Statistics of the first round only: later rounds are the same policy on more prompts. size: answers a prompt."""
    count = len(samples)
    right = [sum(verdict.correct for verdict in verdicts[start : start + size]) for start in range(0, count, size)]
    return {
        "accuracy": sum(verdict.correct for verdict in verdicts) / count,
        "mixed_prompts": sum(0 < number < size for number in right) / len(right),
        "response_length": sum(len(sample.response_ids) for sample in samples) / count,
        "finished": sum(sample.finished for sample in samples) / count,
    }
