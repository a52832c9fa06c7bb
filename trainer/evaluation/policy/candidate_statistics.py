"""How many candidates a threshold leaves, and what probability they hold (the paper's table of |C| against P_min).

Shape letters: N response tokens, K candidate slots.
"""

from collections.abc import Sequence

import torch

from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.language_model import LanguageModel

P_MIN = (0.05, 0.1, 0.2)


def candidate_statistics(
    policy: LanguageModel, answers: Sequence[Answer], p_mins: Sequence[float] = P_MIN
) -> dict[str, dict[str, float]]:
    """{P_min: {size, mass, several, empty}} over all response tokens: mean |C_t|, mean probability of C_t, and the
    shares of positions with more than one candidate and with none.

    One pass: a larger P_min leaves a subset of the candidates of the smallest. ValueError for a P_min outside (0, 1].
    """
    wrong = [p_min for p_min in p_mins if not 0 < p_min <= 1]
    if wrong or not p_mins:
        raise ValueError(f"P_min must be in (0, 1]; got {wrong or 'none'}")
    found = policy.candidates(answers, min(p_mins), label="candidates")
    logprobs_NK, used_NK = found.logprobs_NS[:, 1:], found.ids_NS[:, 1:] >= 0
    probability_NK = torch.where(used_NK, logprobs_NK.exp(), 0.0).double()
    result = {}
    for p_min in p_mins:
        kept_NK = used_NK if p_min == min(p_mins) else used_NK & (probability_NK >= p_min)
        counts_N = kept_NK.sum(1)
        result[f"{p_min:g}"] = {
            "size": counts_N.double().mean().item(),
            "mass": (probability_NK * kept_NK).sum(1).mean().item(),
            "several": (counts_N > 1).double().mean().item(),
            "empty": (counts_N == 0).double().mean().item(),
        }
    return result
