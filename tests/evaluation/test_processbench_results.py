"""From step scores to F1: sweep, bootstrap, transferred thresholds, generators, the authors' script."""

import json
import math

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")

from ipvrm_core.trainer.evaluation.processbench import official
from ipvrm_core.trainer.evaluation.processbench.bootstrap import (
    bootstrap_f1,
    interval,
    resample_counts,
    rule_f1,
    stacked,
)
from ipvrm_core.trainer.evaluation.processbench.nulls import Steps, _scores, null_draws
from ipvrm_core.trainer.evaluation.processbench.results import evaluate
from ipvrm_core.trainer.evaluation.processbench.tables import markdown
from ipvrm_core.trainer.evaluation.reward_model.localisation import Sweep, best_f1, f1_at
from ipvrm_core.trainer.evaluation.reward_model.step_scores import VARIANTS
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
    found = bootstrap_f1([sweeps], "gsm8k", 2000, seed=1)
    assert (
        found["oracle"]["gsm8k"].tolist() == bootstrap_f1([sweeps], "gsm8k", 2000, seed=1)["oracle"]["gsm8k"].tolist()
    )
    assert found["oracle"]["average"] == pytest.approx(found["oracle"]["gsm8k"])
    assert found["transferred"]["gsm8k"] == pytest.approx(found["oracle"]["gsm8k"])
    low, high = interval(found["oracle"]["gsm8k"])
    share_low, share_high = 0.72, 0.87  # quantiles 0.025 and 0.975 of Binomial(100, 0.8) / 100
    assert low == pytest.approx(2 * share_low / (1 + share_low), abs=0.011)
    assert high == pytest.approx(2 * share_high / (1 + share_high), abs=0.011)


def test_a_perfect_scorer_has_no_spread():
    sweeps = {"a": Sweep.make([[1.0, -1.0], [1.0], [-1.0], [2.0]], [1, -1, 0, -1])}
    assert interval(bootstrap_f1([sweeps], None, 50)["oracle"]["a"]) == (1.0, 1.0)


# ---- nulls


def f1_of(null, subsets, tune_on=None, draws=400, seed=0):
    return stacked([rule_f1(sweeps, tune_on) for sweeps in null_draws(null, "process", subsets, seed, draws)])


@pytest.mark.parametrize("null", ["random scores", "random walk"])
def test_random_nulls_by_hand(null):
    """One wrong and one right solution of one step: F1 is 1 if the wrong one scores lower, in half of all draws."""
    pair = {"a": Steps.make([[3], [1]], [0, -1])}
    found = f1_of(null, pair)["oracle"]["a"]
    assert set(found) == {0.0, 1.0}
    assert found.mean() == pytest.approx(0.5, abs=4 * 0.5 / 20)
    assert (f1_of(null, pair)["oracle"]["a"] == found).all()
    assert (f1_of(null, pair, seed=1)["oracle"]["a"] != found).any()


def test_a_transferred_threshold_fits_no_noise():
    """Oracle thresholds fit the noise of ten problems of five steps; one from elsewhere does so only at its own set."""
    subsets = {name: Steps.make([[1] * 5] * 10, [2] * 5 + [-1] * 5) for name in "ab"}
    found = f1_of("random scores", subsets, "a", 300)
    assert (found["transferred"]["a"] == found["oracle"]["a"]).all()
    assert found["transferred"]["b"].mean() < 0.6 * found["oracle"]["b"].mean()
    assert found["oracle"]["average"] == pytest.approx((found["oracle"]["a"] + found["oracle"]["b"]) / 2)


@pytest.mark.parametrize(
    ("null", "variant", "cuts"),
    [
        ("minus tokens", "process", [-7, -4, -2]),
        ("minus tokens", "process_mean", [-7, -4, -2]),
        ("minus tokens", "prefix", [-9, -7, -6, -2]),
        ("step position", "prefix", [-2, -1]),
    ],
)
def test_nulls_without_chance_by_hand(null, variant, cuts):
    """Two problems of 2, 4 and of 7, 2 tokens and a third step of unknown length: their scores are the thresholds."""
    subsets = {"a": Steps.make([[2, 4], [7, 2, None]], [1, -1])}
    (sweeps,) = null_draws(null, variant, subsets, 0)
    assert sweeps["a"].cuts_C.tolist() == [*cuts, math.inf]


def test_a_random_walk_is_longer_over_more_tokens():
    """Sums of n normal numbers have the variance n, those from the start that of all steps before."""
    steps = Steps.make([[1, 9, 6]], [-1])
    walks = {
        variant: np.array(
            [_scores("random walk", variant, steps, np.random.default_rng(seed)) for seed in range(1000)]
        ).var(0)
        for variant in VARIANTS
    }
    assert walks["process"] == pytest.approx([1, 9, 6], rel=0.2)
    assert walks["prefix"] == pytest.approx([1, 10, 16], rel=0.2)
    assert walks["process_mean"] == pytest.approx([1, 1 / 9, 1 / 6], rel=0.2)
    assert walks["prefix_mean"] == pytest.approx([1, 1 / 10, 1 / 16], rel=0.2)


