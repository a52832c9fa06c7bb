"""Step localisation: F1 against brute force, and by hand; which token belongs to which step; AUC."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipvrm_core.trainer.evaluation.reward_model.localisation import best_f1, f1_at, predict
from ipvrm_core.trainer.reward import answer_scores, auc
from ipvrm_core.trainer.text.steps import token_steps

# Two erroneous traces (first wrong step 1 and 0) and two correct ones.
SCORES = [[0.9, 0.2, 0.5], [0.4, 0.8], [0.6, 0.7], [0.3, 0.9]]
LABELS = [1, 0, -1, -1]


def test_predict_by_hand():
    assert predict([0.9, 0.2, 0.1], 0.5) == 1
    assert predict([0.9, 0.2, 0.1], 0.95) == 0
    assert predict([0.9, 0.2, 0.1], 0.15) == 2
    assert predict([0.9, 0.2, 0.1], 0.1) == -1  # below, not at
    assert predict([], 0.5) == -1


@pytest.mark.parametrize(
    ("threshold", "erroneous", "correct"),
    [
        (0.2, 0.0, 1.0),  # nothing is below 0.2
        (0.3, 0.5, 1.0),  # trace 0 at step 1
        (0.4, 0.5, 0.5),  # and trace 3 called wrong
        (0.5, 1.0, 0.5),  # trace 1 at step 0
        (0.7, 1.0, 0.0),
        (math.inf, 0.5, 0.0),  # everything is wrong from its first step
    ],
)
def test_f1_by_hand(threshold, erroneous, correct):
    result = f1_at(SCORES, LABELS, threshold)
    assert (result.accuracy_erroneous, result.accuracy_correct) == (erroneous, correct)
    total = erroneous + correct
    assert result.f1 == pytest.approx(2 * erroneous * correct / total)
    assert result.threshold == threshold


def test_best_f1_by_hand():
    """0.3 gives (1/2, 1) and 0.5 gives (1, 1/2): both 2/3, so the lower threshold."""
    result = best_f1(SCORES, LABELS)
    assert result.f1 == pytest.approx(2 / 3)
    assert result.threshold == 0.3
    assert (result.accuracy_erroneous, result.accuracy_correct) == (0.5, 1.0)


def test_a_perfect_scorer():
    assert best_f1([[1.0, -1.0, 1.0], [2.0, 3.0]], [1, -1]).f1 == 1.0


@pytest.mark.parametrize("function", [best_f1, lambda scores, labels: f1_at(scores, labels, 0.5)])
@pytest.mark.parametrize(("labels", "counts"), [([0, 1], "2 and 0"), ([-1, -1], "0 and 2")])
def test_f1_needs_both_kinds(function, labels, counts):
    with pytest.raises(ValueError, match=rf"erroneous and correct traces; got {counts}"):
        function([[0.1, 0.2], [0.3, 0.4]], labels)


@st.composite
def labelled(draw):
    """Traces with few distinct scores, so that ties within and between them are common."""
    score = draw(
        st.sampled_from(
            [
                st.sampled_from([0.0, 0.25, 0.5, 1.0]),
                st.floats(-3, 3, allow_nan=False),
                st.integers(-2, 2).map(float),
            ]
        )
    )
    rows, labels = [], []
    for erroneous in [True, False, *draw(st.lists(st.booleans(), max_size=6))]:
        row = draw(st.lists(score, min_size=1, max_size=5))
        rows.append(row)
        labels.append(draw(st.integers(0, len(row) - 1)) if erroneous else -1)
    return rows, labels


@settings(max_examples=400, deadline=None)
@given(labelled())
def test_best_f1_against_brute_force(case):
    """Every threshold falls between two neighbouring scores, at one, or beyond the last."""
    scores, labels = case
    unique = sorted({score for row in scores for score in row})
    between = [(a + b) / 2 for a, b in pairwise(unique)]
    candidates = [unique[0] - 1, *unique, *between, unique[-1] + 1, math.inf]
    brute = max(f1_at(scores, labels, threshold).f1 for threshold in candidates)
    best = best_f1(scores, labels)
    assert best.f1 == pytest.approx(brute, abs=1e-12)
    again = f1_at(scores, labels, best.threshold)
    assert (again.accuracy_erroneous, again.accuracy_correct) == (best.accuracy_erroneous, best.accuracy_correct)
    lower = [threshold for threshold in [*unique, math.inf] if threshold < best.threshold]
    assert all(f1_at(scores, labels, threshold).f1 < best.f1 or best.f1 == 0 for threshold in lower)


# ---- steps and their tokens


def test_token_steps_by_hand():
    """ "1+2=3;" "3*4=2;" "#2" with a token that reaches over a boundary, ";3": it counts for its last character."""
    ends = [6, 12, 14]
    offsets = [(0, 2), (2, 5), (5, 7), (7, 10), (10, 12), (12, 14)]
    assert token_steps(offsets, ends, 0, 14) == [0, 0, 1, 1, 1, 2]
    characters = [(i, i + 1) for i in range(14)]
    assert token_steps(characters, ends, 0, 14) == [0] * 6 + [1] * 6 + [2] * 2
    assert token_steps([(0, 14)], ends, 0, 14) == [2]


def test_score_traces_against_one_trace_at_a_time(tiny_experiment, tiny_model):
    """Sums of log p - log p_ref over the characters of every step, read from the models' own logits."""
    from ipvrm_core.trainer.evaluation.reward_model.step_scores import score_traces

    experiment = tiny_experiment()
    model, reference = (experiment.language_model(tiny_model(number)) for number in (1, 2))
    traces = experiment.task.labelled_traces(3, 5, "train")
    scored = score_traces(experiment, model, reference, traces)
    assert len({len(trace.steps) for trace in traces}) > 1
    for number, trace in enumerate(traces):
        text = trace.prompt + "".join(trace.steps)
        ids = torch.tensor([experiment.text.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            q_L = [
                (m.model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0])
                for m in (model, reference)
            ]
        per_character = (q_L[0] - q_L[1])[len(trace.prompt) - 1 :].tolist()
        own = []
        for step in trace.steps:
            own.append(sum(per_character[: len(step)]))
            del per_character[: len(step)]
        assert not per_character
        assert scored["process"][number] == pytest.approx(own, abs=1e-4)
        prefix = [sum(own[: i + 1]) for i in range(len(own))]
        assert scored["prefix"][number] == pytest.approx(prefix, abs=1e-4)


# ---- ranking


def test_auc_by_hand():
    """Right 3, 1; wrong 2, 1: pairs 3>2, 3>1, 1<2, 1=1 -> (1 + 1 + 0 + 1/2) / 4."""
    assert auc(torch.tensor([3.0, 2.0, 1.0, 1.0]), torch.tensor([1.0, 0.0, 1.0, 0.0])) == 2.5 / 4
    assert auc(torch.tensor([3.0, 2.0, 1.0, 1.0]), torch.tensor([True, False, True, False])) == 2.5 / 4


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_auc_of_one_kind_is_nan(label):
    assert math.isnan(auc(torch.tensor([1.0, 2.0]), torch.full((2,), label)))


@given(st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), st.booleans()), min_size=2, max_size=20))
def test_auc_against_brute_force(rows):
    right = [score for score, label in rows if label]
    wrong = [score for score, label in rows if not label]
    value = auc(torch.tensor([score for score, _ in rows]), torch.tensor([float(label) for _, label in rows]))
    if not right or not wrong:
        assert math.isnan(value)
        return
    wins = sum(1.0 if r > w else 0.5 if r == w else 0.0 for r in right for w in wrong)
    assert value == pytest.approx(wins / (len(right) * len(wrong)))


def test_answer_scores_by_hand():
    sums, means = answer_scores(torch.tensor([1.0, 2.0, 3.0, -4.0]), torch.tensor([0, 3, 4]))
    assert sums.tolist() == [6.0, -4.0]
    assert means.tolist() == [2.0, -4.0]
