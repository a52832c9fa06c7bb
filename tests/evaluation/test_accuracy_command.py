"""`ipvrm accuracy`: a small model on a file, whole or killed in between, and best-of-n on what it kept."""

import json
from importlib.util import find_spec

import pytest
import torch

pytest.importorskip("transformers")

from ipvrm_core.trainer.commands import main as cli
from ipvrm_core.trainer.config import check
from ipvrm_core.trainer.data.tasks import ChainTask
from ipvrm_core.trainer.evaluation.policy.stored_answers import evaluate, read_stored
from ipvrm_core.trainer.models import character_tokenizer, save_model
from ipvrm_core.trainer.sampling.verified import Asker
from ipvrm_core.trainer.verify import ExactVerifier, Verdict


@pytest.fixture
def given(tiny_model, tmp_path, monkeypatch):
    """Arguments for a saved model and seven sums in two groups; an answer is right by its length, modulo 3."""

    def judge(response: str, gold: str) -> Verdict:
        return Verdict(len(response) % 3 == int(gold), "ok", response) if response else Verdict(False, "no_answer")

    monkeypatch.setattr(ExactVerifier, "_judge", staticmethod(judge))
    save_model(tiny_model(1, 4.0), character_tokenizer(ChainTask.alphabet), tmp_path / "model")
    rows = [{"input": f"{i}+1?", "target": i % 3, "kind": "ab"[i % 2]} for i in range(7)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["accuracy", "--model", tmp_path / "model", "--data", tmp_path / "sums.jsonl", "--preset", "mawps"]
    words += ["prompt_template={prompt}", "group_column=kind", "--verifier", "exact", "--device", "cpu"]
    words += ["--max-new-tokens", 6, "--temperature", 2.0, "--top-p", 1.0, "--samples", 5, "--batch", 3]
    return [str(word) for word in words]


def test_result_and_answers(given, tmp_path, capsys):
    out, kept = tmp_path / "out/result.json", tmp_path / "out/answers.jsonl"
    assert cli.main([*given, "--out", str(out), "--answers", str(kept)]) == 0
    result, rows = json.loads(out.read_text()), [json.loads(line) for line in kept.read_text().splitlines()]
    assert sorted(path.name for path in out.parent.iterdir()) == ["answers.jsonl", "result.json"]
    assert list(result["benchmarks"]) == ["mawps/a", "mawps/b"]
    assert [row["prompts"] for row in result["benchmarks"].values()] == [4, 3]

    assert len(rows) == 7 * 5
    for row in rows:
        number = int(row["problem"].removeprefix("sums-"))
        assert row["prompt"] == f"{number}+1?"
        assert row["group"] == f"mawps/{'ab'[number % 2]}"
        assert row["correct"] == bool(row["text"] and len(row["text"]) % 3 == number % 3)
        assert len(row["text"]) + row["finished"] <= row["tokens"] <= 6  # a character a token, EOS, and <pad>
        assert (row["answer"] or "") == row["text"]
        assert "greedy" not in row
    assert 0 < sum(row["correct"] for row in rows) < len(rows)
    for group, found in result["benchmarks"].items():
        mine = [row for row in rows if row["group"] == group]
        assert found["avg@5"] == sum(row["correct"] for row in mine) / len(mine)
        assert found["response_length"] == sum(row["tokens"] for row in mine) / len(mine)
        some = {row["problem"] for row in mine if row["correct"]}
        assert found["pass@5"] == len(some) / found["prompts"]
        assert found["avg@5"] <= found["pass@2"] <= found["pass@4"] <= found["pass@5"]
    averages = [found["avg@5"] for found in result["benchmarks"].values()]
    assert result["average"]["avg@5"] == pytest.approx(sum(averages) / 2)
    assert result["tokens_per_second"] > 0
    assert result["origin"]["data"]["prompt_column"] == "input"
    assert "| mawps/a | 4 |" in capsys.readouterr().out

    choice = evaluate(read_stored(kept), [1, 5], resamples=0)
    everything = sum(row["correct"] for row in rows) / len(rows)
    assert choice["1"]["average"]["mean"] == pytest.approx(everything)
    assert choice["5"]["problems"] == 7
    weighted = sum(found["pass@5"] * found["prompts"] for found in result["benchmarks"].values()) / 7
    assert choice["5"]["pass"]["mean"] == pytest.approx(weighted)
    assert cli.main(["best-of-n", str(kept), "--n", "1", "5"]) == 0


def timeless(path):
    result = json.loads(path.read_text())
    return {
        key: value for key, value in result.items() if key not in ("seconds", "tokens_per_second", "peak_memory_mb")
    }


def test_a_stopped_command_goes_on_and_ends_as_an_uninterrupted_one(given, tmp_path, monkeypatch, capsys):
    whole, out = tmp_path / "whole.json", tmp_path / "stopped.json"
    assert cli.main([*given, "--out", str(whole), "--answers", f"{whole}l"]) == 0

    ask, calls = Asker.ask, []

    def dies(asker, sampler, examples, drawing):
        calls.append(drawing)
        if len(calls) == 4:
            raise RuntimeError("killed")
        return ask(asker, sampler, examples, drawing)

    monkeypatch.setattr(Asker, "ask", dies)
    words = [*given, "--out", str(out), "--answers", f"{out}l"]
    assert cli.main(words) == 2
    parts = tmp_path / "stopped.json.parts"
    assert sorted(path.name for path in parts.glob("*.json")) == ["00000.json", "origin.json"]
    assert not out.exists()
    capsys.readouterr()
    assert cli.main(words) == 2
    assert "pass --resume to go on" in capsys.readouterr().err
    assert cli.main([*words, "--resume", "--seed", "1"]) == 2
    assert "made in another way" in capsys.readouterr().err
    for name, path in (("data", tmp_path / "sums.jsonl"), ("model", tmp_path / "model/model.safetensors")):
        before = path.read_bytes()
        path.write_bytes(before.replace(b"0+1?", b"1+1?") if name == "data" else before[:-1] + b"\1")
        assert cli.main([*words, "--resume"]) == 2
        assert f"holds answers made before {name}/{path.name} changed; remove it" in capsys.readouterr().err
        path.write_bytes(before)
    torch.manual_seed(99)
    assert cli.main([*words, "--resume"]) == 0
    assert [call.temperature for call in calls] == [0, 2.0, 0, 2.0, 0, 2.0, 0, 2.0]  # the second part is made anew
    assert timeless(out) == timeless(whole)
    assert out.with_suffix(".jsonl").read_text() == whole.with_suffix(".jsonl").read_text()
    assert not parts.exists()
    assert cli.main([*words, "--resume"]) == 2
    assert "exists already; take another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--preset", "gsm9k"], ["preset must be one of gsm8k, math500", "'gsm9k'"]),
        (["limit=3"], ["'limit=3': take --data, --preset and --limit"]),
        (["prompt_colum=x"], ["prompt_colum", "Extra inputs"]),
        (["--limit", "0"], ["limit", "greater than 0"]),
        (["--samples", "0"], ["samples must be >= 1; got 0"]),
        (["--temperature", "0"], ["temperature must be > 0", "got 0.0"]),
        (["--top-p", "1.5"], ["top_p must be in (0, 1]; got 1.5"]),
        (["--max-new-tokens", "1000"], ["sums-", "has 4 tokens; with max_new_tokens = 1000", "256"]),
    ],
)
def test_refusals(given, tmp_path, capsys, more, parts):
    assert cli.main([*given, "--out", str(tmp_path / "r.json"), *more]) == 2
    said = capsys.readouterr().err
    assert all(part in said for part in parts), said
    assert not (tmp_path / "r.json.parts/00000.json").exists()


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_a_sampler_that_is_not_installed(given, tmp_path, capsys):
    assert cli.main([*given, "--out", str(tmp_path / "r.json"), "--sampler", "vllm"]) == 2
    assert "--sampler vllm needs the package vllm, which is not installed" in capsys.readouterr().err


