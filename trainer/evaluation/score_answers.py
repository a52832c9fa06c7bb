"""A reward model's scores of stored answers: any of them can choose the best of N."""

from collections.abc import Mapping

from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.evaluation.log_ratios import log_ratios
from ipvrm_core.trainer.evaluation.rendering import render
from ipvrm_core.trainer.evaluation.step_scores import step_sums
from ipvrm_core.trainer.evaluation.stored_answers import Stored


def score_stored(
    pair, stored: Mapping[str, Stored], form, beta: float, max_tokens: int, max_length: int | None
) -> None:
    """Add a reward model's scores: vbar_T, V_T, and of the steps' own values the least and the last.

    Tokens: the answer's, and the end of turn where the template closes it by EOS. ValueError for an empty answer, or
    one of more than `max_length` tokens.
    """
    jobs = []
    for name, item in stored.items():
        for number, (prompt, text) in enumerate(zip(item.prompts, item.texts, strict=True)):
            where = f"problem {name!r}, answer {number}"
            steps = [step for step in (text or "").strip().split(form.joiner) if step.strip()]
            if not steps:
                raise ValueError(f"{where}: the answer is empty")
            made = render(pair.tokenizer, prompt, steps, form, where)
            end = made.end + (made.ids[made.end : made.end + 1] == [pair.tokenizer.eos_token_id])
            if max_length and end > max_length:
                raise ValueError(f"{where}: {end} tokens, more than the limit of {max_length}")
            jobs.append(
                (
                    item,
                    made.step_of[made.start : end],
                    len(steps),
                    Answer(made.ids[: made.start], made.ids[made.start : end]),
                )
            )
    found = log_ratios(pair, [job[-1] for job in jobs], max_tokens)
    for (item, step_of, count, _), q_N in zip(jobs, found, strict=True):
        sums = step_sums(q_N.numpy(), step_of, count)[0]
        total = float(q_N.double().sum())
        values = {"vbar": total / len(q_N), "sum": total, "min_step": min(sums), "last_step": sums[-1]}
        for key, value in values.items():
            item.scores.setdefault(key, []).append(beta * value)
