"""A run folder holds results of one set of inputs: what changed behind a path is refused by name."""

import json
import sys

import pytest

from ipvrm_core.trainer import inputs, preflight
from ipvrm_core.trainer.commands import main as cli
from ipvrm_core.trainer.config import ConfigError, check
from tests import chats


def _write(path, prompt: str) -> str:
    path.write_text(json.dumps({"prompt": prompt, "answer": "5", "solution": "5"}) + "\n")
    return str(path)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A configuration with every kind of input, all of them files in tmp_path."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "judge_of_inputs", raising=False)  # that of another test
    (tmp_path / "judge_of_inputs.py").write_text("def judge(response, gold): return True\n")
    names = ("train", "test", "sft", "benchmark", "leak")
    path = {name: _write(tmp_path / f"{name}.jsonl", name) for name in names}
    given = {name: chats.write(tmp_path / f"{name}.jsonl", [chats.row(name, "1", 1)]) for name in ("chats", "given")}
    return check(
        {
            "model": {"path": str(tmp_path / "model")},
            "data": {"path": path["train"], "solution_column": "solution"},
            "test": {"path": path["test"]},
            "verifier": {"kind": "judge_of_inputs:judge"},
            "sft": {"data": {"path": path["sft"], "solution_column": "solution"}},
            "rm": {"x": {"data": {"path": given["chats"], "kind": "pointwise", "validation_path": given["given"]}}},
            "eval": {"benchmarks": {"a/b": {"path": path["benchmark"]}}},
            "leakage": {"benchmarks": [{"path": path["leak"]}]},
        }
    )


CHANGES = {
    "train.jsonl": "data",
    "test.jsonl": "test",
    "sft.jsonl": "sft.data",
    "benchmark.jsonl": "eval.benchmarks.a/b",
    "leak.jsonl": "leakage.benchmarks.0",
    "chats.jsonl": "rm.x.data",
    "given.jsonl": "rm.x.data.validation_path",
    "judge_of_inputs.py": "verifier.kind",
}


def _now(config):
    return inputs.data_inputs(config) | inputs.code_inputs(config)


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_file_is_refused_by_key_and_name(config, tmp_path, name):
    run = tmp_path / "run"
    run.mkdir()
    inputs.keep(run, _now(config))
    inputs.keep(run, _now(config))
    before = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(before.replace(b"1", b"2").replace(b"5", b"6").replace(b"True", b"False"))
    with pytest.raises(ConfigError) as caught:
        inputs.keep(run, _now(config))
    assert f"{run} was made with other contents of {CHANGES[name]} ({name});" in str(caught.value)
    (tmp_path / name).write_bytes(before)
    inputs.keep(run, _now(config))


def test_training_data_replaced_by_the_test_problems(config, tmp_path, capsys, monkeypatch):
    """Between a kill and --resume, through the command line; refused before anything of the run is touched."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(preflight, "check_prompts", lambda config: None)  # there is no model
    path, run = tmp_path / "config.json", tmp_path / "run"
    path.write_text(config.model_dump_json())
    words = ["sft", str(path), "--run", str(run), "--resume"]
    assert cli.main(words) == 2  # for want of a model
    assert "leakage: none of the 1 problems of test" in capsys.readouterr().out
    (tmp_path / "train.jsonl").write_bytes((tmp_path / "test.jsonl").read_bytes())
    before = sorted(run.rglob("*"))
    assert cli.main(words) == 2
    assert "other contents of data (train.jsonl)" in capsys.readouterr().err
    assert sorted(run.rglob("*")) == before


def test_a_judge_that_stopped_its_phase_may_be_repaired(config, tmp_path):
    inputs.keep(tmp_path, _now(config))
    (tmp_path / "judge_of_inputs.py").write_text("def judge(response, gold): return response == gold\n")
    inputs.forget(tmp_path, "verifier.kind")
    inputs.keep(tmp_path, _now(config))
    (tmp_path / "judge_of_inputs.py").write_text("def judge(response, gold): return True\n")
    with pytest.raises(ConfigError, match=r"verifier\.kind"):
        inputs.keep(tmp_path, _now(config))


def test_a_phase_reads_the_model_that_another_made(tiny_experiment, tiny_model):
    pytest.importorskip("transformers")
    from ipvrm_core.trainer.models import save_model

    experiment = tiny_experiment()
    folder = experiment.run / "rm" / "x" / "model"
    save_model(tiny_model(1), experiment.text.tokenizer, folder)
    experiment.saved(folder)
    experiment.load(folder)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 16
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"other contents of rm/x/model \(model\.safetensors\)"):
        experiment.load(folder)
    experiment.saved(folder)  # made again
    experiment.load(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_other_weights_or_another_tokenizer_behind_the_path(config, tiny_model, tmp_path, name):
    pytest.importorskip("transformers")
    from ipvrm_core.trainer.experiment import Experiment
    from ipvrm_core.trainer.models import character_tokenizer, save_model

    save_model(tiny_model(1), character_tokenizer("012#"), tmp_path / "model")
    save_model(tiny_model(2), character_tokenizer("012+"), tmp_path / "other")
    Experiment(config, tmp_path / "run").base_model()
    (tmp_path / "other" / name).replace(tmp_path / "model" / name)
    with pytest.raises(ConfigError, match=rf"other contents of model \({name}\)"):
        Experiment(config, tmp_path / "run").base_model()