def test_answers_to_longer_chats_are_not_kept(given, tmp_path, capsys):
    chat = [{"role": "system", "content": "1"}, {"role": "user", "content": "1+1?"}]
    (tmp_path / "sums.jsonl").write_text(json.dumps({"input": chat, "target": 2, "kind": "a"}))
    words = [*given, "--out", str(tmp_path / "r.json"), "--answers", str(tmp_path / "a.jsonl")]
    assert cli.main(words) == 2
    assert "one user message; sums-0 has more" in capsys.readouterr().err


def test_the_evaluation_of_a_run_finds_the_same_greedy_answers(given, tmp_path):
    """`ipvrm eval` of the same model: preset, groups and the prompt without a template are those of the command."""
    from ipvrm_core.trainer.evaluation.policy.accuracy import benchmark_accuracy
    from ipvrm_core.trainer.experiment import Experiment

    out = tmp_path / "r.json"
    assert cli.main([*given, "--out", str(out)]) == 0
    data = {"path": str(tmp_path / "sums.jsonl"), "preset": "mawps", "prompt_template": "{prompt}"}
    benchmark = {**data, "group_column": "kind"}
    config = {"model": {"path": str(tmp_path / "model")}, "data": data, "test": data, "device": "cpu"}
    config |= {"verifier": {"kind": "exact"}, "generation": {"max_new_tokens": 6}}
    config["eval"] = {"samples": 2, "benchmarks": {"mawps": benchmark}}
    experiment = Experiment(check(config), tmp_path / "run")
    found = benchmark_accuracy(experiment, experiment.base_model().eval())
    expected = json.loads(out.read_text())["benchmarks"]
    assert list(found) == [*expected, "average"]
    assert [found[group]["greedy"] for group in expected] == [row["greedy"] for row in expected.values()]
    assert 0 < sum(row["greedy"] for row in expected.values()) < 2
    assert {"avg@2", "pass@2", "finished"} <= found["mawps/a"].keys()
    experiment.close()
