"""From step scores to F1: sweep, bootstrap, transferred thresholds, generators, the authors' script."""

import math

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")

from ipvrm_core.trainer.evaluation import official, processbench_results
from ipvrm_core.trainer.evaluation.bootstrap import bootstrap_f1, interval, resample_counts
from ipvrm_core.trainer.evaluation.chance import chance_f1
from ipvrm_core.trainer.evaluation.localisation import Sweep, best_f1, f1_at
from tests.tiny_models import tokenizer

SCORES = [[0.9, 0.2, 0.5], [0.4, 0.8], [0.6, 0.7], [0.3, 0.9]]
LABELS = [1, 0, -1, -1]


def test_weights_are_repetitions():
    sweep = Sweep.make(SCORES, LABELS)
    weights = [2, 1, 3, 1]
    repeated = [row for row, n in zip(SCORES, weights, strict=True) for _ in range(n)]
    labels = [label for label, n in zip(LABELS, weights, strict=True) for _ in range(n)]
    assert sweep.best(np.array(weights)) == pytest.approx(best_f1(repeated, labels))
    for threshold in (0.1, 0.3, 0.35, 0.5, math.inf):
        assert sweep.at(threshold, np.array(weights)) == pytest.approx(f1_at(repeated, labels, threshold))


def test_ties_by_hand():
    """All scores equal: nothing is wrong (0, 1) or all is at its first step (1/2, 0). Both F1 are 0."""
    result = best_f1([[1.0, 1.0], [1.0, 1.0], [1.0]], [0, 1, -1])
    assert (result.f1, result.threshold) == (0.0, 1.0)
    assert (result.accuracy_erroneous, result.accuracy_correct) == (0.0, 1.0)
    # A step that ties with an earlier one can never be the first below a threshold.
    assert best_f1([[0.0, 0.0], [1.0]], [1, -1]).f1 == 0.0


def test_labels_and_scores_are_checked():
    with pytest.raises(ValueError, match="trace 1: label must be -1 or one of its 1 steps; got 1"):
        Sweep.make([[1.0], [2.0]], [-1, 1])
    with pytest.raises(ValueError, match="1 of 2 are nan"):
        Sweep.make([[1.0], [math.nan]], [-1, 0])


def test_resamples_keep_the_size_of_each_kind():
    erroneous = np.array([True, False, True, True, False])
    counts = resample_counts(erroneous, 200, np.random.default_rng(0))
    assert (counts[:, erroneous].sum(1) == 3).all()
    assert (counts[:, ~erroneous].sum(1) == 2).all()
    assert counts.mean(0) == pytest.approx(np.ones(5), abs=0.2)


def test_bootstrap_with_a_fixed_seed():
    """One erroneous trace (always found) and 100 correct ones, 80 of them called so: accuracy ~ Binomial(100, 0.8)."""
    scores = [[-1.0]] + [[1.0]] * 80 + [[-2.0]] * 20
    sweeps = {"gsm8k": Sweep.make(scores, [0] + [-1] * 100)}
    found = bootstrap_f1(sweeps, "gsm8k", 2000, seed=1)
    assert found["oracle"]["gsm8k"].tolist() == bootstrap_f1(sweeps, "gsm8k", 2000, seed=1)["oracle"]["gsm8k"].tolist()
    assert found["oracle"]["average"] == pytest.approx(found["oracle"]["gsm8k"])
    assert found["transferred"]["gsm8k"] == pytest.approx(found["oracle"]["gsm8k"])
    low, high = interval(found["oracle"]["gsm8k"])
    share_low, share_high = 0.72, 0.87  # quantiles 0.025 and 0.975 of Binomial(100, 0.8) / 100
    assert low == pytest.approx(2 * share_low / (1 + share_low), abs=0.011)
    assert high == pytest.approx(2 * share_high / (1 + share_high), abs=0.011)


def test_a_perfect_scorer_has_no_spread():
    sweeps = {"a": Sweep.make([[1.0, -1.0], [1.0], [-1.0], [2.0]], [1, -1, 0, -1])}
    assert interval(bootstrap_f1(sweeps, None, 50)["oracle"]["a"]) == (1.0, 1.0)


# ---- chance


