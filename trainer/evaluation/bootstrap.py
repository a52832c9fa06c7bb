"""Percentile bootstrap over problems, erroneous and correct ones resampled apart (their numbers are the benchmark's).

The whole procedure is repeated in every resample: the oracle threshold is swept anew, and the transferred one is tuned
on a resample of the tuning set, so that the intervals hold what the choice of the threshold adds. A re-swept maximum is
a little higher in resamples than in the data; an oracle F1 therefore lies low in its interval.

Shape letters: R traces, S resamples.
"""

from collections.abc import Mapping

import numpy as np

from ipvrm_core.trainer.evaluation.localisation import Sweep


def resample_counts(erroneous_R: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """[S, R]: how often each trace was drawn, with replacement within its kind."""
    counts_SR = np.zeros((resamples, len(erroneous_R)))
    for kind_R in (erroneous_R, ~erroneous_R):
        size = int(kind_R.sum())
        counts_SR[:, kind_R] = rng.multinomial(size, np.full(size, 1 / size), size=resamples)
    return counts_SR


def bootstrap_f1(
    sweeps: Mapping[str, Sweep], tune_on: str | None, resamples: int, seed: int = 0
) -> dict[str, dict[str, np.ndarray]]:
    """{"oracle" | "transferred": {subset | "average": F1 of every resample [S]}}; the average is over subsets."""
    rng = np.random.default_rng(seed)
    counts = {name: resample_counts(sweep.erroneous_R, resamples, rng) for name, sweep in sweeps.items()}
    found = {"oracle": {name: np.empty(resamples) for name in sweeps}}
    if tune_on is not None:
        found["transferred"] = {name: np.empty(resamples) for name in sweeps}
    for s in range(resamples):
        best = {name: sweep.best(counts[name][s]) for name, sweep in sweeps.items()}
        for name, sweep in sweeps.items():
            found["oracle"][name][s] = best[name].f1
            if tune_on is not None:
                found["transferred"][name][s] = sweep.at(best[tune_on].threshold, counts[name][s]).f1
    for values in found.values():
        values["average"] = np.mean([values[name] for name in sweeps], axis=0)
    return found


def interval(values_S: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    low, high = np.quantile(values_S, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