def test_a_model_that_counts_tokens_is_not_above_its_null():
    """Its scores are -0.3 nats a token: above random scores, but the token count reaches the same."""
    rng = np.random.default_rng(0)
    labels = [int(rng.integers(1, 4)) if i % 2 else -1 for i in range(60)]
    rows = rows_of("gsm8k", [[0.0] * 5] * 60, labels)
    for row, label in zip(rows, labels, strict=True):
        row["tokens"] = [int(rng.integers(5, 9)) + (30 if step == label else 0) for step in range(5)]
        row["sums"] = [-0.3 * count for count in row["tokens"]]
    result = evaluate(rows, resamples=50)
    assert result["variants"]["process"]["oracle"]["gsm8k"]["f1"] == 1.0
    assert result["nulls"]["process"]["random scores"]["oracle"]["gsm8k"]["ci"][1] < 0.6
    for variant, best in (("process", "minus tokens"), ("prefix", "minus tokens")):
        margin = result["margins"][variant]["oracle"]["gsm8k"]
        assert margin == {"null": best, "difference": 0.0, "ci": (0.0, 0.0)}
    assert "+0.0 [+0.0, +0.0] minus tokens" in markdown(result)


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
    result = evaluate(rows, resamples=20)
    found = result["variants"]["process"]
    assert found["oracle"]["math"]["f1"] == found["oracle"]["average"]["f1"] == 1.0
    assert found["transferred"]["math"]["f1"] == 0.0
    assert found["transferred"]["math"]["accuracy_correct"] == 1.0
    assert found["transferred"]["average"] == {"f1": 0.5, "ci": (0.5, 0.5)}
    assert 0 < result["nulls"]["process"]["random scores"]["oracle"]["gsm8k"]["f1"] < 1
    without = evaluate(rows, "other", 0)
    assert "transferred" not in without["variants"]["process"]
    assert not {"nulls", "margins"} & set(without)
    assert "| process | from gsm8k | 100.0 [100.0, 100.0] 100/100 | 0.0 [0.0, 0.0] 0/100 |" in (markdown(result))
    assert "| random scores | from gsm8k |" in markdown(result)


def test_a_step_behind_a_truncation_is_never_called_wrong():
    rows = rows_of("gsm8k", [[1.0, -5.0], [1.0, -9.0]], [1, -1])
    rows[1] |= {"sums": [1.0, None], "tokens": [1, 0], "status": "truncated"}
    found = evaluate(rows, resamples=0)["variants"]
    assert [found[variant]["oracle"]["gsm8k"]["f1"] for variant in found] == [1.0] * 4


def test_generators_by_hand():
    rows = rows_of("gsm8k", [[-1.0], [5.0], [1.0], [1.0]], [0, 0, -1, -1], ["a", "a", "a", "b"])
    found = evaluate(rows, resamples=0)["generators"]["process"]
    assert found["a"]["transferred"] == {"f1": pytest.approx(2 / 3), "accuracy_erroneous": 0.5, "accuracy_correct": 1.0}
    assert (found["a"]["erroneous"], found["a"]["correct"]) == (2, 1)
    assert found["b"]["oracle"] == {"f1": None, "accuracy_erroneous": None, "accuracy_correct": 1.0}


def test_a_subset_of_one_kind_has_accuracies_and_no_f1():
    """gsm8k's threshold is 1: of the two right solutions of math one has a step below it."""
    rows = rows_of("gsm8k", [[1.0, -1.0], [1.0]], [1, -1]) + rows_of("math", [[9.0, 0.5], [9.0]], [-1, -1])
    for row in rows:
        row |= {"official_rewards": row["sums"], "official_lengths": [10 + step for step in range(len(row["sums"]))]}
    result = evaluate(rows, resamples=20)
    found = result["variants"]["process"]
    assert found["transferred"]["math"] == {
        "f1": None,
        "accuracy_erroneous": None,
        "accuracy_correct": 0.5,
        "threshold": 1.0,
    }
    assert found["oracle"]["math"]["accuracy_correct"] == 1.0
    assert found["oracle"]["average"]["f1"] == found["oracle"]["gsm8k"]["f1"] == 1.0
    assert result["official"]["process"]["math"]["f1"] is None
    assert "math" not in result["margins"]["process"]["oracle"]
    assert "| process | from gsm8k | 100.0 [100.0, 100.0] 100/100 | – –/50 |" in markdown(result)
    json.dumps(result, allow_nan=False)
    alone = evaluate(rows[2:], "math", resamples=20)
    assert alone["tuned_on"] is None
    assert alone["variants"]["process"]["oracle"]["average"] == {"f1": None}
    assert "correct ones alone have no F1" in markdown(alone)


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
