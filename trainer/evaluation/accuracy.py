"""Accuracy of a policy on the test prompts: greedy, avg@k, pass@k, and whole traces where steps can be checked."""

from collections.abc import Sequence

from torch import nn

from ipvrm_core.trainer.data.example import Example
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.phases.rollout import sample_and_verify


def policy_accuracy(experiment: Experiment, model: nn.Module, examples: Sequence[Example]) -> dict[str, float]:
    """{greedy, avg@k, pass@k, all_steps_greedy, all_steps, timeouts}: shares over prompts; k = eval.samples."""
    settings = experiment.config.eval
    shared = {
        "max_new_tokens": experiment.config.generation.max_new_tokens,
        "batch": experiment.config.generation.batch,
    }
    greedy, greedy_verdicts = sample_and_verify(experiment, model, examples, 1, temperature=0, **shared)
    k = settings.samples
    drawn, verdicts = sample_and_verify(
        experiment, model, examples, k, temperature=settings.temperature, top_p=settings.top_p, **shared
    )
    right = [verdict.correct for verdict in verdicts]
    groups = [right[start : start + k] for start in range(0, len(right), k)]
    result = {
        "prompts": len(examples),
        "greedy": sum(verdict.correct for verdict in greedy_verdicts) / len(examples),
        f"avg@{k}": sum(right) / len(right),
        f"pass@{k}": sum(any(group) for group in groups) / len(groups),
        "response_length": sum(len(sample.response_ids) for sample in drawn) / len(drawn),
        "undecided": sum(v.status in ("timeout", "error") for v in [*verdicts, *greedy_verdicts]),
    }
    if experiment.task:
        repeated = [example for example in examples for _ in range(k)]
        result["all_steps_greedy"] = _all_steps(experiment, examples, greedy)
        result["all_steps"] = _all_steps(experiment, repeated, drawn)
    return result


def benchmark_accuracy(experiment: Experiment, model: nn.Module) -> dict[str, dict[str, float]]:
    """{benchmark: policy_accuracy} of eval.benchmarks, and "average": the unweighted mean of the shares over them.

    A benchmark with a group column is as many benchmarks, "name/group".
    """
    found: dict[str, dict[str, float]] = {}
    for name, source in experiment.config.eval.benchmarks.items():
        groups: dict[str, list[Example]] = {}
        for example in experiment.source_examples(source):
            key = f"{name}/{example.meta[source.group_column]}" if source.group_column else name
            groups.setdefault(key, []).append(example)
        for key, examples in groups.items():
            found[key] = policy_accuracy(experiment, model, examples)
    k = experiment.config.eval.samples
    shares = ("greedy", f"avg@{k}", f"pass@{k}")
    average = {share: sum(entry[share] for entry in found.values()) / len(found) for share in shares}
    return {**found, "average": average}


def _all_steps(experiment: Experiment, examples, samples) -> float:
    checks = [
        experiment.task.step_labels(example, experiment.decode(sample.response_ids)).first_error == -1
        for example, sample in zip(examples, samples, strict=True)
    ]
    return sum(checks) / len(checks)
