"""Scores of the steps of labelled traces under an implicit reward model.

One tokenisation of the joined steps with character offsets decides which token belongs to which step; lengths of
separately tokenised steps would leak tokens over the boundary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.data.tasks import LabelledTrace
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.reward import sampled_logprobs

PROTOCOLS = ("process", "prefix")


def token_steps(offsets: Sequence[tuple[int, int]], steps: Sequence[str]) -> list[int]:
    """The step of every token: the one that holds the token's first character."""
    ends, total = [], 0
    for step in steps:
        total += len(step)
        ends.append(total)
    return [next(index for index, end in enumerate(ends) if start < end) for start, _ in offsets]


def step_scores(log_ratio: Tensor, steps: Sequence[int], count: int) -> dict[str, list[float]]:
    """Per step, without beta and sigma (both monotone): {protocol: [count]}.

    process: sum of q over the step's own tokens.  prefix: sum of q from the first answer token to the step's end.
    """
    own = torch.zeros(count, dtype=torch.float64).index_add(0, torch.tensor(steps), log_ratio.double())
    return {"process": own.tolist(), "prefix": own.cumsum(0).tolist()}


def score_traces(
    experiment: Experiment, reward_model: nn.Module, reference: nn.Module, traces: Sequence[LabelledTrace]
) -> dict[str, list[list[float]]]:
    """{protocol: [per trace: [per step: score]]}."""
    answers, steps = [], []
    for trace in traces:
        encoded = experiment.tokenizer("".join(trace.steps), add_special_tokens=False, return_offsets_mapping=True)
        prompt_ids = experiment.tokenizer(trace.prompt)["input_ids"]
        answers.append(Answer(prompt_ids, encoded["input_ids"]))
        steps.append(token_steps(encoded["offset_mapping"], trace.steps))
    log_ratio_N = sampled_logprobs(experiment, reward_model, answers) - sampled_logprobs(experiment, reference, answers)
    pieces = log_ratio_N.cpu().split([len(answer.response_ids) for answer in answers])
    scored = [
        step_scores(piece, own, len(trace.steps)) for piece, own, trace in zip(pieces, steps, traces, strict=True)
    ]
    return {protocol: [row[protocol] for row in scored] for protocol in PROTOCOLS}
