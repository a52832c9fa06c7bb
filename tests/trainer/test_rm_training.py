"""Reward models trained on chats: pairs and single answers, the kept bins, early stopping."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ipvrm_core.trainer.config import RewardModel, Scratch
from ipvrm_core.trainer.models import build_scratch, character_tokenizer, save_model
from ipvrm_core.trainer.phases import rm_chats, train_rm
from ipvrm_core.trainer.phases.best import Best
from tests.chats import answers, pair, row, sums, write


def _lines(experiment) -> list[dict]:
    return [json.loads(line) for line in (experiment.run / "rm/x/metrics.jsonl").read_text().splitlines()]


def _weights(experiment):
    return load_file(experiment.run / "rm/x/model/model.safetensors")


@pytest.mark.parametrize("kind", ["pointwise", "pairwise"])
@pytest.mark.parametrize("objective", ["ipvrm", "dpo", "qrm", "repirl"])
def test_either_kind_of_data_serves_every_kind_of_objective(experiment_of, kind, objective):
    experiment = experiment_of(answers(kind), kind, {"validation": 0.2}, objective=objective, steps=12)
    train_rm.run(experiment, "x")
    counts = json.loads((experiment.run / "rm/x/data.json").read_text())
    assert (counts["prompts"], counts["held_out_prompts"], counts["training_units"]) == (30, 6, 24)
    assert counts["training_answers"] == counts["training_answers_used"] == 48
    last = _lines(experiment)[-1]
    assert last["held_out_pair_accuracy"] > 0.8
    assert last["held_out_auc"] > 0.8
    assert ("held_out_ece_25" in last) == ("held_out_accuracy" in last) == (objective != "qrm")
    assert (experiment.run / "cache").exists() == (objective != "qrm")  # no reference, nothing to keep


def test_the_bins_of_the_saved_model_are_kept(experiment_of):
    experiment = experiment_of(answers("pointwise"), data={"validation": 0.2})
    train_rm.run(experiment, "x")
    bins = json.loads((experiment.run / "rm/x/calibration.json").read_text())["percent_of_answer"]
    assert list(bins) == ["25", "50", "75", "100"]
    last = _lines(experiment)[-1]
    for place, found in bins.items():
        assert sum(item["count"] for item in found) == 12
        error = sum(item["count"] * abs(item["right"] - item["predicted"]) for item in found) / 12
        assert last[f"held_out_ece_{place}"] == pytest.approx(error)


def test_single_answers_use_prompts_of_one_kind(experiment_of):
    rows = [row(p, a, n % 2) for n, (p, a, _) in enumerate(sums(20))]
    with pytest.raises(ValueError, match=r"rm.x: none of the prompts has right and wrong .*pairing = 'none'"):
        train_rm.run(experiment_of(rows), "x")


def test_single_answers(experiment_of, monkeypatch):
    seen, real = [], train_rm.backward_reward_loss

    def record(*arguments):
        seen.append(arguments[4].tolist())
        return real(*arguments)

    monkeypatch.setattr(train_rm, "backward_reward_loss", record)
    rows = [row(p, a, int(n < 15)) for n, (p, a, _) in enumerate(sums(20))]
    experiment = experiment_of(rows, pairing="none", batch=6, steps=3)
    train_rm.run(experiment, "x")
    assert [len(labels) for labels in seen] == [6, 6, 6]  # 18 of 20 prompts are trained on: one epoch
    counts = json.loads((experiment.run / "rm/x/data.json").read_text())
    assert (counts["training_units"], counts["training_answers_used"], counts["held_out_answers"]) == (18, 18, 2)


def test_pairs_of_the_file_stay_together(experiment_of, monkeypatch):
    """Two pairs of one prompt are not mixed; each has its own answers' reference log-probs."""
    rows = [pair("1+1?", "#2;", "#3;"), pair("1+1?", "#2;", "#4;"), pair("2+2?", "#4;", "#5;")]
    experiment = experiment_of(rows, "pairwise", {"validation": 0})
    model = experiment.start_policy().eval()
    settings = experiment.config.rm["x"]
    rendered = rm_chats.read_chats(experiment, "x", settings.data)
    data = rm_chats.from_chats(experiment, "x", rendered, settings.build(), model)
    decoded = [
        [(experiment.text.decode(labelled.answer.response_ids), labelled.correct) for labelled in unit]
        for unit in data.units
    ]
    assert decoded == [
        [(right, True), (wrong, False)] for right, wrong in (("#2;", "#3;"), ("#2;", "#4;"), ("#4;", "#5;"))
    ]
    for unit in data.units:
        for labelled in unit:
            torch.testing.assert_close(torch.tensor(labelled.ref_logprobs), model.logprobs([labelled.answer]))
    assert data.held_out == []


