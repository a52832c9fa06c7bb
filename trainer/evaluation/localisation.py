"""Step localisation by the ProcessBench protocol: the first step whose score is below a threshold is called wrong.

prediction = first step with score < threshold, else -1.  F1 = harmonic mean of the exact-match accuracy on erroneous
and on correct traces (method: docs/method.md section 7).
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class F1(NamedTuple):
    f1: float
    accuracy_erroneous: float
    accuracy_correct: float
    threshold: float


def predict(scores: Sequence[float], threshold: float) -> int:
    """Index of the first score < threshold, else -1."""
    return next((index for index, score in enumerate(scores) if score < threshold), -1)


def f1_at(scores: Sequence[Sequence[float]], labels: Sequence[int], threshold: float) -> F1:
    """F1 of one threshold. ValueError unless both kinds of traces are there."""
    hits = [predict(row, threshold) == label for row, label in zip(scores, labels, strict=True)]
    erroneous = [hit for hit, label in zip(hits, labels, strict=True) if label >= 0]
    correct = [hit for hit, label in zip(hits, labels, strict=True) if label < 0]
    if not erroneous or not correct:
        raise ValueError(f"F1 needs erroneous and correct traces; got {len(erroneous)} and {len(correct)}")
    return _f1(sum(erroneous) / len(erroneous), sum(correct) / len(correct), threshold)


def best_f1(scores: Sequence[Sequence[float]], labels: Sequence[int]) -> F1:
    """The highest F1 over all thresholds, by an exact sweep over the unique scores (ties: the lowest threshold).

    Step l is predicted exactly for thresholds in (score_l, lowest score before l], -1 up to the lowest score of all. So
    a trace adds one interval in which it is right, and one pass over the sorted ends counts them all: O(S log S) for S
    scores.
    """
    unique = sorted({score for row in scores for score in row})
    cuts = [*unique, np.inf]  # threshold cuts[i]: exactly the scores below it are "wrong"
    changes = {True: np.zeros(len(cuts) + 1), False: np.zeros(len(cuts) + 1)}  # erroneous?, +1 / -1 at interval ends
    counts = {True: 0, False: 0}
    for row, label in zip(scores, labels, strict=True):
        erroneous = label >= 0
        counts[erroneous] += 1
        low = row[label] if erroneous else -np.inf
        high = min(row[:label], default=np.inf) if erroneous else min(row)
        if low < high:  # right for low < threshold <= high
            first = bisect_left(cuts, low) + 1 if erroneous else 0
            changes[erroneous][first] += 1
            changes[erroneous][bisect_left(cuts, high) + 1] -= 1
    if not counts[True] or not counts[False]:
        raise ValueError(f"F1 needs erroneous and correct traces; got {counts[True]} and {counts[False]}")
    wrong, right = (changes[kind].cumsum()[:-1] / counts[kind] for kind in (True, False))
    f1 = np.divide(2 * wrong * right, wrong + right, out=np.zeros_like(wrong), where=wrong + right > 0)
    best = int(f1.argmax())
    return F1(float(f1[best]), float(wrong[best]), float(right[best]), float(cuts[best]))


def _f1(erroneous: float, correct: float, threshold: float) -> F1:
    total = erroneous + correct
    return F1(2 * erroneous * correct / total if total else 0.0, erroneous, correct, threshold)
