"""Accuracy of a policy on the test prompts: greedy, avg@k, pass@k, and whole traces where steps can be checked."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from typing import NamedTuple

from ipvrm_core.trainer.data.example import Example
from ipvrm_core.trainer.data.sources import by_group
from ipvrm_core.trainer.evaluation.policy.best_of_n import pass_at
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.sampling.base import Drawing, Sample
from ipvrm_core.trainer.verify import Verdict


class Judged(NamedTuple):
    """What the shares need of one answer."""

    correct: bool
    decided: bool  # by the verifier, in time
    tokens: int
    finished: bool


def judged(samples: Iterable[Sample], verdicts: Iterable[Verdict]) -> list[Judged]:
    return [
        Judged(verdict.correct, verdict.status not in ("timeout", "error"), len(sample.response_ids), sample.finished)
        for sample, verdict in zip(samples, verdicts, strict=True)
    ]


def accuracy(greedy: Sequence[Judged], drawn: Sequence[Judged], k: int, sizes: Sequence[int] = ()) -> dict[str, float]:
    """Shares of right answers: one greedy and k drawn answers a prompt, those of a prompt contiguous.

    pass@n of n < k (`sizes`) is the mean over all subsets of n of the k answers. response_length and finished (by EOS,
    not by the limit) are of the drawn answers, undecided verdicts of all.
    """
    if len(drawn) != k * len(greedy) or not greedy:
        raise ValueError(f"expected {k} drawn answers for each greedy one; got {len(drawn)} and {len(greedy)}")
    right = [answer.correct for answer in drawn]
    groups = [right[start : start + k] for start in range(0, len(right), k)]
    return {
        "prompts": len(greedy),
        "greedy": sum(answer.correct for answer in greedy) / len(greedy),
        f"avg@{k}": sum(right) / len(right),
        **{f"pass@{n}": sum(pass_at(group, n) for group in groups) / len(groups) for n in (*sizes, k)},
        "response_length": sum(answer.tokens for answer in drawn) / len(drawn),
        "finished": sum(answer.finished for answer in drawn) / len(drawn),
        "undecided": sum(not answer.decided for answer in [*greedy, *drawn]),
    }


def policy_accuracy(experiment: Experiment, model: LanguageModel, examples: Sequence[Example]) -> dict:
    """`accuracy` with k = eval.samples; for a built-in task also all_steps_greedy and all_steps. "by_prompt" has each
    prompt's own share, for differences between policies on the same prompts.
    """
    settings, new_tokens = experiment.config.eval, experiment.config.generation.max_new_tokens
    k = settings.samples
    drawing = Drawing(k, settings.temperature, settings.top_p, new_tokens)
    with closing(experiment.sampler(model)) as sampler:
        greedy, greedy_verdicts = experiment.asker.ask(sampler, examples, Drawing(1, 0.0, max_new_tokens=new_tokens))
        drawn, verdicts = experiment.asker.ask(sampler, examples, drawing)
    right = {
        "greedy": [verdict.correct for verdict in greedy_verdicts],
        f"avg@{k}": [verdict.correct for verdict in verdicts],
    }
    if experiment.task:
        repeated = [example for example in examples for _ in range(k)]
        right["all_steps_greedy"] = _all_steps(experiment, examples, greedy)
        right["all_steps"] = _all_steps(experiment, repeated, drawn)
    by_prompt = {key: _shares(values, len(examples)) for key, values in right.items()}
    shares = {key: sum(values) / len(values) for key, values in by_prompt.items()}
    return {**shares, **accuracy(judged(greedy, greedy_verdicts), judged(drawn, verdicts), k), "by_prompt": by_prompt}


def benchmark_accuracy(experiment: Experiment, model: LanguageModel) -> dict[str, dict[str, float]]:
    """{benchmark: policy_accuracy} of eval.benchmarks, and "average": the unweighted mean of the shares over them.

    A benchmark with a group column is as many benchmarks, "name/group".
    """
    found = {
        key: policy_accuracy(experiment, model, examples)
        for name, source in experiment.config.eval.benchmarks.items()
        for key, examples in by_group(source, name, experiment.source_examples(source)).items()
    }
    return {**found, "average": average(found)}


def average(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The unweighted mean over benchmarks of the shares of right answers."""
    shares = [key for key in next(iter(found.values())) if key.startswith(("greedy", "avg@", "pass@"))]
    return {share: sum(entry[share] for entry in found.values()) / len(found) for share in shares}


def _shares(right: Sequence[bool], prompts: int) -> list[float]:
    """Of each prompt's answers, which are contiguous."""
    k = len(right) // prompts
    return [sum(right[start : start + k]) / k for start in range(0, len(right), k)]


def _all_steps(experiment: Experiment, examples, samples) -> list[bool]:
    return [
        experiment.task.step_labels(example, experiment.text.decode(sample.response_ids)).first_error == -1
        for example, sample in zip(examples, samples, strict=True)
    ]
