"""Scores of the steps of labelled traces under an implicit reward model.

Shape letters: N tokens of one answer, S its steps.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ipvrm_core.objectives import Objective
from ipvrm_core.objectives.ipvrm import Ipvrm
from ipvrm_core.packing import cu_seqlens_from_lengths
from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.data.tasks import LabelledTrace
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.reward import needs_reference, scores
from ipvrm_core.trainer.text.steps import Format, render

PROTOCOLS = ("process", "prefix")
IMPLICIT = Ipvrm()  # its token scores are log-ratios, as those of every implicit reward model
VARIANTS = (*PROTOCOLS, "process_mean", "prefix_mean")


def step_sums(log_ratio: Sequence[float], steps: Sequence[int], count: int) -> tuple[list[float], list[int]]:
    """(sum of q over the step's own tokens [S], number of its tokens [S]); tokens of step -1 are in none."""
    q_N, step_N = np.asarray(log_ratio, dtype=float), np.asarray(steps)
    own_N = step_N >= 0
    sums_S = np.bincount(step_N[own_N], q_N[own_N], minlength=count)
    return sums_S.tolist(), np.bincount(step_N[own_N], minlength=count).tolist()


def variants(sums: Sequence[float], tokens: Sequence[int]) -> dict[str, list[float]]:
    """Per step, without beta and sigma (both monotone): {variant: [S]}, in nats.

    process: sum of q over the step's own tokens.  prefix: sum of q from the first answer token to the step's end.
    *_mean: divided by the number of tokens in that sum. A step without a token of its own (a longer token swallowed it)
    has sum and mean 0.
    """
    sums_S, tokens_S = np.asarray(sums, dtype=float), np.asarray(tokens, dtype=float)
    prefix_S, length_S = sums_S.cumsum(), tokens_S.cumsum()
    return {
        "process": sums_S.tolist(),
        "prefix": prefix_S.tolist(),
        "process_mean": (sums_S / np.maximum(tokens_S, 1)).tolist(),
        "prefix_mean": (prefix_S / np.maximum(length_S, 1)).tolist(),
    }


def score_traces(
    experiment: Experiment,
    reward_model: LanguageModel,
    reference: LanguageModel,
    traces: Sequence[LabelledTrace],
    objective: Objective = IMPLICIT,
) -> dict[str, list[list[float]]]:
    """{protocol: [per trace: [per step: score]]}, for the traces of a built-in task, whose steps tile the answer.

    q is what the objective makes of a token: a log-ratio, a log-prob, a value.
    """
    form = Format(joiner="", plain_joiner="")
    rendered = [render(experiment.text.tokenizer, trace.prompt, trace.steps, form, trace.id) for trace in traces]
    answers = [Answer(item.ids[: item.start], item.ids[item.start :]) for item in rendered]
    reference_N = reference.logprobs(answers) if needs_reference(objective) else None
    score_N = scores(reward_model, objective, answers, reference_N).cpu()
    cu_seqlens = cu_seqlens_from_lengths(torch.tensor([len(answer.response_ids) for answer in answers]))
    pieces = objective.token_scores(score_N, cu_seqlens).split([len(answer.response_ids) for answer in answers])
    scored = [
        variants(*step_sums(piece.tolist(), item.step_of[item.start :], len(trace.steps)))
        for piece, item, trace in zip(pieces, rendered, traces, strict=True)
    ]
    return {protocol: [row[protocol] for row in scored] for protocol in PROTOCOLS}