def test_chance_by_hand():
    """One wrong and one right solution of one step: F1 is 1 if the wrong one scores lower, in half of all draws."""
    found = chance_f1({"a": [1, 1]}, {"a": [0, -1]}, None, 400, seed=0)["oracle"]["a"]
    assert set(found) == {0.0, 1.0}
    assert found.mean() == pytest.approx(0.5, abs=4 * 0.5 / 20)
    assert (chance_f1({"a": [1, 1]}, {"a": [0, -1]}, None, 400, seed=0)["oracle"]["a"] == found).all()
    assert (chance_f1({"a": [1, 1]}, {"a": [0, -1]}, None, 400, seed=1)["oracle"]["a"] != found).any()


def test_a_transferred_threshold_fits_no_noise():
    """Oracle thresholds fit the noise of ten problems of five steps; one from elsewhere does so only at its own set."""
    steps, labels = {"a": [5] * 10, "b": [5] * 10}, {"a": [2] * 5 + [-1] * 5, "b": [2] * 5 + [-1] * 5}
    found = chance_f1(steps, labels, "a", 300, seed=0)
    assert (found["transferred"]["a"] == found["oracle"]["a"]).all()
    assert found["transferred"]["b"].mean() < 0.6 * found["oracle"]["b"].mean()
    assert found["oracle"]["average"] == pytest.approx((found["oracle"]["a"] + found["oracle"]["b"]) / 2)


# ---- results


def rows_of(subset, scores, labels, generators=None):
    return [
        {
            "subset": subset,
            "id": str(i),
            "generator": generators[i] if generators else "g",
            "label": label,
            "status": "ok",
            "sums": list(row),
            "tokens": [1] * len(row),
        }
        for i, (row, label) in enumerate(zip(scores, labels, strict=True))
    ]


def test_transfer_by_hand():
    """gsm8k is perfect at thresholds in (-1, 1]; there math is called right throughout: (0, 1) -> F1 0, oracle 1."""
    rows = rows_of("gsm8k", [[1.0, -1.0], [1.0]], [1, -1]) + rows_of("math", [[9.0, 3.0], [9.0]], [1, -1])
    result = processbench_results.evaluate(rows, resamples=20)
    found = result["variants"]["process"]
    assert found["oracle"]["math"]["f1"] == found["oracle"]["average"]["f1"] == 1.0
    assert found["transferred"]["math"]["f1"] == 0.0
    assert found["transferred"]["math"]["accuracy_correct"] == 1.0
    assert found["transferred"]["average"] == {"f1": 0.5, "ci": (0.5, 0.5)}
    assert 0 < result["chance"]["oracle"]["gsm8k"]["f1"] < 1
    without = processbench_results.evaluate(rows, "other", 0)
    assert "transferred" not in without["variants"]["process"]
    assert "chance" not in without
    assert "| process | from gsm8k | 100.0 [100.0, 100.0] 100/100 | 0.0 [0.0, 0.0] 0/100 |" in (
        processbench_results.markdown(result)
    )
    assert "| random scores | from gsm8k |" in processbench_results.markdown(result)


def test_a_step_behind_a_truncation_is_never_called_wrong():
    rows = rows_of("gsm8k", [[1.0, -5.0], [1.0, -9.0]], [1, -1])
    rows[1] |= {"sums": [1.0, None], "tokens": [1, 0], "status": "truncated"}
    found = processbench_results.evaluate(rows, resamples=0)["variants"]
    assert [found[variant]["oracle"]["gsm8k"]["f1"] for variant in found] == [1.0] * 4


def test_generators_by_hand():
    rows = rows_of("gsm8k", [[-1.0], [5.0], [1.0], [1.0]], [0, 0, -1, -1], ["a", "a", "a", "b"])
    found = processbench_results.evaluate(rows, resamples=0)["generators"]["process"]
    assert found["a"]["transferred"] == {"f1": pytest.approx(2 / 3), "accuracy_erroneous": 0.5, "accuracy_correct": 1.0}
    assert (found["a"]["erroneous"], found["a"]["correct"]) == (2, 1)
    assert found["b"]["oracle"] == {"f1": None, "accuracy_erroneous": None, "accuracy_correct": 1.0}


