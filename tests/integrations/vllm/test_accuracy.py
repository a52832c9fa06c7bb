"""`ipvrm accuracy --sampler vllm`: transformers' greedy answers, and a killed command that goes on."""

import json

import pytest

from ipvrm_core.trainer.commands.main import main
from ipvrm_core.trainer.models import save_model
from ipvrm_core.trainer.sampling.base import Drawing
from ipvrm_core.trainer.sampling.generate import Generate
from ipvrm_core.trainer.sampling.verified import Asker
from ipvrm_core.trainer.sampling.vllm import VllmSampler
from ipvrm_core.trainer.verify.exact import extract
from tests.integrations.vllm import cases

PROBLEMS = [f"{a}+{b}*{c}=" for a in (1, 4, 7) for b in (2, 5) for c in (3, 8)]
OWN = ("seconds", "tokens_per_second", "peak_memory_mb")


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> list[str]:
    """A model, and twelve problems of which every other one has its greedy answer by transformers for gold."""
    folder, policy = tmp_path_factory.mktemp("given"), cases.policy("tied")
    save_model(policy.model, cases.TOKENIZER, folder / "model")
    prompts = [cases.TOKENIZER(problem)["input_ids"] for problem in PROBLEMS]
    greedy = Generate(policy, cases.TOKENIZER).sample(prompts, Drawing(1, 0.0, max_new_tokens=6))
    answers = [extract(cases.TOKENIZER.decode(one.response_ids, skip_special_tokens=True)) for one in greedy]
    golds = [answer if index % 2 else "none" for index, answer in enumerate(answers)]
    assert len(set(golds[1::2]) - {None}) > 2
    rows = [{"input": problem, "target": gold or "none"} for problem, gold in zip(PROBLEMS, golds, strict=True)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["accuracy", "--model", folder / "model", "--data", folder / "sums.jsonl", "--preset", "mawps"]
    words += ["prompt_template={prompt}", "--verifier", "exact", "--device", "cpu", "--max-new-tokens", 6]
    words += ["--temperature", 1.0, "--top-p", 0.9, "--samples", 4, "--batch", 6]
    return [str(word) for word in words]


def result(path) -> dict:
    found = json.loads(path.read_text())
    return {key: value for key, value in found.items() if key not in OWN}


def test_the_engines_accuracy_is_that_of_transformers_and_a_killed_command_goes_on(given, tmp_path, monkeypatch):
    sample, calls = VllmSampler.sample, []
    monkeypatch.setattr(VllmSampler, "sample", lambda self, *given: calls.append(given) or sample(self, *given))
    vllm = ["--sampler", "vllm", "--cache-gib", "0.05"]
    assert main([*given, "--out", str(tmp_path / "generate.json")]) == 0
    assert not calls
    whole, out = tmp_path / "whole.json", tmp_path / "out.json"
    assert main([*given, *vllm, "--out", str(whole), "--answers", str(tmp_path / "whole.jsonl")]) == 0
    assert [(len(prompts), drawing.samples) for prompts, drawing in calls] == [(6, 1), (6, 4)] * 2
    theirs, ours = (result(tmp_path / name)["benchmarks"]["mawps"] for name in ("generate.json", "whole.json"))
    assert ours["greedy"] == theirs["greedy"] > 0.2
    assert 0 < ours["avg@4"] < 1
    assert result(whole)["origin"]["sampler"] == "vllm"

    ask = Asker.ask

    def dies(self, *given):
        if len(calls) == 6:
            raise RuntimeError("killed")
        return ask(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Asker, "ask", dies)
        assert main([*given, *vllm, "--out", str(out), "--answers", str(tmp_path / "out.jsonl")]) == 2
    words = [*given, "--out", str(out), "--answers", str(tmp_path / "out.jsonl"), "--resume"]
    assert main(words) == 2  # the other sampler does not go on with its answers
    assert main([*words, *vllm]) == 0
    assert len(calls) == 4 + 2 + 2
    assert result(out) == result(whole)
    assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_a_cache_of_nothing_is_refused(given, tmp_path, capsys):
    assert main([*given, "--sampler", "vllm", "--cache-gib", "0", "--out", str(tmp_path / "r.json")]) == 2
    assert "--cache-gib is refused" in capsys.readouterr().err