@pytest.mark.parametrize("kind", ["pointwise", "pairwise"])
def test_a_file_for_validation(experiment_of, tmp_path, kind):
    """All of it is validated on, all of the other file trained on; a prompt of both is one of two data sets."""
    own = write(tmp_path / "given.jsonl", answers(kind)[:8])
    experiment = experiment_of(answers(kind), kind, {"validation_path": own}, stop_metric="held_out_auc")
    train_rm.run(experiment, "x")
    counts = json.loads((experiment.run / "rm/x/data.json").read_text())
    given = 4 if kind == "pointwise" else 8
    assert (counts["training_prompts"], counts["training_answers"]) == (30, 60)
    assert (counts["held_out_prompts"], counts["held_out_answers"]) == (given, 2 * given)
    assert (counts["rows"], counts["validation_rows"]) == ((60, 8) if kind == "pointwise" else (30, 8))
    assert "held_out_auc" in _lines(experiment)[-1]


def test_a_file_for_validation_that_does_not_fit_is_named(experiment_of, tmp_path):
    own = write(tmp_path / "given.jsonl", [row("1+1?", "#2" * 30, 1)])
    experiment = experiment_of(answers("pointwise"), data={"validation_path": own, "max_tokens": 30})
    with pytest.raises(ValueError, match=r"given.jsonl: 1 of 1 rows are longer than rm.x.data.max_tokens = 30"):
        train_rm.run(experiment, "x")


def test_left_out_chats_are_counted(tiny_experiment, source, tmp_path):
    test = write(tmp_path / "benchmark.jsonl", [{"prompt": prompt} for prompt, _, _ in sums(3)])
    leakage = {"action": "drop", "benchmarks": [{"path": test}]}
    settings = {"data": source(answers("pointwise")).model_dump(), "steps": 2, "batch": 8}
    experiment = tiny_experiment(rm={"x": settings}, leakage=leakage)
    train_rm.run(experiment, "x")
    counts = json.loads((experiment.run / "rm/x/data.json").read_text())
    assert (counts["left_out_rows"], counts["rows"], counts["prompts"]) == (6, 54, 27)


def test_refused_rows_leave_no_trace_in_the_phase(experiment_of):
    experiment = experiment_of(answers("pointwise"), data={"max_tokens": 6})
    with pytest.raises(ValueError, match=r"60 of 60 rows are longer than rm.x.data.max_tokens = 6"):
        train_rm.run(experiment, "x")
    assert [path.name for path in (experiment.run / "rm/x").iterdir()] == [".lock"]


def test_a_reference_of_another_vocabulary_is_refused(experiment_of, tiny_experiment, tmp_path):
    tokenizer = character_tokenizer("abcdefghijklmnopqrstuvwxyz")
    save_model(build_scratch(Scratch(hidden_size=32, layers=1), tokenizer), tokenizer, tmp_path / "other")
    experiment = experiment_of(answers("pointwise"))
    with pytest.raises(ValueError, match="must have the same vocabulary; got"):
        rm_chats.other_reference(experiment, str(tmp_path / "other"), experiment.start_policy())
    save_model(experiment.start_policy().model, experiment.text.tokenizer, tmp_path / "same")
    rm_chats.other_reference(experiment, str(tmp_path / "same"), experiment.start_policy())