def test_one_kind_of_solutions_names_the_subset():
    with pytest.raises(ValueError, match="math: F1 needs erroneous and correct traces; got 0 and 1"):
        processbench_results.evaluate(rows_of("math", [[1.0]], [-1]))


# ---- the authors' script


def script(rewards, lengths, labels):
    """The published evaluation, written as plainly as it is: {its name: (threshold, F1)}."""

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def search(scores):
        best, best_f1 = None, 0.0
        for t in np.linspace(-1, 1, 1000):
            predicted = [next((i for i, s in enumerate(row) if s < t), -1) for row in scores]
            right = [p == label for p, label in zip(predicted, labels, strict=True)]
            a = np.mean([r for r, label in zip(right, labels, strict=True) if label == -1])
            b = np.mean([r for r, label in zip(right, labels, strict=True) if label != -1])
            f1 = 2 * a * b / (a + b) if a + b > 0 else 0.0
            if best is None or f1 > best_f1:
                best, best_f1 = t, f1
        return best, best_f1

    means = [
        [r / n if n > 0 else 0.0 for r, n in zip(row, ns, strict=True)]
        for row, ns in zip(rewards, lengths, strict=True)
    ]
    differences, mean_differences = [], []
    for row, mean in zip(rewards, means, strict=True):
        before, counts = [0.0, *row], [0]
        for r, m in zip(row, mean, strict=True):
            counts.append(round(r / m) if abs(m) > 1e-9 else counts[-1] + 1)
        own = [before[i + 1] - before[i] for i in range(len(row))]
        differences.append([sigmoid(d) for d in own])
        steps = [counts[i + 1] - counts[i] for i in range(len(row))]
        mean_differences.append([sigmoid(d / max(n, 1) / 0.001**0.5) for d, n in zip(own, steps, strict=True)])
    return {
        "prefix": search([[sigmoid(r) for r in row] for row in rewards]),
        "process": search(differences),
        "prefix_mean": search([[sigmoid(m / 0.001**0.5) for m in row] for row in means]),
        "process_mean": search(mean_differences),
    }


def test_official_against_its_own_loop():
    rng = np.random.default_rng(0)
    labels = [int(rng.integers(0, 4)) if i % 2 else -1 for i in range(30)]
    lengths = [np.cumsum(rng.integers(0, 30, 4)).tolist() for _ in labels]
    rewards = [(0.001 * rng.normal(0, 40, 4).cumsum()).astype(np.float32).tolist() for _ in labels]
    for row in rewards[::3]:
        row[1] = 0.0  # where the script cannot get the length back
    scored = [official.variants(r, n) for r, n in zip(rewards, lengths, strict=True)]
    for name, (threshold, f1) in script(rewards, lengths, labels).items():
        found = official.best_f1([item[name] for item in scored], labels)
        assert (found.threshold, found.f1) == pytest.approx((threshold, f1))


def test_official_lengths_behind_a_mean_of_zero():
    """The script recovers lengths as sum / mean; where both are 0 it counts one token: 10, 11, 30 for 10, 20, 30."""
    found = official.variants([0.01, 0.0, 0.03], [10, 20, 30])["process_mean"]
    exponents = np.array([0.01 / 10, -0.01 / 1, 0.03 / 19]) / 0.001**0.5
    assert found == pytest.approx(1 / (1 + np.exp(-exponents)))


def test_the_official_grid_is_coarse():
    """Two solutions told apart by 3 nats: the exact sweep separates them, the grid of about 8 nats cannot."""
    labels, nats = [0, -1], [[1.0], [4.0]]
    assert best_f1(nats, labels).f1 == 1.0
    probabilities = [official.variants([0.001 * row[0]], [10])["process"] for row in nats]
    assert official.best_f1(probabilities, labels).f1 == 0.0


def test_official_rewards_by_hand():
    rewards, lengths = official.rewards([1.0, 2.0, 3.0, -4.0, 5.0], [1, 2, 9])
    assert rewards == pytest.approx([0.005, 0.006])  # rows 1..2 and 1..4
    assert lengths == [1, 3]
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        official.boundaries(tokenizer(None), "1", ["2"])
