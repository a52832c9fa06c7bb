"""Estimators over subsets of stored answers, against brute-force enumeration; reading stored answers."""

import json
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("pydantic")

from ipvrm_core.trainer.commands import main as cli
from ipvrm_core.trainer.evaluation.policy import best_of_n
from ipvrm_core.trainer.evaluation.policy.best_of_n import best_of, majority, pass_at, weighted_vote
from ipvrm_core.trainer.evaluation.policy.equal_answers import math_equality, merge_equal
from ipvrm_core.trainer.evaluation.policy.stored_answers import Stored, evaluate, markdown, read_stored
from ipvrm_core.trainer.verify import Verdict


@st.composite
def stored(draw):
    """Few distinct answers and scores, so that ties are common; a final answer is right or wrong as a whole."""
    total = draw(st.integers(1, 8))
    answers = draw(st.lists(st.sampled_from(["a", "b", "c", "d", None]), min_size=total, max_size=total))
    right = draw(st.sets(st.sampled_from(["a", "b", "c"])))
    scores = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=total, max_size=total))
    return answers, [answer in right for answer in answers], scores, draw(st.integers(1, total))


def by_enumeration(total, n, chosen):
    """Mean over all subsets of the mean over the equally good choices."""
    values = []
    for subset in combinations(range(total), n):
        winners = chosen(subset)
        values.append(np.mean(winners) if winners else 0.0)
    return np.mean(values)


def voted(subset, answers, correct, weights):
    totals: dict = {}
    for m in subset:
        if answers[m] is not None:
            totals[answers[m]] = totals.get(answers[m], 0) + weights[m]
    best = max(totals.values(), default=0)
    return [
        next(correct[m] for m in subset if answers[m] == answer) for answer, total in totals.items() if total == best
    ]


@settings(max_examples=150, deadline=None)
@given(stored())
def test_against_enumeration(case):
    answers, correct, scores, n = case
    total, ones = len(answers), [1] * len(answers)

    def highest(subset):
        best = max(scores[m] for m in subset)
        return [correct[m] for m in subset if scores[m] == best]

    assert best_of(scores, correct, n) == pytest.approx(by_enumeration(total, n, highest))
    assert pass_at(correct, n) == pytest.approx(by_enumeration(total, n, lambda s: [any(correct[m] for m in s)]))
    expected = by_enumeration(total, n, lambda s: voted(s, answers, correct, ones))
    assert majority(answers, correct, n) == pytest.approx(expected)
    assert weighted_vote(answers, ones, correct, n) == pytest.approx(expected)
    weighted = by_enumeration(total, n, lambda s: voted(s, answers, correct, scores))
    assert weighted_vote(answers, scores, correct, n) == pytest.approx(weighted)


def test_by_hand():
    """Two of four right: pass@2 = 1 - C(2,2)/C(4,2) = 5/6. The best score is in half of all pairs."""
    assert pass_at([1, 1, 0, 0], 2) == pytest.approx(5 / 6)
    assert best_of([4.0, 1.0, 2.0, 3.0], [1, 0, 0, 0], 2) == pytest.approx(1 / 2)
    assert best_of([1.0, 1.0, 1.0, 1.0], [1, 0, 0, 0], 3) == pytest.approx(1 / 4)  # all tied: any one of them
    assert majority(["a", "a", "b"], [1, 1, 0], 3) == 1.0
    assert majority(["a", "b"], [1, 0], 2) == 0.5
    assert majority([None, None, "a"], [0, 0, 1], 3) == 1.0  # what was not found does not vote


def test_large_counts_are_exact_and_fast():
    answers = ["a"] * 100 + ["b"] * 100 + [str(i) for i in range(56)]
    correct = [True] * 100 + [False] * 156
    assert majority(answers, correct, 64) == pytest.approx(0.5, abs=1e-9)
    assert pass_at(correct, 64) == pytest.approx(1.0)


