"""Which candidate should be taken: does the TD error know whose continuations come out right? (paper, section 4.3.3)

At one position of each own answer where the policy has several candidates, every one of them is continued by that
policy and verified. So credit can be measured on any problem that has a verifier; `candidate_credit` needs the truth.
"""

import statistics
from collections.abc import Sequence
from contextlib import closing
from math import exp, sqrt
from typing import NamedTuple

import torch

from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.data.example import Example
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.sampling.base import Sample, eos_ids


class Choice(NamedTuple):
    """A position, its candidates, log pi of each, and the verdicts on each one's continuations."""

    begun: Answer  # the response up to the position
    ids: list[int]
    logprobs: list[float]
    right: list[list[bool]]


def sample_choices(
    experiment: Experiment, policy: LanguageModel, examples: Sequence[Example], samples: int = 8, p_min: float = 0.1
) -> list[Choice]:
    """One open position, drawn evenly, of one answer to each example; `samples` continuations of every candidate.

    Sampled at the training temperature. The caller seeds. A candidate that ends the answer is judged as it stands.
    Answers without an open position are left out, and positions with a candidate of which no verdict says anything.
    """
    prompts = [experiment.text.prompt_ids(example) for example in examples]
    ending = eos_ids(policy.model, experiment.text.tokenizer)
    with closing(experiment.sampler(policy)) as sampler:
        drawn = sampler.sample(prompts, experiment.drawing(1))
        found = _open_positions(policy, [Answer(one.prompt_ids, one.response_ids) for one in drawn], p_min)
        branches = [(number, [*choice.begun.response_ids, id]) for number, choice in found for id in choice.ids]
        going_on = [prompts[number] + response for number, response in branches if response[-1] not in ending]
        tails = iter(sampler.sample(going_on, experiment.drawing(samples)) if going_on else [])
    made = []
    for number, response in branches:
        for _ in range(samples):
            tail = Sample([], [], [], True) if response[-1] in ending else next(tails)
            made.append(Sample(prompts[number], response + tail.response_ids, [], tail.finished))
    golds = [examples[number].answer for number, _ in branches for _ in range(samples)]
    texts = [experiment.text.decode(sample.response_ids) for sample in made]
    verdicts = iter(experiment.asker.judge(made, texts, golds))
    choices = []
    for _, choice in found:
        judged = [[next(verdicts) for _ in range(samples)] for _ in choice.ids]
        right = [[verdict.correct for verdict in each if verdict.decided] for each in judged]
        if all(right):
            choices.append(choice._replace(right=right))
    return choices


def _open_positions(policy: LanguageModel, answers: Sequence[Answer], p_min: float) -> list[tuple[int, Choice]]:
    """(number of the answer, a position of it that has several candidates, nothing continued) where there is one."""
    candidates = policy.candidates(answers, p_min)
    counts_N, row, found = candidates.counts_N.tolist(), 0, []
    for number, answer in enumerate(answers):
        several = [t for t in range(len(answer.response_ids)) if counts_N[row + t] > 1]
        if several:
            t = several[int(torch.randint(len(several), ()))]
            slots = slice(1, 1 + counts_N[row + t])  # slot 0 is the sampled token's
            ids, logprobs = (of_NS[row + t, slots].tolist() for of_NS in (candidates.ids_NS, candidates.logprobs_NS))
            found.append((number, Choice(Answer(answer.prompt_ids, answer.response_ids[:t]), ids, logprobs, [])))
        row += len(answer.response_ids)
    return found


def td_errors(
    choices: Sequence[Choice], reward_model: LanguageModel, reference: LanguageModel | None, beta: float
) -> list[list[float]]:
    """beta (log pi_phi(v | s) - log pi_ref(v | s)) of every candidate v; without a reference beta log pi_phi."""
    answers = [Answer(one.begun.prompt_ids + one.begun.response_ids, one.ids[:1]) for one in choices]
    most = max(len(one.ids) for one in choices)
    ids_NK = torch.tensor([one.ids + [-1] * (most - len(one.ids)) for one in choices], device=reward_model.device)
    score_NK = reward_model.slot_logprobs(answers, ids_NK)
    if reference is not None:
        score_NK = score_NK - reference.slot_logprobs(answers, ids_NK)
    return [(beta * row_K[: len(one.ids)]).tolist() for row_K, one in zip(score_NK, choices, strict=True)]


def choice_credit(choices: Sequence[Choice], scores: Sequence[Sequence[float]]) -> dict[str, float | int | None]:
    """Shares of right continuations, by who chooses among the candidates; AUCs of a right one over a wrong one.

    drawn: the policy, by its probabilities; policy: its most probable one; td: the one with the highest score; best:
    the better one by half of its continuations, judged by the other half. gain: td - policy, gain_half_width its 95%
    interval over the positions. auc_td, auc_policy: over pairs of a right and a wrong continuation of two candidates
    of one position, how often the right one's has the higher score (ties count half); None where there is no pair.
    """
    if not choices:
        return {"positions": 0}
    taken: dict[str, list[float]] = {name: [] for name in ("drawn", "policy", "td", "best")}
    for choice, score in zip(choices, scores, strict=True):
        shares = [statistics.fmean(right) for right in choice.right]
        weights = [exp(logprob) for logprob in choice.logprobs]
        taken["drawn"].append(sum(w * s for w, s in zip(weights, shares, strict=True)) / sum(weights))
        taken["policy"].append(_of_largest(choice.logprobs, shares))
        taken["td"].append(_of_largest(score, shares))
        halves = [[statistics.fmean(right[side::2] or right) for right in choice.right] for side in (0, 1)]
        taken["best"].append((_of_largest(*halves) + _of_largest(*reversed(halves))) / 2)
    gains = [td - policy for td, policy in zip(taken["td"], taken["policy"], strict=True)]
    spread = statistics.stdev(gains) if len(gains) > 1 else float("nan")
    return {
        "positions": len(choices),
        "candidates": statistics.fmean(len(choice.ids) for choice in choices),
        "continuations": sum(len(right) for choice in choices for right in choice.right),
        **{name: statistics.fmean(values) for name, values in taken.items()},
        "gain": statistics.fmean(gains),
        "gain_half_width": None if spread != spread else 1.96 * spread / sqrt(len(gains)),
        "auc_td": _auc(choices, scores),
        "auc_policy": _auc(choices, [choice.logprobs for choice in choices]),
    }


def _of_largest(keys: Sequence[float], values: Sequence[float]) -> float:
    """The value of the largest key; the mean of those that share it."""
    return statistics.fmean(value for key, value in zip(keys, values, strict=True) if key == max(keys))


def _auc(choices: Sequence[Choice], scores: Sequence[Sequence[float]]) -> float | None:
    won, pairs = 0.0, 0
    for choice, score in zip(choices, scores, strict=True):
        for better, right in zip(score, choice.right, strict=True):
            for worse, other in zip(score, choice.right, strict=True):
                if right is not other:
                    count = sum(right) * (len(other) - sum(other))
                    pairs += count
                    won += count * (1.0 if better > worse else 0.5 if better == worse else 0.0)
    return won / pairs if pairs else None
