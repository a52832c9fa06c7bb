"""The guard before training: refuses or reports evaluation problems in the training data, once a run."""

import json

import pytest

pytest.importorskip("transformers")

from ipvrm_core.trainer import cli
from ipvrm_core.trainer.config import check
from ipvrm_core.trainer.leakage import compare

PROBLEM = "Ann has three apples and buys two more; how many has she?"


def write(path, prompts):
    path.write_text("\n".join(json.dumps({"prompt": prompt, "answer": "5", "solution": "5"}) for prompt in prompts))
    return str(path)


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
    def chat(problem, label):
        turns = [{"role": "user", "content": f"Solve this: {problem}"}, {"role": "assistant", "content": "5"}]
        return json.dumps({"conversation": turns, "label": label})

    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join([chat("one more apple", 1), chat(PROBLEM, 0), chat(PROBLEM, 1)]))
    settings = config(["nothing of it"], [PROBLEM]).model_dump()
    settings["rm"] = {"ipvrm": {"data": {"path": str(path), "kind": "pointwise"}}}
    report = compare(check(settings))
    assert [(entry["train"], entry["shared"]) for entry in report[1:]] == [(str(path), [("row 1", "test-0")])]


def test_built_in_tasks_need_no_guard(tiny_config):
    assert compare(tiny_config()) == []


@pytest.mark.parametrize("command", ["sft", "rollout", "train-rm", "distrl", "run"])
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
    assert json.loads((tmp_path / "run" / "leakage.json").read_text())[0]["shared"] == [["train-0", "test-1"]]
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
