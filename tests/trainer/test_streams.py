"""What feeds the phases: seeds, example streams, pairs for the reward model, and the log of numbers."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipvrm_core.objectives.ipvrm import Ipvrm
from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.config import RewardModel, check
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.metrics import MetricsLog, read_metrics
from ipvrm_core.trainer.phases.rm_data import make_pairs
from ipvrm_core.trainer.phases.rollout import Rollouts
from ipvrm_core.trainer.phases.train_rm import validate
from ipvrm_core.trainer.seeds import epoch_slice, stable_seed

# ---- seeds and shuffled epochs


def test_stable_seed_is_the_same_in_every_process():
    assert stable_seed(0, "rl", "distrl", 7) == 1214317516  # CRC-32 of the text "(0, 'rl', 'distrl', 7)"
    assert len({stable_seed(seed, "rl", step) for seed in range(10) for step in range(100)}) == 1000


@given(st.integers(1, 12), st.integers(0, 40), st.integers(0, 30), st.integers(0, 5))
def test_epoch_slice_is_a_window_of_one_endless_sequence(size, start, count, seed):
    endless = epoch_slice(size, 0, start + count, seed)
    assert epoch_slice(size, start, count, seed) == endless[start:]
    for epoch in range((start + count) // size):
        assert sorted(endless[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_epochs_differ():
    assert epoch_slice(50, 0, 50, 0) != epoch_slice(50, 50, 50, 0)
    assert epoch_slice(50, 0, 50, 0) != epoch_slice(50, 0, 50, 1)


# ---- example streams


def test_a_stream_is_a_pure_function_of_place_and_name(tiny_experiment):
    experiment = tiny_experiment(sft={})
    together = experiment.examples("rl", 0, 12)
    assert together == experiment.examples("rl", 0, 5) + experiment.examples("rl", 5, 7)
    assert [e.prompt for e in together] != [e.prompt for e in experiment.examples("sft", 0, 12)]


def test_no_test_prompt_is_ever_trained_on(tiny_experiment):
    experiment = tiny_experiment(sft={})
    trained = {e.prompt for stream in ("sft", "rollout", "rl") for e in experiment.examples(stream, 0, 400)}
    assert not trained & {e.prompt for e in experiment.test_examples(200)}


def test_a_file_is_walked_in_shuffled_epochs_and_the_test_file_in_its_order(tmp_path):
    rows = [{"prompt": f"{i}?", "answer": str(i), "solution": f"#{i}"} for i in range(10)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(path), "solution_column": "solution"}
    experiment = Experiment(check({"model": {"path": "x"}, "data": source, "test": source}), tmp_path / "run")
    epoch = [e.answer for e in experiment.examples("rl", 0, 10)]
    assert sorted(epoch) == [str(i) for i in range(10)]
    assert [e.answer for e in experiment.examples("rl", 5, 10)][:5] == epoch[5:]
    assert [e.answer for e in experiment.examples("rl", 10, 10)] != epoch
    assert [e.answer for e in experiment.test_examples(4)] == ["0", "1", "2", "3"]


# ---- what a reward model is trained on


def _rollouts(prompt: int, correct: str) -> Rollouts:
    """Answer number i of prompt p is [p, i]; "+" is right."""
    count = len(correct)
    answers = [Answer([9], [prompt, i]) for i in range(count)]
    return Rollouts(prompt, answers, [c == "+" for c in correct], [[float(-i), -0.5] for i in range(count)])


ROLLOUTS = [_rollouts(0, "++-+"), _rollouts(1, "----"), _rollouts(2, "-+-+--"), _rollouts(3, "++")]


@pytest.mark.parametrize(
    ("pairing", "limit", "sizes"),
    [
        ("disjoint", None, {0: 1, 2: 2}),  # the rarer kind decides: 3 right and 1 wrong, 2 right and 4 wrong
        ("covering", None, {0: 3, 2: 4}),  # the commoner kind decides
        ("disjoint", 1, {0: 1, 2: 1}),
        ("covering", 2, {0: 2, 2: 2}),
    ],
)
def test_pairs_are_right_and_wrong_answers_of_one_prompt(pairing, limit, sizes):
    pairs = make_pairs(ROLLOUTS, RewardModel(pairing=pairing, pairs_per_prompt=limit), seed=0)
    found: dict[int, int] = {}
    for right, wrong in pairs:
        prompt = right.answer.response_ids[0]
        assert wrong.answer.response_ids[0] == prompt
        for row, correct in ((right, True), (wrong, False)):
            number = row.answer.response_ids[1]
            assert row.correct == ROLLOUTS[prompt].correct[number] == correct
            assert row.ref_logprobs == [float(-number), -0.5]  # its own, not another answer's
        found[prompt] = found.get(prompt, 0) + 1
    assert found == sizes
    used = [tuple(row.answer.response_ids) for pair in pairs for row in pair]
    if pairing == "disjoint":
        assert len(used) == len(set(used))
    elif limit is None:
        assert set(used) == {(prompt, i) for prompt, count in ((0, 4), (2, 6)) for i in range(count)}
        assert len(pairs) == len(set(zip(used[::2], used[1::2], strict=True)))  # no pair twice


def test_validation_of_one_kind_of_answers_is_left_out(tiny_experiment, tiny_model):
    """All held-out answers wrong, as they are early on: there is no AUC then, and training must go on."""
    experiment, model, objective = tiny_experiment(), LanguageModel(tiny_model()), Ipvrm()
    assert validate(experiment, model, [_rollouts(2, "---")], objective) == {}
    numbers = validate(experiment, model, [_rollouts(2, "-+-")], objective)
    ranks = {"held_out_auc", "held_out_auc_sum", "held_out_pair_accuracy", "held_out_accuracy"}
    assert set(numbers) == ranks | {f"held_out_ece_{p}" for p in (25, 50, 75, 100)}
    assert all(0 <= value <= 1 for value in numbers.values())


# ---- the log of numbers


def test_metrics_after_a_kill(tmp_path):
    """Lines past the checkpoint go, a line cut short does not hurt, and the rest stays as it was."""
    with MetricsLog(tmp_path, "x", 9) as log:
        for step in (1, 2, 3):
            log.log(step, loss=1 / step)
    path = tmp_path / "metrics.jsonl"
    before = path.read_text().splitlines()
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    with MetricsLog(tmp_path, "x", 9, done=2) as log:
        log.log(3, loss=7.0)
    after = path.read_text().splitlines()
    assert after[:2] == before[:2]
    assert json.loads(after[2])["loss"] == 7.0
    assert len(after) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_stop_the_run(tmp_path, value):
    with MetricsLog(tmp_path, "rl/x", 9) as log, pytest.raises(FloatingPointError, match=r"rl/x step 3: loss"):
        log.log(3, loss=value)
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_no_metrics_yet(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []
