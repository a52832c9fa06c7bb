"""Percentile bootstrap over problems, erroneous and correct ones resampled apart (their numbers are the benchmark's).

The whole procedure is repeated in every resample: the oracle threshold is swept anew, and the transferred one is tuned
on a resample of the tuning set, so that the intervals hold what the choice of the threshold adds. A re-swept maximum is
a little higher in resamples than in the data; an oracle F1 therefore lies low in its interval.

Shape letters: R traces, S resamples.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ipvrm_core.trainer.evaluation.reward_model.localisation import Sweep


def resample_counts(erroneous_R: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """[S, R]: how often each trace was drawn, with replacement within its kind."""
    counts_SR = np.zeros((resamples, len(erroneous_R)))
    for kind_R in (erroneous_R, ~erroneous_R):
        size = int(kind_R.sum())
        counts_SR[:, kind_R] = rng.multinomial(size, np.full(size, 1 / size), size=resamples)
    return counts_SR


def rule_f1(
    sweeps: Mapping[str, Sweep], tune_on: str | None, weights: Mapping[str, np.ndarray] | None = None
) -> dict[str, dict[str, float]]:
    """{"oracle" | "transferred": {subset | "average": F1}}; the average is over subsets."""
    weights = weights or {}
    best = {name: sweep.best(weights.get(name)) for name, sweep in sweeps.items()}
    found = {"oracle": {name: value.f1 for name, value in best.items()}}
    if tune_on is not None:
        threshold = best[tune_on].threshold
        found["transferred"] = {name: sweep.at(threshold, weights.get(name)).f1 for name, sweep in sweeps.items()}
    return {rule: {**values, "average": float(np.mean(list(values.values())))} for rule, values in found.items()}


def stacked(found: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, np.ndarray]]:
    return {
        rule: {name: np.array([each[rule][name] for each in found]) for name in values}
        for rule, values in found[0].items()
    }


def bootstrap_f1(
    draws: Sequence[Mapping[str, Sweep]], tune_on: str | None, resamples: int, seed: int = 0
) -> dict[str, dict[str, np.ndarray]]:
    """`rule_f1` of every resample [S]. Resample s takes draws[s mod D]: a reward model has one, random scores several.

    The same seed draws the same problems whatever the scores, so that two scores can be compared resample by resample.
    """
    rng = np.random.default_rng(seed)
    counts = {name: resample_counts(sweep.erroneous_R, resamples, rng) for name, sweep in draws[0].items()}
    return stacked(
        [
            rule_f1(draws[s % len(draws)], tune_on, {name: counts_SR[s] for name, counts_SR in counts.items()})
            for s in range(resamples)
        ]
    )


def interval(values_S: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    low, high = np.quantile(values_S, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
