"""A run that only trains reward models on chats, from the command line: no data, no test, no policy."""

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from ipvrm_core.trainer.commands import main as cli
from ipvrm_core.trainer.config import Scratch, check
from ipvrm_core.trainer.data.tasks import ChainTask
from ipvrm_core.trainer.models import build_scratch, character_tokenizer, save_model
from tests.chats import answers, sums, write


@pytest.fixture
def config(tmp_path):
    """The first prompt is in a benchmark, the second in the validation file."""
    tokenizer = character_tokenizer(ChainTask.alphabet)
    scratch = Scratch(hidden_size=32, layers=1, heads=2, kv_heads=2, intermediate_size=64)
    save_model(build_scratch(scratch, tokenizer), tokenizer, tmp_path / "start")
    rows = answers("pointwise")
    data = {"path": write(tmp_path / "chats.jsonl", rows), "kind": "pointwise"}
    data["validation_path"] = write(tmp_path / "given.jsonl", rows[2:4])
    benchmark = write(tmp_path / "benchmark.jsonl", [{"prompt": sums(1)[0][0]}])
    settings = {
        "device": "cpu",
        "model": {"path": str(tmp_path / "start")},
        "rm": {"x": {"data": data, "steps": 2, "batch": 8, "validate_every": 1}},
        "leakage": {"action": "drop", "benchmarks": [{"path": benchmark}]},
    }
    path = tmp_path / "config.json"
    path.write_text(check(settings).model_dump_json())
    return str(path)


def test_the_phases_of_such_a_run(config, tmp_path, capsys):
    run = tmp_path / "run"
    for command in ("train-rm", "eval", "report"):
        assert cli.main([command, config, "--run", str(run)]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "4 of 60 rows of rm.x.data" in printed
    assert "eval: nothing to evaluate: the configuration has no [test]" in printed
    assert json.loads((run / "eval" / "results.json").read_text()) == {}
    counts = json.loads((run / "rm/x/data.json").read_text())
    assert (counts["left_out_rows"], counts["training_prompts"], counts["held_out_answers"]) == (4, 28, 2)
    assert "rm.x: reliability" in (run / "report" / "index.html").read_text()
    assert cli.main(["train-rm", config, "--run", str(run), "--resume"]) == 0


def test_phases_that_such_a_run_does_not_have(config, tmp_path, capsys):
    for command, says in (("sft", "no [sft]"), ("rollout", "no [rollout]"), ("rl", "no [rl.<name>]")):
        assert cli.main([command, config, "--run", str(tmp_path / "run")]) == 2
        assert f"the configuration has {says} section" in capsys.readouterr().err
