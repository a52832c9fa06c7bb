"""Candidate statistics, rank analysis, named benchmarks."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.config import ConfigError, check
from ipvrm_core.trainer.evaluation.policy import accuracy
from ipvrm_core.trainer.evaluation.policy.candidate_statistics import candidate_statistics
from ipvrm_core.trainer.evaluation.reward_model.rank_analysis import Prefix, continued_prefixes, rank_auc
from ipvrm_core.trainer.evaluation.token_scores import Scorer
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.sampling.base import Sample
from ipvrm_core.trainer.sampling.verified import Asker
from ipvrm_core.trainer.verify import Verdict


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_candidate_statistics_against_softmax(tiny_model, temperature):
    model = tiny_model(3, 5.0)
    answers = [Answer([5, 6], [7, 8, 9]), Answer([4], [10, 3, 2, 11])]
    probabilities = []
    for answer in answers:
        ids = torch.tensor([answer.prompt_ids + answer.response_ids])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(answer.prompt_ids) - 1 : -1]
        probabilities.append((logits / temperature).softmax(-1))
    p_NV = torch.cat(probabilities)
    policy = LanguageModel(model, temperature=temperature, max_tokens=1000)
    found = candidate_statistics(policy, answers, [0.2, 0.05, 0.1])
    assert list(found) == ["0.2", "0.05", "0.1"]
    for p_min, row in found.items():
        member_NV = p_NV >= float(p_min)
        assert row["size"] == pytest.approx(member_NV.sum(1).double().mean().item())
        assert row["mass"] == pytest.approx((p_NV * member_NV).sum(1).mean().item(), abs=1e-5)
        assert row["several"] == pytest.approx((member_NV.sum(1) > 1).double().mean().item())
        assert row["empty"] == pytest.approx((member_NV.sum(1) == 0).double().mean().item())
    assert found["0.05"]["size"] > found["0.2"]["size"] > 0
    with pytest.raises(ValueError, match=r"P_min must be in \(0, 1\]; got \[0.0\]"):
        candidate_statistics(policy, answers, [0.1, 0.0])


def test_rank_auc_by_hand():
    """V = 2: right, right, wrong. V = -3: right, wrong, wrong. 9 pairs (right, wrong): by V 4 won, 4 tied."""
    prefixes = [Prefix(2.0, 1.0, -1.0, 2, 3), Prefix(-3.0, -0.5, -1.0, 1, 3)]
    found = rank_auc(prefixes)
    assert (found["prefixes"], found["continuations"], found["right"]) == (2, 6, 3)
    assert found["value"] == found["mean"] == pytest.approx((4 + 4 / 2) / 9)
    assert found["abs_value"] == pytest.approx((1 + 4 / 2) / 9)
    assert found["td"] == 0.5
    assert rank_auc([Prefix(1.0, 1.0, 1.0, 2, 2)])["value"] is None
    with pytest.raises(ValueError, match=r"prefix 0: right must be in 0 .. total = 2; got 3"):
        rank_auc([Prefix(1.0, 1.0, 1.0, 3, 2)])


def test_prefixes_are_continued_where_they_were_cut(tiny_experiment, tiny_model, monkeypatch):
    """Two answers of 8 and 1 tokens, cut at a quarter and a half; every continuation with an even first id is right."""
    experiment = tiny_experiment()
    examples = experiment.test_examples(2)
    prompts = [experiment.text.prompt_ids(example) for example in examples]
    whole, short = [3, 4, 5, 6, 7, 8, 9, 10], [3]
    asked = []

    class Scripted:
        def sample(self, given, drawing):
            if drawing.samples == 1:
                return [Sample(p, ids, [0.0] * len(ids), True) for p, ids in zip(given, [whole, short], strict=True)]
            asked.extend(given)
            return [Sample(p, [4 + s], [0.0], True) for p in given for s in range(drawing.samples)]

        def close(self):
            pass

    class Parity:
        def __call__(self, texts, golds):
            judged.append(texts)
            return [Verdict(experiment.text.tokenizer(text)["input_ids"][-1] % 2 == 0, "ok") for text in texts]

    judged: list = []
    monkeypatch.setattr(experiment, "sampler", lambda policy: Scripted())
    monkeypatch.setattr(experiment, "asker", Asker(experiment.text, Parity()))
    model, reference = (experiment.language_model(tiny_model(number)) for number in (1, 2))
    scorer = Scorer(experiment.text.tokenizer, model, reference)
    found = continued_prefixes(experiment, reference, scorer, examples, beta=2.0, samples=3, fractions=(0.5, 0.25))
    assert asked == [prompts[0] + whole[:2], prompts[0] + whole[:4]]  # one token has no cut
    assert [(prefix.right, prefix.total) for prefix in found] == [(2, 3), (2, 3)]
    assert judged[0][0] == experiment.text.decode([3, 4, 4])
    ids = torch.tensor([prompts[0] + whole])
    with torch.no_grad():
        logprobs = [m.model(input_ids=ids).logits[0, :-1].log_softmax(-1) for m in (model, reference)]
    q = [of_LV.gather(1, ids[0, 1:, None])[-8:, 0] for of_LV in logprobs]
    q_N = 2 * (q[0] - q[1])
    for prefix, length in zip(found, (2, 4), strict=True):
        assert prefix.value == pytest.approx(q_N[:length].sum().item(), abs=1e-3)
        assert prefix.mean == pytest.approx(q_N[:length].mean().item(), abs=1e-3)
        assert prefix.td == pytest.approx(q_N[length - 1].item(), abs=1e-3)


# ---- named benchmarks


def with_benchmarks(tmp_path, **benchmarks):
    rows = [{"prompt": f"What is {i}?", "answer": str(i), "source": "ab"[i % 2]} for i in range(5)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    data = {"path": str(path)}
    sources = {name: {**data, **extra} for name, extra in benchmarks.items()}
    return check({"model": {"path": "x"}, "data": data, "test": data, "eval": {"benchmarks": sources, "samples": 2}})


def test_benchmarks_and_their_groups(tmp_path, monkeypatch):
    from ipvrm_core.trainer.experiment import Experiment

    config = with_benchmarks(tmp_path, whole={"limit": 3}, parts={"group_column": "source"})
    seen = []

    def policy_accuracy(experiment, model, examples):
        seen.append([example.answer for example in examples])
        return {"prompts": len(examples), "greedy": len(examples) / 10, "avg@2": 0.5, "pass@2": 1.0}

    monkeypatch.setattr(accuracy, "policy_accuracy", policy_accuracy)
    found = accuracy.benchmark_accuracy(Experiment(config, tmp_path / "run"), None)
    assert list(found) == ["whole", "parts/a", "parts/b", "average"]
    assert seen == [["0", "1", "2"], ["0", "2", "4"], ["1", "3"]]
    assert found["average"] == {"greedy": pytest.approx(0.8 / 3), "avg@2": 0.5, "pass@2": 1.0}


def test_benchmarks_must_be_texts(tiny_config, tmp_path):
    with pytest.raises(ConfigError, match="benchmarks must have a path; got a task for x"):
        tiny_config(eval={"benchmarks": {"x": {"task": "chain"}}})
    with pytest.raises(ConfigError, match=r"eval.benchmarks are texts"):
        tiny_config(eval={"benchmarks": {"x": {"path": "a.jsonl"}}})
