"""The guard before training: refuses, reports or leaves out evaluation problems in the training data, once a run."""

import json

import pytest

pytest.importorskip("transformers")

from ipvrm_core.trainer import leakage, preflight
from ipvrm_core.trainer.commands import main as cli
from ipvrm_core.trainer.config import check
from ipvrm_core.trainer.data.chats import load_chats
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.leakage import compare, guard, left_out
from tests import chats

PROBLEM = "Ann has three apples and buys two more; how many has she?"


def write(path, prompts):
    path.write_text("\n".join(json.dumps({"prompt": prompt, "answer": "5", "solution": "5"}) for prompt in prompts))
    return str(path)


def chat_rows(*problems):
    return [chats.row(f"Solve this: {problem}", "5", n % 2) for n, problem in enumerate(problems)]


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    """The guard is asked here with a model that does not exist, which would be noticed before."""
    monkeypatch.setattr(preflight, "check_prompts", lambda config: None)


@pytest.fixture
def config(tmp_path):
    """make(train prompts, test prompts, **leakage): a configuration whose model does not exist."""

    def make(train, test, benchmark=None, **leakage):
        if benchmark:
            leakage["benchmarks"] = [{"path": write(tmp_path / "benchmark.jsonl", benchmark)}]
        return check(
            {
                "model": {"path": str(tmp_path / "no-model")},
                "data": {"path": write(tmp_path / "train.jsonl", train), "solution_column": "solution"},
                "test": {"path": write(tmp_path / "test.jsonl", test)},
                "sft": {},
                "rollout": {},
                "leakage": leakage,
            }
        )

    return make


def test_compare_names_every_pair_of_sources(config):
    report = compare(config([PROBLEM, "another one"], ["a third"], benchmark=["x", PROBLEM.upper()]))
    assert [(entry["train_size"], entry["test_size"], entry["shared"]) for entry in report] == [
        (2, 1, []),
        (2, 2, [("train-0", "benchmark-1")]),
    ]


def test_the_chats_of_a_reward_model_are_looked_at(config, tmp_path):
    path = chats.write(tmp_path / "chats.jsonl", chat_rows("one more apple", PROBLEM, PROBLEM))
    settings = config(["nothing of it"], [PROBLEM]).model_dump()
    settings["rm"] = {name: {"data": {"path": path, "kind": "pointwise"}} for name in ("a", "b")}
    (entry,) = compare(check(settings))[1:]  # one for both reward models
    assert entry == {
        "used_by": ["rm.a.data", "rm.b.data"],
        "train": f"rm.a.data, rm.b.data ({path})",
        "test": f"test ({tmp_path / 'test.jsonl'})",
        "train_size": 2,
        "test_size": 1,
        "train_rows": 3,
        "shared": [("row 1", "test-0")],
        "train_ids": ["row 1", "row 2"],
    }


def test_built_in_tasks_need_no_guard(tiny_config):
    assert compare(tiny_config()) == []