# ---- early stopping


def _numbers(values):
    return [{"held_out_auc": value} for value in values]


def test_patience(tmp_path, tiny_model):
    """Best at the second validation; patience 2 ends it at the fourth, and the second's weights come back."""
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    best = Best(tmp_path, "held_out_auc", 2, state := {})
    for step, numbers in enumerate(_numbers([0.6, 0.7, 0.7, 0.65]), start=1):
        assert "stopped" not in state
        with torch.no_grad():
            model.weight.fill_(step)
        best.see(step, numbers, model, optimizer)
    digest = state.pop("best_sha256")
    assert state == {"best": 0.7, "best_step": 2, "without_best": 2, "stopped": True}
    state["best_sha256"] = "another"
    with pytest.raises(ValueError, match=r"best\.safetensors is not what was written"):
        best.restore(model, optimizer)
    state["best_sha256"] = digest
    best.restore(model, optimizer)
    assert model.weight.tolist() == [[2.0, 2.0]]


def test_a_calibration_error_is_better_when_small(tmp_path):
    model = torch.nn.Linear(2, 1)
    best = Best(tmp_path, "held_out_ece_100", 9, state := {})
    for step, value in enumerate([0.3, 0.1, 0.2], start=1):
        best.see(step, {"held_out_ece_100": value}, model, torch.optim.AdamW(model.parameters()))
    assert state["best_step"] == 2


def test_a_metric_that_cannot_be_had(tmp_path):
    model = torch.nn.Linear(2, 1)
    best = Best(tmp_path, "held_out_auc", 9, {})
    with pytest.raises(ValueError, match="stop_metric = 'held_out_auc' needs right and wrong held-out answers"):
        best.see(1, {}, model, torch.optim.AdamW(model.parameters()))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the killed run's open log
def test_the_best_model_is_the_result_and_a_resumed_run_has_the_same(experiment_of, monkeypatch):
    """lr far too large: it gets worse after the first validation. The run is cut at step 5 and goes on."""
    values = iter([0.5, 0.9, 0.4, 0.3, 0.2])
    weights, seen = {}, []

    def measure(experiment, model, *_):
        seen.append(next(values))
        weights[seen[-1]] = {name: p.detach().clone() for name, p in model.model.named_parameters()}
        return {"held_out_auc": seen[-1]}, {"100": []}

    monkeypatch.setattr(train_rm, "measure", measure)
    settings = {"stop_metric": "held_out_auc", "patience": 2, "steps": 20}
    experiment = experiment_of(answers("pointwise"), **settings)
    real = train_rm.apply_step

    def killed(optimizer, optim, step, total):
        if step == 5:
            raise KeyboardInterrupt
        return real(optimizer, optim, step, total)

    with monkeypatch.context() as patch:
        patch.setattr(train_rm, "apply_step", killed)
        with pytest.raises(KeyboardInterrupt):
            train_rm.run(experiment, "x")
    train_rm.run(experiment, "x", resume=True)
    assert seen == [0.5, 0.9, 0.4, 0.3]  # steps 2, 4, 6, 8: two without a new best
    assert len(_lines(experiment)) == 8
    saved = _weights(experiment)
    for name, value in weights[0.9].items():
        torch.testing.assert_close(saved[name], value, rtol=0, atol=0)
    assert not (experiment.run / "rm/x/best.safetensors").exists()
    assert json.loads((experiment.run / "rm/x/calibration.json").read_text())["step"] == 4


def test_settings_stay_off_by_default():
    settings = RewardModel()
    assert (settings.data, settings.stop_metric, settings.pairing) == (None, None, "covering")
