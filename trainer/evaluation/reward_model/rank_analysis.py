"""Do V and the TD error of a prefix know how its continuations will end?

Answers of a policy are cut at fractions of their length, continued from there by the same policy, and verified. Each
continuation is one case: its outcome against |V_t|, V_t, V_t / t and the TD error of the last token before the cut.
"""

from collections.abc import Sequence
from contextlib import closing
from typing import NamedTuple

import torch

from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.data.example import Example
from ipvrm_core.trainer.evaluation.token_scores import Scorer, token_scores
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.reward import auc

FRACTIONS = (0.25, 0.5, 0.75)


class Prefix(NamedTuple):
    """One cut of an answer: V_t, V_t / t, delta_t, and how many of its continuations with a verdict came out right."""

    value: float
    mean: float
    td: float
    right: int
    total: int


def rank_auc(prefixes: Sequence[Prefix]) -> dict[str, float | int | None]:
    """{prefixes, continuations, right, abs_value, value, mean, td}: AUCs over continuations (None: all alike)."""
    for number, prefix in enumerate(prefixes):
        if not 0 <= prefix.right <= prefix.total:
            raise ValueError(f"prefix {number}: right must be in 0 .. total = {prefix.total}; got {prefix.right}")
    totals = torch.tensor([prefix.total for prefix in prefixes], dtype=torch.int64)
    labels = torch.tensor([j < prefix.right for prefix in prefixes for j in range(prefix.total)])

    def area(values: Sequence[float]) -> float | None:
        found = auc(torch.tensor(values, dtype=torch.float64).repeat_interleave(totals), labels)
        return None if found != found else found

    return {
        "prefixes": len(prefixes),
        "continuations": len(labels),
        "right": int(labels.sum()),
        "abs_value": area([abs(prefix.value) for prefix in prefixes]),
        "value": area([prefix.value for prefix in prefixes]),
        "mean": area([prefix.mean for prefix in prefixes]),
        "td": area([prefix.td for prefix in prefixes]),
    }


def continued_prefixes(
    experiment: Experiment,
    policy: LanguageModel,
    scorer: Scorer,
    examples: Sequence[Example],
    *,
    beta: float,
    samples: int = 8,
    fractions: Sequence[float] = FRACTIONS,
) -> list[Prefix]:
    """One sampled answer per example, cut at the fractions, each cut continued `samples` times. The caller seeds.

    Sampled and scored at the training temperature. Cuts that leave no token on either side are left out.
    """
    prompts = [experiment.text.prompt_ids(example) for example in examples]
    with closing(experiment.sampler(policy)) as sampler:
        answers = sampler.sample(prompts, experiment.drawing(1))
        cuts = []
        for number, answer in enumerate(answers):
            lengths = sorted({int(fraction * len(answer.response_ids)) for fraction in fractions})
            cuts += [(number, length) for length in lengths if 0 < length < len(answer.response_ids)]
        if not cuts:
            return []
        begun = [prompts[number] + answers[number].response_ids[:length] for number, length in cuts]
        drawn = sampler.sample(begun, experiment.drawing(samples))
    texts, golds = [], []
    for index, sample in enumerate(drawn):
        number, length = cuts[index // samples]
        texts.append(experiment.text.decode(answers[number].response_ids[:length] + sample.response_ids))
        golds.append(examples[number].answer)
    verdicts = experiment.asker.judge(drawn, texts, golds)
    scored = [Answer(answer.prompt_ids, answer.response_ids) for answer in answers]
    q = token_scores(scorer, scored)
    prefixes = []
    for index, (number, length) in enumerate(cuts):
        value = beta * q[number][:length].double().sum().item()
        decided = [verdict.correct for verdict in verdicts[index * samples :][:samples] if verdict.decided]
        delta = beta * q[number][length - 1].item()
        prefixes.append(Prefix(value, value / length, delta, sum(decided), len(decided)))
    return prefixes