@pytest.mark.parametrize("command", ["sft", "rollout", "train-rm", "rl", "run"])
def test_training_is_refused_before_it_starts(config, command, tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(config([PROBLEM], ["x", PROBLEM]).model_dump_json())
    words = [command, str(path), "--run", str(tmp_path / "run")]
    for _ in range(2):  # the second time from RUN/leakage.json
        assert cli.main([*words, *(["--resume"] if command == "run" else [])]) == 2
        message = capsys.readouterr().err
        assert "1 of the 2 problems of" in message
        assert "train-0 = test-1" in message
        assert "leakage.action='allow'" in message
    assert json.loads((tmp_path / "run" / "leakage.json").read_text())["pairs"][0]["shared"] == [["train-0", "test-1"]]
    assert not (tmp_path / "run" / "sft").exists()


@pytest.mark.parametrize(
    ("prompts", "shown"),
    [([PROBLEM], "leakage (allowed): problems of the evaluation"), (["x"], "leakage: none of the 1 problems of")],
)
def test_allowed_and_clean_data_go_on(config, prompts, shown, tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(config(prompts, [PROBLEM], action="allow").model_dump_json())
    assert cli.main(["sft", str(path), "--run", str(tmp_path / "run")]) == 2  # for want of a model
    printed = capsys.readouterr()
    assert shown in printed.out
    assert "leakage" not in printed.err


# ---- leakage.action = "drop"


def test_dropped_problems_reach_no_phase(config, tmp_path, capsys):
    """All copies go, in both orders of rows that training knows; the test data keep theirs."""
    train = ["one more apple", PROBLEM.upper(), "two more", f"Please solve: {PROBLEM}"]
    settings = config(train, [PROBLEM, "a pear"], action="drop").model_dump()
    settings["sft"]["data"] = {"path": write(tmp_path / "sft.jsonl", [PROBLEM, "b"]), "solution_column": "solution"}
    made, run = check(settings), tmp_path / "run"
    experiment = Experiment(made, run)
    guard(made, run)
    printed = capsys.readouterr().out
    assert f"2 of 4 rows of data ({tmp_path / 'train.jsonl'}) left out, listed in {run / 'leakage.json'}" in printed
    assert f"1 of 2 rows of sft.data ({tmp_path / 'sft.jsonl'}) left out" in printed
    assert "train-1 = test-0" in printed
    assert json.loads((run / "leakage.json").read_text())["pairs"][0]["train_ids"] == ["train-1", "train-3"]
    for stream in ("rollout", "rl", "rm experts", "sft check"):
        prompts = [example.prompt for example in experiment.examples(stream, 0, 6)]
        assert sorted(prompts) == ["one more apple"] * 3 + ["two more"] * 3
    assert {example.prompt for example in experiment.examples("sft", 0, 4)} == {"b"}
    assert [example.prompt for example in experiment.test_examples(9)] == [PROBLEM, "a pear"]


def test_dropped_rows_are_the_same_without_the_guard_and_after_a_restart(config, tmp_path, monkeypatch):
    made = config([PROBLEM, "x", "y"], [PROBLEM], action="drop")
    first = Experiment(made, tmp_path / "run").examples("rl", 0, 8)
    assert "train-0" not in {example.id for example in first}
    monkeypatch.setattr(leakage, "compare", None)  # the comparison is kept
    guard(made, tmp_path / "run")
    assert Experiment(made, tmp_path / "run").examples("rl", 0, 8) == first


def test_other_data_are_compared_anew(config, tmp_path):
    """The file behind a path was replaced: what is kept answers for the old one alone."""
    made = config(["x", "y"], [PROBLEM], action="drop")
    assert left_out(made, tmp_path, "data") == frozenset()
    write(tmp_path / "train.jsonl", [PROBLEM, "y"])
    assert left_out(made, tmp_path, "data") == {"train-0"}


def test_other_actions_leave_nothing_out(config, tmp_path):
    for action in ("allow", "refuse"):
        made = config([PROBLEM, "x"], [PROBLEM], action=action)
        assert left_out(made, tmp_path / action, "data") == frozenset()


def test_nothing_left_to_train_on(config, tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(config([PROBLEM, PROBLEM], [PROBLEM], action="drop").model_dump_json())
    assert cli.main(["sft", str(path), "--run", str(tmp_path / "run")]) == 2
    assert "leaves nothing of data" in capsys.readouterr().err
    assert not (tmp_path / "run" / "sft").exists()


# ---- chats and their validation file


@pytest.fixture
def on_chats(tmp_path):
    """make(training problems, validation problems, **leakage): reward model a has a validation file, b has none."""

    def make(train, validation, benchmark=None, **leakage):
        if benchmark:
            leakage["benchmarks"] = [{"path": write(tmp_path / "benchmark.jsonl", benchmark)}]
        data = {"path": chats.write(tmp_path / "chats.jsonl", chat_rows(*train)), "kind": "pointwise"}
        given = {"validation_path": chats.write(tmp_path / "given.jsonl", chat_rows(*validation))}
        rm = {"a": {"data": data | given}, "b": {"data": data}}
        return check({"model": {"path": str(tmp_path / "no-model")}, "rm": rm, "leakage": leakage})

    return make


def test_chats_are_compared_with_the_benchmarks_and_their_own_validation_file(on_chats):
    report = compare(on_chats([PROBLEM, "one apple"], ["two pears", PROBLEM], benchmark=["One apple"]))
    assert [(entry["used_by"], entry["test"].split(" ")[0], entry["shared"]) for entry in report] == [
        (["rm.a.data"], "leakage.benchmarks.0", []),
        (["rm.a.data"], "rm.a.data.validation_path", [("row 0", "row 1")]),
        (["rm.b.data"], "leakage.benchmarks.0", []),
    ]


def test_problems_in_both_files_are_refused(on_chats, tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(on_chats([PROBLEM, "x"], [PROBLEM]).model_dump_json())
    assert cli.main(["train-rm", str(path), "--run", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert f"1 of the 1 problems of rm.a.data.validation_path ({tmp_path / 'given.jsonl'})" in message
    assert "rm.b.data" not in message


def test_dropped_chats(on_chats, tmp_path):
    made = on_chats([PROBLEM, "x", PROBLEM, "one more pear"], [PROBLEM], benchmark=["x"], action="drop")
    assert left_out(made, tmp_path, "rm.a.data") == {"row 0", "row 2"}
    assert left_out(made, tmp_path, "rm.b.data") == frozenset()  # "Solve this: x" is too short to be seen through
    assert [chat.row for chat in load_chats(made.rm["a"].data.of_validation())] == [0]