def test_sampled_votes_are_close_and_repeat(monkeypatch):
    rng = np.random.default_rng(0)
    answers = [str(a) for a in rng.integers(0, 4, 14)]
    correct, weights = [a == "1" for a in answers], rng.random(14)
    exact = weighted_vote(answers, weights, correct, 5)
    monkeypatch.setattr(best_of_n, "EXACT_SUBSETS", 1)
    sampled = weighted_vote(answers, weights, correct, 5, samples=4000, seed=3)
    assert sampled == weighted_vote(answers, weights, correct, 5, samples=4000, seed=3)
    assert sampled == pytest.approx(exact, abs=0.03)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pass_at([1, 0], 3), r"n must be in 1 .. 2, the number of stored answers; got 3"),
        (lambda: best_of([1.0], [1, 0], 1), "every stored answer needs its score and verdict; got 1 and 2"),
        (lambda: best_of([float("nan"), 1.0], [1, 0], 1), "scores must be numbers; got nan"),
        (lambda: weighted_vote(["a"], [-1.0], [1], 1), "weights must be >= 0; the least is -1.0"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


ROWS = [
    {"problem": "p", "answer": "3", "correct": True, "s": 2.0, "steps": [1.0, -1.0]},
    {"problem": "p", "answer": "4 ", "correct": False, "s": 3.0, "steps": [0.5]},
    {"problem": "q", "answer": None, "correct": 0, "s": 0.0, "steps": [2.0]},
]


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_both_shapes(tmp_path):
    flat = read_stored(write(tmp_path / "a.jsonl", ROWS), scores=["s", "steps"])
    keys = ("answer", "correct", "s", "steps")
    nested = [
        {"problem": name, **{key: [row[key] for row in ROWS if row["problem"] == name] for key in keys}}
        for name in ("p", "q")
    ]
    assert read_stored(write(tmp_path / "b.jsonl", nested), scores=["s", "steps"]) == flat
    assert flat["p"].answers == ["3", "4"]
    assert flat["q"].answers == [None]
    assert flat["p"].scores == {
        "s": [2.0, 3.0],
        "steps:min": [-1.0, 0.5],
        "steps:last": [-1.0, 0.5],
        "steps:mean": [0.0, 0.5],
        "steps:sum": [0.0, 0.5],
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"correct": 2}, "row 0, column 'correct': a verdict must be 0 or 1, false or true; got 2"),
        ({"correct": "1"}, "got '1'"),
        ({"s": None}, "column 's': a score must be a number or a list of at least one; got None"),
        ({"s": []}, "a score must be a number"),
        ({"correct": [1, 0]}, "column 'answer': expected a list of 2"),
    ],
)
def test_bad_stored_answers(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        read_stored(write(tmp_path / "a.jsonl", [{**ROWS[0], **change}]), scores=["s"])


def test_results_count_what_is_left_out(tmp_path):
    result = evaluate(read_stored(write(tmp_path / "a.jsonl", ROWS), scores=["s"]), [1, 2, 4], resamples=50)
    assert (result["1"]["problems"], result["1"]["left_out"]) == (2, 0)
    assert (result["2"]["problems"], result["2"]["left_out"]) == (1, 1)
    assert result["4"] == {"problems": 0, "left_out": 2, "answers": 0, "unscored": 0}
    assert result["1"]["average"]["mean"] == result["1"]["best:s"]["mean"] == 0.25
    assert result["2"]["best:s"]["mean"] == 0.0  # the wrong answer scores higher
    assert result["2"]["pass"]["mean"] == 1.0


def test_an_answer_without_a_score_is_never_chosen_but_votes():
    """Answers a a b, all but the last unscored: of the pairs aa, ab, ab the score chooses nothing, b, b."""
    item = Stored(["a", "a", "b"], [True, True, False], {"s": [None, None, 1.0]})
    result = evaluate({"p": item}, [1, 2, 3], resamples=0)
    assert [result[n]["best:s"]["mean"] for n in "123"] == [0.0, 0.0, 0.0]
    assert [result[n]["vote:s"]["mean"] for n in "123"] == [0.0, 0.0, 0.0]
    assert [result[n]["majority"]["mean"] for n in "123"] == pytest.approx([2 / 3, 2 / 3, 1.0])
    assert (result["1"]["answers"], result["1"]["unscored"]) == (3, 2)
    item.scores = {"s": [None, 1.0, 0.0]}  # pairs: of the first and the second a, of the first and the third b, then a
    result = evaluate({"p": item}, [2], resamples=0)
    assert result["2"]["best:s"]["mean"] == result["2"]["vote:s"]["mean"] == pytest.approx(2 / 3)
    assert "1 of 3 answers have no score: never the best, but they vote" in markdown(result)


MERGED = {  # answers to one problem, and each as the first that it equals
    "numbers": (
        ["0.5", "1/2", r"\frac12", r"$\frac{2}{4}$", "1,000", "1000.0", "-.5", "1/0", None],
        ["0.5", "0.5", "0.5", "0.5", "1,000", "1,000", "-.5", "1/0", None],
    ),
    "terms": (
        [r"\sqrt{8}", "x+1", "3", r"2\sqrt{2}", "1+x", "x=3", "4=3", None],
        [r"\sqrt{8}", "x+1", "3", r"\sqrt{8}", "x+1", "3", "4=3", None],
    ),
    "words": (["east", "seat", r"\text{East}", "(A)", "(B)"], ["east", "seat", "east", "(A)", "(B)"]),
}


def test_equal_answers_vote_as_one():
    """Of one half against two thirds the texts 2/3, 2/3, 0.5, 1/2, \\frac12 would elect the wrong one."""
    pytest.importorskip("math_verify")
    stored = {name: Stored(answers, [False] * len(answers)) for name, (answers, _) in MERGED.items()}
    stored["vote"] = Stored(["2/3", "2/3", "0.5", "1/2", r"\frac12"], [False, False, True, True, True])
    with math_equality() as equal:
        merged = merge_equal(stored, equal)
    assert {name: merged[name].answers for name in MERGED} == {name: after for name, (_, after) in MERGED.items()}
    votes = [evaluate({"p": item["vote"]}, [5], resamples=0)["5"]["majority"]["mean"] for item in (stored, merged)]
    assert votes == [0.0, 1.0]


def test_plain_numbers_are_compared_without_a_judge():
    asked = []

    def equal(ones, others):
        asked.extend(zip(ones, others, strict=True))
        return [Verdict(False, "timeout")] * len(ones)

    merge_equal({"p": Stored(["1", "2", "1.0", "4/2", "x", "y"]), "q": Stored(["x", "x", "1"])}, equal)
    assert sorted(asked) == [("1", "x"), ("1", "y"), ("2", "x"), ("2", "y"), ("x", "1"), ("x", "y")]


def test_the_command(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", ROWS)
    assert cli.main(["best-of-n", str(path), "--score", "s", "--n", "1", "2", "--out", str(tmp_path / "r.json")]) == 0
    printed = capsys.readouterr().out
    assert "| best:s | 25.0" in printed
    assert "1 have fewer than 2 answers and are left out" in printed
    assert json.loads((tmp_path / "r.json").read_text())["sizes"]["2"]["pass"]["mean"] == 1.0
