"""Reward models on chats: what is read, what is refused, the split by prompt, the cache, early stopping."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ipvrm_core.trainer import reference_cache
from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.config import Chats, RewardModel
from ipvrm_core.trainer.data.chats import by_prompt, held_out, load_chats
from ipvrm_core.trainer.phases import rm_data, train_rm
from ipvrm_core.trainer.phases.best import Best
from ipvrm_core.trainer.phases.rm_data import encode, fit

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "rm_val"


def conversation(prompt: str, answer: str) -> list[dict]:
    return [{"content": prompt, "role": "user"}, {"content": answer, "role": "assistant"}]


def row(prompt: str, answer: str, label) -> dict:
    return {"conversation": conversation(prompt, answer), "label": label}


def pair(prompt: str, chosen: str, rejected: str) -> dict:
    return {"chosen": conversation(prompt, chosen), "rejected": conversation(prompt, rejected)}


@pytest.fixture
def source(tmp_path):
    """make(rows, **settings) -> Chats of a file with these rows, parquet or jsonl."""

    def make(rows: list[dict], kind: str = "pointwise", suffix: str = ".jsonl", **settings) -> Chats:
        path = tmp_path / f"chats{suffix}"
        if suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Chats(path=str(path), kind=kind, **settings)

    return make


# ---- reading


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_pointwise(source, suffix):
    chats = load_chats(source([row("1+1?", "#2;", 1), row("1+1?", "#3;", 0)], suffix=suffix))
    assert [(chat.row, chat.answer, chat.correct) for chat in chats] == [(0, "#2;", True), (1, "#3;", False)]
    assert chats[0].prompt == ({"role": "user", "content": "1+1?"},)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_pairwise_rows_are_a_right_and_a_wrong_answer(source, suffix):
    chats = load_chats(source([pair("1+1?", "#2;", "#3;"), pair("2+2?", "#4;", "#5;")], "pairwise", suffix))
    assert [(chat.row, chat.answer, chat.correct) for chat in chats] == [
        (0, "#2;", True),
        (0, "#3;", False),
        (1, "#4;", True),
        (1, "#5;", False),
    ]


def test_other_columns_and_a_limit(source):
    rows = [{"talk": conversation("1?", "1"), "good": False}, {"talk": [], "good": 7}]
    chats = load_chats(source(rows, conversation_column="talk", label_column="good", limit=1))
    assert [(chat.answer, chat.correct) for chat in chats] == [("1", False)]


@pytest.mark.parametrize("label", [2, -1, 0.5, "1", None, float("nan")])
def test_labels_other_than_0_and_1_are_refused(source, label):
    with pytest.raises(ValueError, match=r"row 1, column 'label': a label must be 0 or 1; got"):
        load_chats(source([row("1?", "1", 1), row("1?", "1", label)]))


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        (conversation("1?", ""), "the answer is empty"),
        (conversation("1?", " \n"), "the answer is empty"),
        (conversation("1?", "1")[:1], "the last message must be the assistant's answer; got the role 'user'"),
        (conversation("1?", "1")[1:], "there must be a user's message before the answer"),
        (conversation(" ", "1"), "there must be a user's message before the answer"),
        ([], "expected at least one message"),
        ("1? 1", "expected a list of messages; got str"),
        ([{"from": "human", "value": "1?"}], "expected messages with texts 'role' and 'content'"),
    ],
)
def test_conversations_that_are_none(source, messages, says):
    with pytest.raises(ValueError, match=r"row 0, column 'conversation': .*") as caught:
        load_chats(source([{"conversation": messages, "label": 1}]))
    assert says in str(caught.value)


def test_missing_columns_rows_and_files(source, tmp_path):
    with pytest.raises(ValueError, match=r"no column 'label'; it has \['conversation', 'score'\]"):
        load_chats(source([{"conversation": conversation("1?", "1"), "score": 1}]))
    with pytest.raises(ValueError, match="has no rows"):
        load_chats(source([]))
    with pytest.raises(FileNotFoundError, match="no such data file"):
        load_chats(Chats(path=str(tmp_path / "none.parquet"), kind="pointwise"))


def test_pairs_that_are_none(source):
    with pytest.raises(ValueError, match=r"row 0, columns 'chosen' and 'rejected': .* must have the same prompt"):
        load_chats(source([{"chosen": conversation("1?", "1"), "rejected": conversation("2?", "2")}], "pairwise"))
    with pytest.raises(ValueError, match=r"row 0.* must differ; got '1' twice"):
        load_chats(source([pair("1?", "1", "1")], "pairwise"))


# ---- the split


def test_a_prompt_is_never_on_both_sides_and_the_order_of_rows_does_not_matter(source):
    rows = [row(f"{n}?", f"#{k};", k % 2) for k in range(3) for n in range(20)] + [row(" 3? ", "#7;", 1)]

    def kept(rows) -> set[str]:
        groups = by_prompt(load_chats(source(rows)))
        assert len(groups) == 20  # white space makes no other prompt
        assert sum(map(len, groups)) == 61
        return {groups[index][0].prompt[0]["content"].strip() for index in held_out(groups, 0.25)}

    first = kept(rows)
    assert len(first) == 5
    assert kept(rows[::-1]) == first
    assert kept(rows[40:] + rows[:40]) == first


def test_sizes_of_the_split(source):
    groups = by_prompt(load_chats(source([row(f"{n}?", "1", 1) for n in range(4)])))
    assert held_out(groups, 0) == set()
    assert len(held_out(groups, 0.01)) == 1
    with pytest.raises(ValueError, match="none is left to train on"):
        held_out(groups[:1], 0.1)


# ---- rendering and length


def test_rendering(source, tiny_experiment):
    experiment = tiny_experiment()
    eos = experiment.tokenizer.eos_token_id
    chats = load_chats(source([row("1+1?", "#2;", 1)]))
    ((_, plain),) = encode(experiment, chats)
    assert experiment.tokenizer.decode(plain.prompt_ids) == "1+1?"
    assert experiment.tokenizer.decode(plain.response_ids[:-1]) == "#2;"
    assert plain.response_ids[-1] == eos
    experiment.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }};{% endfor %}{% if add_generation_prompt %}#{% endif %}"
    )
    ((_, rendered),) = encode(experiment, chats)
    assert experiment.tokenizer.decode(rendered.prompt_ids) == "1+1?;#"
    assert rendered.response_ids == plain.response_ids


def test_several_messages_need_a_chat_template(source, tiny_experiment):
    messages = [{"role": "system", "content": "1"}, *conversation("1?", "1")]
    chats = load_chats(source([{"conversation": messages, "label": 1}]))
    with pytest.raises(ValueError, match="row 0 is a chat, but the tokenizer has no chat template"):
        encode(tiny_experiment(), chats)


def _encoded(source, lengths):
    """Pairwise rows; the prompt has 3 tokens."""
    rows = [pair("1+1", "2" * a, "3" * b) for a, b in lengths]
    made = source(rows, "pairwise")
    chats = load_chats(made)
    return [(chat, Answer([1, 2, 3], [5] * len(chat.answer))) for chat in chats]


@pytest.mark.parametrize(
    ("on_long", "lengths", "dropped", "truncated"),
    [("drop", [5, 4, 5, 5], 1, 0), ("truncate", [5, 4, 7, 1, 5, 5], 0, 1)],
)
def test_long_rows_are_counted(source, on_long, lengths, dropped, truncated):
    encoded = _encoded(source, [(5, 4), (8, 1), (5, 5)])
    settings = Chats(path="x", kind="pairwise", max_tokens=8 if on_long == "drop" else 10, on_long=on_long)
    chats, answers, counts = fit(encoded, settings, "rm.x.data")
    assert [len(answer.response_ids) for answer in answers] == lengths
    assert len(chats) == len(answers) == counts["answers"]  # a pair goes as a whole
    assert (counts["rows"], counts["dropped_rows"], counts["truncated_rows"]) == (3, dropped, truncated)
    assert counts["longest_tokens"] == 11


def test_long_rows_are_an_error_unless_told_otherwise(source):
    encoded = _encoded(source, [(5, 4), (8, 1), (5, 9)])
    with pytest.raises(ValueError, match=r"2 of 3 rows are longer than rm.x.data.max_tokens = 8 .* first is row 1\)"):
        fit(encoded, Chats(path="x", kind="pairwise", max_tokens=8), "rm.x.data")
    with pytest.raises(ValueError, match="truncation would leave no answer"):
        fit(encoded, Chats(path="x", kind="pairwise", max_tokens=3, on_long="truncate"), "rm.x.data")
    with pytest.raises(ValueError, match="all 3 rows are longer"):
        fit(encoded, Chats(path="x", kind="pairwise", max_tokens=3, on_long="drop"), "rm.x.data")
    assert len(fit(encoded, Chats(path="x", kind="pairwise", max_tokens=12), "rm.x.data")[0]) == 6


def test_rows_longer_than_the_model_are_refused(tiny_model):
    with pytest.raises(ValueError, match=r"rm.x.data: the model has 256 positions, the longest row needs 300"):
        rm_data.check_positions([Answer([1] * 100, [1] * 200)], tiny_model(), "rm.x.data")


# ---- the real files


@pytest.mark.skipif(not SHARED.is_dir(), reason="the data of ../shared is not on this machine")
def test_the_real_files():
    pointwise = load_chats(Chats(path=str(SHARED / "pointwise_val.parquet"), kind="pointwise"))
    pairwise = load_chats(Chats(path=str(SHARED / "pairwise_val.parquet"), kind="pairwise"))
    assert (len(pointwise), sum(chat.correct for chat in pointwise)) == (1086, 543)
    assert (len(pairwise), sum(chat.correct for chat in pairwise)) == (1086, 543)
    groups = [by_prompt(chats) for chats in (pointwise, pairwise)]
    assert [len(group) for group in groups] == [260, 260]
    first, second = (
        {group[index][0].prompt[0]["content"].strip() for index in held_out(group, 0.1)} for group in groups
    )
    assert len(first) == 26
    assert first == second  # the same validation prompts, whichever of the two files is trained on


# ---- training


def _sums(count: int) -> list[tuple[str, str, str]]:
    """(prompt, right answer, wrong answer)"""
    return [(f"{n % 10}+{n // 10}?", f"#{(n % 10 + n // 10) % 10};", f"#{(n + 5) % 10};") for n in range(count)]


def _answers(kind: str) -> list[dict]:
    """Right answers end in a semicolon, wrong ones in an equals sign: that is easy to learn."""
    if kind == "pairwise":
        return [pair(p, right, wrong[:-1] + "=") for p, right, wrong in _sums(30)]
    return [row(p, a, k) for p, right, wrong in _sums(30) for k, a in ((1, right), (0, wrong[:-1] + "="))]


@pytest.fixture
def experiment_of(tiny_experiment, source):
    """make(rows, kind, data settings, **settings of the reward model) -> Experiment with rm.x"""

    def make(rows, kind="pointwise", data=None, **settings):
        chats = source(rows, kind, **(data or {})).model_dump()
        values = {"steps": 6, "batch": 8, "optim": {"lr": 1e-2}, "validate_every": 2, **settings}
        return tiny_experiment(rm={"x": {"data": chats, **values}}, checkpoint_every=2)

    return make


def _lines(experiment) -> list[dict]:
    return [json.loads(line) for line in (experiment.run / "rm/x/metrics.jsonl").read_text().splitlines()]


def _weights(experiment):
    return load_file(experiment.run / "rm/x/model/model.safetensors")


@pytest.mark.parametrize("kind", ["pointwise", "pairwise"])
@pytest.mark.parametrize("objective", ["ipvrm", "dpo", "qrm", "repirl"])
def test_either_kind_of_data_serves_every_kind_of_objective(experiment_of, kind, objective):
    experiment = experiment_of(_answers(kind), kind, {"validation": 0.2}, objective=objective, steps=12)
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
    experiment = experiment_of(_answers("pointwise"), data={"validation": 0.2})
    train_rm.run(experiment, "x")
    bins = json.loads((experiment.run / "rm/x/calibration.json").read_text())["percent_of_answer"]
    assert list(bins) == ["25", "50", "75", "100"]
    last = _lines(experiment)[-1]
    for place, found in bins.items():
        assert sum(item["count"] for item in found) == 12
        error = sum(item["count"] * abs(item["right"] - item["predicted"]) for item in found) / 12
        assert last[f"held_out_ece_{place}"] == pytest.approx(error)


def test_single_answers_use_prompts_of_one_kind(experiment_of):
    rows = [row(p, a, n % 2) for n, (p, a, _) in enumerate(_sums(20))]
    with pytest.raises(ValueError, match=r"rm.x: none of the prompts has right and wrong .*pairing = 'none'"):
        train_rm.run(experiment_of(rows), "x")


def test_single_answers(experiment_of, monkeypatch):
    seen, real = [], train_rm.backward_reward_loss

    def record(*arguments):
        seen.append(arguments[5].tolist())
        return real(*arguments)

    monkeypatch.setattr(train_rm, "backward_reward_loss", record)
    rows = [row(p, a, int(n < 15)) for n, (p, a, _) in enumerate(_sums(20))]
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
    rendered = rm_data.read_chats(experiment, "x", settings.data)
    data = rm_data.from_chats(experiment, "x", rendered, settings.build(), model)
    decoded = [
        [(experiment.decode(labelled.answer.response_ids), labelled.correct) for labelled in unit]
        for unit in data.units
    ]
    assert decoded == [
        [(right, True), (wrong, False)] for right, wrong in (("#2;", "#3;"), ("#2;", "#4;"), ("#4;", "#5;"))
    ]
    for unit in data.units:
        for labelled in unit:
            values = reference_cache.sampled_logprobs(experiment, model, [labelled.answer])
            torch.testing.assert_close(torch.tensor(labelled.ref_logprobs), values)
    assert data.held_out == []


def test_refused_rows_leave_no_trace_in_the_phase(experiment_of):
    experiment = experiment_of(_answers("pointwise"), data={"max_tokens": 6})
    with pytest.raises(ValueError, match=r"60 of 60 rows are longer than rm.x.data.max_tokens = 6"):
        train_rm.run(experiment, "x")
    assert [path.name for path in (experiment.run / "rm/x").iterdir()] == [".lock"]


def test_a_reference_of_another_vocabulary_is_refused(experiment_of, tiny_experiment, tmp_path):
    from ipvrm_core.trainer.config import Scratch
    from ipvrm_core.trainer.models import build_scratch, character_tokenizer, save_model

    tokenizer = character_tokenizer("abcdefghijklmnopqrstuvwxyz")
    save_model(build_scratch(Scratch(hidden_size=32, layers=1), tokenizer), tokenizer, tmp_path / "other")
    experiment = experiment_of(_answers("pointwise"))
    with pytest.raises(ValueError, match="must have the same vocabulary; got"):
        rm_data.other_reference(experiment, str(tmp_path / "other"), experiment.start_policy())
    save_model(experiment.start_policy(), experiment.tokenizer, tmp_path / "same")
    rm_data.other_reference(experiment, str(tmp_path / "same"), experiment.start_policy())


# ---- the cache

ANSWERS = [Answer([3, 4], [5, 6, 7]), Answer([3, 4, 5], [6])]


def test_the_cache_is_read_the_second_time(tiny_experiment, tiny_model, tmp_path, monkeypatch):
    experiment, model = tiny_experiment(), tiny_model()
    first = reference_cache.reference_logprobs(experiment, model, ANSWERS, tmp_path / "cache")
    torch.testing.assert_close(first, reference_cache.sampled_logprobs(experiment, model, ANSWERS))

    def never(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(reference_cache, "sampled_logprobs", never)
    assert torch.equal(reference_cache.reference_logprobs(experiment, model, ANSWERS, tmp_path / "cache"), first)
    others = {
        "another model": (experiment, tiny_model(1), ANSWERS),
        "other data": (experiment, model, ANSWERS[:1]),
        "another prompt": (experiment, model, [ANSWERS[0], Answer([3, 4, 6], [6])]),
        "the border elsewhere": (experiment, model, [Answer([3], [4, 5, 6, 7]), ANSWERS[1]]),
    }
    for arguments in others.values():
        with pytest.raises(AssertionError, match="computed again"):
            reference_cache.reference_logprobs(*arguments, tmp_path / "cache")


def test_the_key_has_the_temperature(tiny_config, tiny_model, tmp_path):
    from ipvrm_core.trainer.experiment import Experiment

    model = tiny_model()
    keys = {
        reference_cache.cache_key(
            Experiment(tiny_config(generation={"temperature": t}), tmp_path / str(t)), model, ANSWERS
        )
        for t in (0.7, 1.0)
    }
    assert len(keys) == 2


def test_a_kill_while_writing_leaves_nothing_that_would_be_read(tiny_experiment, tiny_model, tmp_path, monkeypatch):
    experiment, model, folder = tiny_experiment(), tiny_model(), tmp_path / "cache"

    def cut_short(tensors, path):
        save_file(tensors, path)
        path.write_bytes(path.read_bytes()[:-4])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reference_cache, "save_file", cut_short)
        with pytest.raises(KeyboardInterrupt):
            reference_cache.reference_logprobs(experiment, model, ANSWERS, folder)
    assert list(folder.glob("reference-*")) == []
    (left,) = folder.iterdir()
    dead = subprocess.Popen(["true"])
    dead.wait()
    left.rename(folder / left.name.replace(str(os.getpid()), str(dead.pid)))
    reference_cache.reference_logprobs(experiment, model, ANSWERS, folder)
    (path,) = folder.iterdir()  # what the killed process left is gone
    save_file({"logprobs": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"must hold 4 log-probs; got \(3,\). Delete it"):
        reference_cache.reference_logprobs(experiment, model, ANSWERS, folder)


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
    assert state == {"best": 0.7, "best_step": 2, "without_best": 2, "stopped": True}
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
        weights[seen[-1]] = {name: p.detach().clone() for name, p in model.named_parameters()}
        return {"held_out_auc": seen[-1]}, {"100": []}

    monkeypatch.setattr(train_rm, "measure", measure)
    settings = {"stop_metric": "held_out_auc", "patience": 2, "steps": 20}
    experiment = experiment_of(_answers("pointwise"), **settings)
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
