"""A reward model's scores of stored answers: any of them can choose the best of N."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.evaluation.lengths import Status, TooLong, length_status
from ipvrm_core.trainer.evaluation.policy.stored_answers import Stored
from ipvrm_core.trainer.evaluation.reward_model.step_scores import step_sums
from ipvrm_core.trainer.evaluation.token_scores import Scorer, token_scores
from ipvrm_core.trainer.text.steps import Format, Rendered, render

NAMES = ("vbar", "sum", "min_step", "last_step")


class Job(NamedTuple):
    """One answer: its text, where it ends and in how many steps."""

    item: Stored
    name: str
    made: Rendered
    end: int
    steps: int


def score_stored(
    scorer: Scorer,
    stored: Mapping[str, Stored],
    form: Format,
    beta: float,
    max_tokens: int,
    max_length: int | None,
    too_long: TooLong = "refuse",
) -> dict[str, list[Status]]:
    """Add a reward model's scores, beta times: mean and sum over an answer's tokens, least and last of its steps' sums.

    With log-ratios these are vbar_T, V_T and the steps' own values. Tokens: the answer's, and the end of turn where the
    template closes it by EOS. An answer of over `max_length` tokens is refused; or skipped, its scores None; or
    truncated, and scored by what is left. Returns what became of every answer. ValueError for an empty answer, and
    where all answers are skipped.
    """
    jobs = [job for name, item in stored.items() for job in _jobs(scorer.tokenizer, name, item, form)]
    texts = [(job.name, job.made.start, job.end) for job in jobs]
    status = length_status(texts, max_length, too_long, "answers")
    used = [index for index, state in enumerate(status) if state != "too_long"]
    if not used:
        raise ValueError(f"no answer was scored: all {len(jobs)} are too long")
    jobs = [job._replace(end=min(job.end, max_length or job.end)) for job in jobs]
    answers = [Answer(job.made.ids[: job.made.start], job.made.ids[job.made.start : job.end]) for job in jobs]
    found = dict(zip(used, token_scores(scorer, [answers[index] for index in used], max_tokens), strict=True))
    for index, job in enumerate(jobs):
        values = _values(job, found[index].numpy()) if index in found else dict.fromkeys(NAMES)
        for key, value in values.items():
            job.item.scores.setdefault(key, []).append(None if value is None else beta * value)
    states = iter(status)
    return {name: [next(states) for _ in item.texts] for name, item in stored.items()}


def _jobs(tokenizer, name: str, item: Stored, form: Format) -> list[Job]:
    jobs = []
    for number, (prompt, text) in enumerate(zip(item.prompts, item.texts, strict=True)):
        where = f"problem {name!r}, answer {number}"
        steps = [step for step in (text or "").strip().split(form.joiner) if step.strip()]
        if not steps:
            raise ValueError(f"{where}: the answer is empty")
        made = render(tokenizer, prompt, steps, form, where)
        end = made.end + (made.ids[made.end : made.end + 1] == [tokenizer.eos_token_id])
        jobs.append(Job(item, where, made, end, len(steps)))
    return jobs


def _values(job: Job, score_N: np.ndarray) -> dict[str, float]:
    """Of a truncated answer, the steps that have begun."""
    step_of = job.made.step_of[job.made.start : job.end]
    sums = step_sums(score_N, step_of, job.steps)[0][: max(step_of) + 1]
    total = float(score_N.sum(dtype=float))
    return dict(zip(NAMES, (total / len(score_N), total, min(sums), sums[-1]), strict=True))
