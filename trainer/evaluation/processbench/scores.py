"""ProcessBench scores of a reward model: made once, kept as parquet, evaluated as often as wanted without the model.

One file a subset. Per problem: subset, id, generator, label, final_answer_correct; status (ok, truncated, too_long);
answer_tokens; sums and tokens, per step the sum of the scores of its own tokens and their number; with the official
mode also official_rewards and official_lengths. A step behind a truncation has the sum null.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.data.processbench import Problem
from ipvrm_core.trainer.evaluation.lengths import Status, TooLong, length_status
from ipvrm_core.trainer.evaluation.processbench import official
from ipvrm_core.trainer.evaluation.processbench.files import Parts
from ipvrm_core.trainer.evaluation.reward_model.step_scores import step_sums
from ipvrm_core.trainer.evaluation.token_scores import Scorer, scored_batches
from ipvrm_core.trainer.progress import Progress
from ipvrm_core.trainer.text.steps import Format, Rendered, render


class Job(NamedTuple):
    """A problem and which of its tokens are scored, start .. end; boundaries: the official mode's, else empty."""

    problem: Problem
    item: Rendered
    status: Status
    start: int
    end: int
    boundaries: list[int]

    @property
    def answer(self) -> Answer:
        return Answer(self.item.ids[: self.start], self.item.ids[self.start : self.end])


def score(
    scorer: Scorer,
    problems: Sequence[Problem],
    form: Format,
    *,
    max_tokens: int,
    max_length: int | None = None,
    too_long: TooLong = "refuse",
    with_official: bool = False,
    parts: Parts | None = None,
) -> list[dict]:
    """One row per problem of a subset, in order. A text of over `max_length` tokens is refused, skipped or truncated.

    `parts`: every micro-batch is kept there as soon as it is scored, and what is there already is not scored again.
    """
    jobs = _jobs(scorer, problems, form, max_length, too_long, with_official)
    rows = [_row(job) for job in jobs]
    used = [index for index, job in enumerate(jobs) if job.status != "too_long"]
    parts = parts and parts.of(_digest(jobs))
    kept = parts.read() if parts else {}
    rows = [kept.get(row["id"], row) for row in rows]
    left = [index for index in used if rows[index]["sums"] is None]
    with Progress(problems[0].subset, len(used), len(used) - len(left), "problem") as bar:
        for numbers, scores in scored_batches(scorer, [jobs[index].answer for index in left], max_tokens):
            fresh = [left[number] for number in numbers]
            theirs = _as_the_script(scorer, [jobs[index] for index in fresh], scores, max_tokens)
            for index, score_N, their_N in zip(fresh, scores, theirs, strict=True):
                rows[index] |= _scored(jobs[index], score_N.numpy(), their_N.numpy())
            if parts:
                parts.add([rows[index] for index in fresh])
            bar.update(len(fresh))
    return rows


def _jobs(scorer, problems, form, max_length, too_long, with_official) -> list[Job]:
    if with_official and scorer.kind != "log-ratio":
        raise ValueError(f"the official mode repeats a script that scores log-ratios; got {scorer.kind} scores")
    items = [render(scorer.tokenizer, each.problem, each.steps, form, f"{each.subset} {each.id}") for each in problems]
    texts = [(problem.id, item.start, item.end) for problem, item in zip(problems, items, strict=True)]
    status = length_status(texts, max_length, too_long)
    jobs = []
    for problem, item, state in zip(problems, items, status, strict=True):
        rows = official.boundaries(scorer.tokenizer, problem.problem, problem.steps, form) if with_official else []
        start, end = item.start, item.end
        if rows:  # it may start before the answer, and it ends with the end-of-turn token
            start, end = min(start, rows[0] + 1), max(end, rows[-1] + 2)
        jobs.append(Job(problem, item, state, start, min(end, max_length or end), rows))
    return jobs


def _digest(jobs: Sequence[Job]) -> str:
    """Of all that the rows depend on, but for the models."""
    texts = [(job.problem, job.answer, job.status, job.boundaries) for job in jobs]
    return hashlib.sha256(repr(texts).encode()).hexdigest()


def _row(job: Job) -> dict:
    """Without scores."""
    fields = ("subset", "id", "generator", "label", "final_answer_correct")
    return {
        **{name: getattr(job.problem, name) for name in fields},
        "status": job.status,
        "answer_tokens": job.item.end - job.item.start,
        **dict.fromkeys(("sums", "tokens", "official_rewards", "official_lengths")),
    }


def _as_the_script(scorer: Scorer, jobs: Sequence[Job], scores: list[Tensor], max_tokens: int) -> list[Tensor]:
    """The official mode's scores of the same tokens: others where a text holds the padding token, which is masked."""
    pad = scorer.tokenizer.pad_token_id
    if not any(job.boundaries and pad in job.item.ids[: job.end] for job in jobs):
        return scores
    found = list(scores)
    for indices, masked in scored_batches(scorer, [job.answer for job in jobs], max_tokens, unseen=pad):
        for index, score_N in zip(indices, masked, strict=True):
            found[index] = score_N
    return found


def _scored(job: Job, score_N: np.ndarray, their_N: np.ndarray) -> dict:
    """The columns of the scores, of tokens start .. end [N], ours and the official mode's."""
    steps = job.item.step_of[job.start : job.end]
    sums, tokens = step_sums(score_N, steps, len(job.problem.steps))
    if job.status == "truncated":
        known = [value if step <= max(steps) else None for step, value in enumerate(sums)]
        return {"sums": known, "tokens": tokens}
    if not job.boundaries:
        return {"sums": sums, "tokens": tokens}
    shifted_N = np.concatenate([np.zeros(job.start - 1, np.float32), their_N])
    rewards, lengths = official.rewards(shifted_N, job.boundaries)
    return {"sums": sums, "tokens": tokens, "official_rewards": rewards, "official_lengths": lengths}
