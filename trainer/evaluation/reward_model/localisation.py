"""Step localisation by the ProcessBench protocol: the first step whose score is below a threshold is called wrong.

prediction = first step with score < threshold, else -1.  F1 = harmonic mean of the exact-match accuracy on erroneous
and on correct traces (method: docs/method.md, step localisation).

Shape letters: R traces, C cuts (thresholds in ascending order).
"""

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


def harmonic(erroneous, correct):
    """2 a b / (a + b) elementwise, 0 where both are 0, nan where one is."""
    total = np.asarray(erroneous + correct, dtype=float)
    return np.divide(2 * erroneous * correct, total, out=np.zeros_like(total), where=total != 0)


class Sweep(NamedTuple):
    """A trace r is judged right by exactly the cuts first_R[r] <= c < last_R[r].

    Step l is predicted for thresholds in (score_l, lowest score before l], and -1 for those up to the lowest score of
    all: one interval a trace, so that any weighting of the traces is swept in O(R + C).
    """

    cuts_C: np.ndarray
    first_R: np.ndarray
    last_R: np.ndarray
    erroneous_R: np.ndarray  # bool

    @classmethod
    def make(
        cls,
        scores: Sequence[Sequence[float]],
        labels: Sequence[int],
        cuts: np.ndarray | None = None,
        one_kind: bool = False,
    ) -> "Sweep":
        """`cuts` defaults to every score that occurs, and infinity: between two neighbours nothing changes.

        ValueError for scores that are nan, traces without steps, labels that are no step; and for traces of one kind
        only, unless `one_kind` asks for what can be said of these.
        """
        for r, (row, label) in enumerate(zip(scores, labels, strict=True)):
            if not -1 <= label < len(row) or not len(row):
                raise ValueError(f"trace {r}: label must be -1 or one of its {len(row)} steps; got {label}")
        flat_n = np.fromiter((score for row in scores for score in row), float)
        made = cls.flat(flat_n, np.array([len(row) for row in scores]), labels, cuts)
        if not (made.both or one_kind):
            erroneous = int(made.erroneous_R.sum())
            raise ValueError(f"F1 needs erroneous and correct traces; got {erroneous} and {len(labels) - erroneous}")
        return made

    @classmethod
    def flat(
        cls, score_n: np.ndarray, sizes_R: np.ndarray, labels: Sequence[int], cuts: np.ndarray | None = None
    ) -> "Sweep":
        """The same of the scores of all traces in one array [n]; sizes_R: of each trace, at least 1."""
        if np.isnan(score_n).any():
            raise ValueError(f"scores must be numbers; {np.isnan(score_n).sum()} of {len(score_n)} are nan")
        labels_R, starts_R = np.asarray(labels), sizes_R.cumsum() - sizes_R
        erroneous_R = labels_R >= 0
        low_R = np.where(erroneous_R, score_n[starts_R + np.maximum(labels_R, 0)], -np.inf)
        step_n = np.arange(len(score_n)) - np.repeat(starts_R, sizes_R)
        before_n = step_n < np.repeat(np.where(erroneous_R, labels_R, sizes_R), sizes_R)
        high_R = np.minimum.reduceat(np.where(before_n, score_n, np.inf), starts_R)
        cuts_C = np.unique(np.append(score_n, np.inf)) if cuts is None else np.asarray(cuts, float)
        first_R = np.searchsorted(cuts_C, low_R, side="right")  # right for low < threshold <= high
        first_R[~erroneous_R] = 0
        return cls(cuts_C, first_R, np.searchsorted(cuts_C, high_R, side="right"), erroneous_R)

    @property
    def both(self) -> bool:
        """Whether there are traces of both kinds."""
        return bool(self.erroneous_R.any() and not self.erroneous_R.all())

    def accuracies(self, weights_R: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(erroneous [C], correct [C]): weighted share of each kind that is judged right at every cut, nan of none."""
        weights_R = np.ones(len(self.first_R)) if weights_R is None else weights_R
        return self._share(self.erroneous_R, weights_R), self._share(~self.erroneous_R, weights_R)

    def _share(self, kind_R: np.ndarray, weights_R: np.ndarray) -> np.ndarray:
        if not kind_R.any():
            return np.full(len(self.cuts_C), np.nan)
        used_R = kind_R & (self.first_R < self.last_R)
        size, weight = len(self.cuts_C) + 1, weights_R[used_R]
        starts = np.bincount(self.first_R[used_R], weight, size)
        ends = np.bincount(self.last_R[used_R], weight, size)
        return (starts - ends).cumsum()[:-1] / weights_R[kind_R].sum()

    def best(self, weights_R: np.ndarray | None = None) -> F1:
        """The highest F1 over the cuts; of equal ones the lowest threshold.

        Of traces of one kind: F1 nan, and the highest accuracy of that kind.
        """
        erroneous_C, correct_C = self.accuracies(weights_R)
        f1_C = harmonic(erroneous_C, correct_C)
        c = int((f1_C if self.both else np.fmax(erroneous_C, correct_C)).argmax())
        return F1(float(f1_C[c]), float(erroneous_C[c]), float(correct_C[c]), float(self.cuts_C[c]))

    def right(self, threshold: float) -> np.ndarray:
        """[R] bool: which traces a threshold judges right, where the cuts are all the scores."""
        c = np.searchsorted(self.cuts_C, threshold, side="left")  # it judges like the next cut
        return (self.first_R <= c) & (c < self.last_R)

    def at(self, threshold: float, weights_R: np.ndarray | None = None) -> F1:
        """F1 of any threshold, where the cuts are all the scores; nan of traces of one kind."""
        weights_R = np.ones(len(self.first_R)) if weights_R is None else weights_R
        hits_R = self.right(threshold) * weights_R
        erroneous, correct = (
            float(hits_R[kind_R].sum() / weights_R[kind_R].sum()) if kind_R.any() else float("nan")
            for kind_R in (self.erroneous_R, ~self.erroneous_R)
        )
        return F1(float(harmonic(erroneous, correct)), erroneous, correct, threshold)


def best_f1(scores: Sequence[Sequence[float]], labels: Sequence[int]) -> F1:
    """The highest F1 over all thresholds, by an exact sweep over the unique scores (ties: the lowest threshold).

    O(S log S) for S scores.
    """
    return Sweep.make(scores, labels).best()


def f1_at(scores: Sequence[Sequence[float]], labels: Sequence[int], threshold: float) -> F1:
    """F1 of one threshold. ValueError unless both kinds of traces are there."""
    return Sweep.make(scores, labels).at(threshold)
