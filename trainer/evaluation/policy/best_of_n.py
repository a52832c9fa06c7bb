"""What choosing one of N stored answers is worth: best-of-N by a score, votes, pass@k, each over all subsets of size N.

Of M >= N stored answers to a problem the estimators average over every subset of N without replacement, which is
unbiased for "draw N answers anew" and has the least variance that M answers allow. All but the weighted vote are exact
sums; that one is exact where there are few subsets and else the mean over subsets drawn with a seed, unbiased as well.

Letters: M stored answers of one problem, N of them at a time, G different final answers.
"""

from collections.abc import Hashable, Sequence
from itertools import combinations
from math import comb

import numpy as np

EXACT_SUBSETS = 2000  # up to so many subsets the weighted vote takes them all


def pass_at(correct: Sequence[bool], n: int) -> float:
    """P(at least one of n is right) = 1 - C(M - c, n) / C(M, n), c right answers (Chen et al. 2021, eq. 1)."""
    total = _check(correct, n)
    return 1 - comb(total - sum(map(bool, correct)), n) / comb(total, n)


def best_of(scores: Sequence[float], correct: Sequence[bool], n: int) -> float:
    """P(the highest-scored of n is right); among equal scores each is chosen alike.

    The answers of one score are the highest of a subset in C(b, n) - C(a, n) of the C(M, n), where a answers have a
    lower score and b one that is not higher.
    """
    total = _check(correct, n, scores)
    scores_M, right_M = np.asarray(scores, float), np.asarray(correct, float)
    if np.isnan(scores_M).any():
        raise ValueError("scores must be numbers; got nan")
    found = 0.0
    for score in np.unique(scores_M):
        below, upto = int((scores_M < score).sum()), int((scores_M <= score).sum())
        found += (comb(upto, n) - comb(below, n)) / comb(total, n) * right_M[scores_M == score].mean()
    return found


def majority(answers: Sequence[Hashable], correct: Sequence[bool], n: int) -> float:
    """P(the most frequent final answer of n is right); equally frequent ones are chosen alike.

    None is an answer that was not found: it takes part in the drawing and never wins. For every right final answer and
    every number x of its copies, the ways to draw the rest with no answer more than x times are counted by a product
    of polynomials, one a final answer, which also counts the ties.
    """
    total = _check(correct, n, answers)
    groups = _groups(answers)
    sizes = {answer: len(members) for answer, members in groups.items()}
    found = 0.0
    for answer, members in groups.items():
        share = np.mean([bool(correct[m]) for m in members])  # 0 or 1 unless the verifier contradicts itself
        if answer is None or not share:
            continue
        others = [size for other, size in sizes.items() if other != answer and other is not None]
        for x in range(1, min(len(members), n) + 1):
            ways = comb(len(members), x) * _ways(others, sizes.get(None, 0), n - x, x)
            found += share * ways / comb(total, n)
    return float(found)


def _ways(others: Sequence[int], blank: int, rest: int, x: int) -> float:
    """Sum over the ways to draw `rest`, none of `others` more than x times, of 1 / (1 + how many of them x times)."""
    table = {(0, 0): 1}  # (drawn, tied) -> ways, exact integers
    for size in others:
        longer: dict[tuple[int, int], int] = {}
        for (drawn, tied), ways in table.items():
            for y in range(min(size, x, rest - drawn) + 1):
                key = (drawn + y, tied + (y == x))
                longer[key] = longer.get(key, 0) + ways * comb(size, y)
        table = longer
    return sum(ways * comb(blank, rest - drawn) / (tied + 1) for (drawn, tied), ways in table.items())


def weighted_vote(
    answers: Sequence[Hashable],
    weights: Sequence[float],
    correct: Sequence[bool],
    n: int,
    *,
    samples: int = 1000,
    seed: int = 0,
) -> float:
    """P(the final answer with the largest sum of weights >= 0 is right); ties are chosen alike, None never wins."""
    total = _check(correct, n, answers)
    _check(correct, n, weights)
    weights_M = np.asarray(weights, float)
    if not (weights_M >= 0).all():
        raise ValueError(f"weights must be >= 0; the least is {weights_M.min()}")
    names = [answer for answer in _groups(answers) if answer is not None]
    if not names:
        return 0.0
    member_MG = np.array([[answer == name for name in names] for answer in answers], float)
    right_G = np.array([np.mean([bool(correct[m]) for m in np.flatnonzero(column)]) for column in member_MG.T])
    if comb(total, n) <= EXACT_SUBSETS:
        subsets = np.array(list(combinations(range(total), n)))
    else:
        rng = np.random.default_rng(seed)
        subsets = rng.permuted(np.tile(np.arange(total), (samples, 1)), axis=1)[:, :n]
    drawn_SM = np.zeros((len(subsets), total))
    np.put_along_axis(drawn_SM, subsets, 1.0, axis=1)
    votes_SG = drawn_SM @ (weights_M[:, None] * member_MG)
    voted_SG = drawn_SM @ member_MG > 0  # an answer that was not drawn cannot win, even where all weigh 0
    best_S1 = np.where(voted_SG, votes_SG, -1.0).max(1, keepdims=True)
    winners_SG = voted_SG & (votes_SG >= best_S1 * (1 - 1e-12))
    count_S = np.maximum(winners_SG.sum(1), 1)
    return float(((winners_SG * right_G).sum(1) / count_S).mean())


def _groups(answers: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for m, answer in enumerate(answers):
        groups.setdefault(answer, []).append(m)
    return groups


def _check(correct: Sequence[bool], n: int, other: Sequence | None = None) -> int:
    total = len(correct)
    if other is not None and len(other) != total:
        raise ValueError(f"every stored answer needs its score and verdict; got {len(other)} and {total}")
    if not 1 <= n <= total:
        raise ValueError(f"n must be in 1 .. {total}, the number of stored answers; got {n}")
    return total
