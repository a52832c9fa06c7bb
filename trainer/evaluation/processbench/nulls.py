"""What scores without any meaning reach by the same procedure: a reward model has to be above the best of them.

A threshold that is chosen on the very problems it is judged by fits their noise, and sums have a shape of their own:
those of longer steps are larger, those from the start of the answer drift. The four nulls know numbers of tokens and of
steps, nothing of the text:
    random scores   of every step a standard normal number
    random walk     of every token one; their sums and means, as the variant takes them
    minus tokens    minus the number of tokens in the variant's sum: what a model does that finds every token unlikely
    step position   minus the number of the step

Letters: n steps of all problems of a subset, R problems, D draws.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ipvrm_core.trainer.evaluation.reward_model.localisation import Sweep

DRAWS = 100
RANDOM = ("random scores", "random walk")
NULLS = (*RANDOM, "minus tokens", "step position")


class Steps(NamedTuple):
    """The steps of a subset's problems: tokens of every step, 0 where it is unknown (behind a truncation)."""

    tokens_n: np.ndarray
    known_n: np.ndarray
    sizes_R: np.ndarray
    labels_R: np.ndarray

    @classmethod
    def make(cls, tokens: Sequence[Sequence[int | None]], labels: Sequence[int]) -> "Steps":
        flat = [count for row in tokens for count in row]
        known_n = np.array([count is not None for count in flat])
        return cls(np.array([count or 0 for count in flat]), known_n, np.array([len(row) for row in tokens]), labels)

    def running(self, values_n: np.ndarray) -> np.ndarray:
        """Sums from the first step of each problem on."""
        total_n, starts_R = values_n.cumsum(), self.sizes_R.cumsum() - self.sizes_R
        return total_n - np.repeat(total_n[starts_R] - values_n[starts_R], self.sizes_R)

    def sweep(self, score_n: np.ndarray) -> Sweep:
        return Sweep.flat(np.where(self.known_n, score_n, np.inf), self.sizes_R, self.labels_R)


def same_for(null: str, variant: str) -> str:
    """What of the variant matters to a null: two variants with the same answer have the same scores."""
    return {"random walk": variant, "minus tokens": variant.removesuffix("_mean")}.get(null, "any")


def null_draws(
    null: str, variant: str, subsets: Mapping[str, Steps], seed: int, draws: int = DRAWS
) -> list[dict[str, Sweep]]:
    """{subset: Sweep} of every draw; one where nothing is random."""
    rng = np.random.default_rng(seed)
    return [
        {name: steps.sweep(_scores(null, variant, steps, rng)) for name, steps in subsets.items()}
        for _ in range(draws if null in RANDOM else 1)
    ]


def _scores(null: str, variant: str, steps: Steps, rng: np.random.Generator) -> np.ndarray:
    if null == "step position":
        return -steps.running(np.ones(len(steps.tokens_n)))
    if null == "random scores":
        return rng.standard_normal(len(steps.tokens_n))
    prefix = variant.startswith("prefix")
    length_n = steps.running(steps.tokens_n) if prefix else steps.tokens_n
    if null == "minus tokens":
        return -length_n.astype(float)
    own_n = np.sqrt(steps.tokens_n) * rng.standard_normal(len(steps.tokens_n))
    sum_n = steps.running(own_n) if prefix else own_n
    return sum_n / np.maximum(length_n, 1) if variant.endswith("_mean") else sum_n
