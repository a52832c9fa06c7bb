"""A policy's own answers to the test prompts, the same for every reward model of a run, and their scores.

Shape letters: N packed response tokens, R answers, M answers of one prompt.
"""

from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from ipvrm_core.objectives import Objective
from ipvrm_core.packing import cu_seqlens_from_lengths
from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.data.example import Example
from ipvrm_core.trainer.data.tasks import LabelledTrace
from ipvrm_core.trainer.evaluation.policy.equal_answers import math_equality, merge_equal
from ipvrm_core.trainer.evaluation.policy.stored_answers import Stored, evaluate
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.reward import answer_scores, needs_reference, scores
from ipvrm_core.trainer.sampling.base import Sample
from ipvrm_core.trainer.verify import JUDGES, Verdict


@dataclass(frozen=True)
class OwnAnswers:
    """M answers to each example, in the order of the examples, at the sampling temperature of training."""

    policy: LanguageModel
    examples: list[Example]
    per_prompt: int
    samples: list[Sample]
    verdicts: list[Verdict]
    logprobs_N: Tensor  # of all response tokens under the policy

    @property
    def answers(self) -> list[Answer]:
        return [Answer(sample.prompt_ids, sample.response_ids) for sample in self.samples]

    @property
    def first(self) -> list[Sample]:
        """One answer to each example."""
        return self.samples[:: self.per_prompt]


def sample_own(experiment: Experiment, policy: LanguageModel) -> OwnAnswers:
    """As many a prompt as the largest N of eval.best_of_n; a function of the policy and the configuration alone."""
    experiment.seed("eval", "own answers")
    settings = experiment.config.eval
    examples = experiment.test_examples(settings.prompts)
    per_prompt = max(settings.best_of_n, default=1)
    with closing(experiment.sampler(policy)) as sampler:
        made, verdicts = experiment.asker.ask(sampler, examples, experiment.drawing(per_prompt))
    logprobs_N = policy.logprobs([Answer(one.prompt_ids, one.response_ids) for one in made])
    return OwnAnswers(policy, examples, per_prompt, made, verdicts, logprobs_N)


def as_traces(experiment: Experiment, own: OwnAnswers, count: int) -> list[LabelledTrace]:
    """Up to `count` of the answers as labelled traces: real mistakes, as in ProcessBench, rather than made ones.

    Answers that stop before their final step have no label and are left out. The same number of every prompt is taken.
    """
    traces = []
    repeats = min(own.per_prompt, max(1, count // len(own.examples)))
    for index, example in enumerate(own.examples):
        for sample in own.samples[index * own.per_prompt :][:repeats]:
            text = experiment.text.decode(sample.response_ids)
            check = experiment.task.step_labels(example, text)
            if check.first_error < len(check.steps):
                steps = tuple(text[start:end] for start, end in check.steps)
                right = experiment.task.answer_of(text) == example.answer
                traces.append(LabelledTrace(example.id, example.prompt, steps, check.first_error, right))
    return traces[:count]


def best_of_n(
    experiment: Experiment, reward_model: LanguageModel, reference: LanguageModel, objective: Objective, own: OwnAnswers
) -> dict[str, dict[str, float]]:
    """{N: {average, pass, majority, best:vbar, best:sum, vote:vbar, vote:sum}}: shares of prompts answered right.

    vbar is beta times the mean score of an answer's tokens, sum beta times their sum: V_T where scores are log-ratios.
    """
    answers, reference_N = own.answers, None
    if needs_reference(objective):
        own_N = own.logprobs_N
        reference_N = own_N if reference is own.policy else reference.logprobs(answers)
    score_N = scores(reward_model, objective, answers, reference_N).cpu()
    cu_seqlens = cu_seqlens_from_lengths(torch.tensor([len(answer.response_ids) for answer in answers]))
    sums_R, means_R = answer_scores(objective.token_scores(score_N, cu_seqlens), cu_seqlens)
    stored = {}
    for index, example in enumerate(own.examples):
        these = slice(index * own.per_prompt, (index + 1) * own.per_prompt)
        stored[example.id] = Stored(
            answers=[verdict.extracted for verdict in own.verdicts[these]],
            correct=[verdict.correct for verdict in own.verdicts[these]],
            scores={
                "vbar": (objective.beta * means_R[these]).tolist(),
                "sum": (objective.beta * sums_R[these]).tolist(),
            },
        )
    if experiment.config.verifier.kind in JUDGES:  # answers that are mathematics; others are equal as texts only
        with math_equality(**experiment.config.verifier.limits) as equal:
            stored = merge_equal(stored, equal)
    found = evaluate(stored, experiment.config.eval.best_of_n, resamples=0, seed=experiment.config.seed)
    return {n: {way: cell["mean"] for way, cell in row.items() if isinstance(cell, dict)} for n, row in found.items()}
