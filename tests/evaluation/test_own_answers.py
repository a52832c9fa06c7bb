"""The starting policy's own answers: labelled by the task, and chosen among by a score."""

import json
import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from ipvrm_core.objectives.ipvrm import Ipvrm
from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.data.tasks import ChainTask
from ipvrm_core.trainer.evaluation.reward_model import own_answers
from ipvrm_core.trainer.evaluation.reward_model.judge import judge
from ipvrm_core.trainer.evaluation.reward_model.own_answers import OwnAnswers, as_traces, best_of_n, sample_own
from ipvrm_core.trainer.phases.answers import show_answers
from ipvrm_core.trainer.sampling.base import Sample
from ipvrm_core.trainer.verify import Verdict

START = torch.nn.Identity()  # the policy that wrote the answers, where only its identity matters


@pytest.fixture
def written(tiny_experiment):
    """make(answers of every prompt, N) -> (experiment, OwnAnswers) of answers written by hand."""

    def make(texts: list[list[str]], best_of=()):
        experiment = tiny_experiment(eval={"best_of_n": list(best_of)})
        task = ChainTask(min_ops=1, max_ops=2)
        examples = [example for example in task.examples(0, "test", 0, 50) if len(example.prompt) == 4][: len(texts)]
        samples, verdicts = [], []
        for example, row in zip(examples, texts, strict=True):
            right = example.solution
            for text in (text.replace("RIGHT", right).replace("VALUE", right[-1]) for text in row):
                ids = experiment.text.tokenizer(text)["input_ids"]
                samples.append(Sample([1], ids, [0.0] * len(ids), True))
                found = task.answer_of(text)
                verdicts.append(Verdict(found == example.answer, "ok" if found else "no_answer", found))
        logprobs_N = torch.zeros(sum(len(sample.response_ids) for sample in samples))
        return experiment, OwnAnswers(START, examples, len(texts[0]), samples, verdicts, logprobs_N)

    return make


def test_own_answers_become_labelled_traces(written):
    """One right; one that states the right value without its step; one that stops too early is left out."""
    experiment, own = written([["RIGHT", "#VALUE"], ["RIGHT", "1+"], ["#VALUE", "RIGHT"]])
    traces = as_traces(experiment, own, 6)
    assert [trace.label for trace in traces] == [-1, 0, -1, 0, 0, -1]  # "1+" is a malformed first step
    assert "".join(traces[0].steps) == own.examples[0].solution
    assert all(trace.final_answer_correct for trace in traces if trace.steps != ("1+",))
    assert [trace.id for trace in as_traces(experiment, own, 3)] == [example.id for example in own.examples]
    unfinished = own.examples[0].solution.rpartition("#")[0]
    experiment, own = written([[unfinished, "RIGHT"]])
    assert [trace.label for trace in as_traces(experiment, own, 2)] == [-1]


def test_pages_of_the_first_answers(written, tiny_model, tmp_path):
    """One for each answer that can be labelled, its tokens with the policy's own log-probs."""
    experiment, own = written([["RIGHT", "#VALUE"], ["RIGHT", "RIGHT#"]])
    policy = experiment.language_model(tiny_model(1))
    index = show_answers(experiment, replace(own, policy=policy), tmp_path / "answers")
    links = re.findall(r'href="([^"]+)"', index.read_text())
    assert links == sorted(path.name for path in index.parent.iterdir() if path != index)
    views = [
        json.loads(re.search(r'id="data">(.*?)</script>', (index.parent / link).read_text(), re.DOTALL)[1])
        for link in links
    ]
    assert [len(view) for view in views] == [1] * len(links)
    assert [view["label"] for (view,) in views] == [trace.label for trace in as_traces(experiment, own, 24)]
    (right,), texts = views[0], (own.examples[0].prompt, own.examples[0].solution)
    assert "".join(token["text"] for token in right["tokens"]) == texts[1]
    answer = Answer(*(experiment.text.tokenizer(text)["input_ids"] for text in texts))
    assert [token["ours"] for token in right["tokens"]] == pytest.approx(policy.logprobs([answer]).tolist(), abs=1e-5)


def test_steps_of_own_answers_are_located(written, tiny_model):
    """Where there are answers of both kinds, F1 is that of their labels; else this style is left out."""
    experiment, own = written([["RIGHT"], ["#VALUE"], ["RIGHT"]])
    models = experiment.language_model(tiny_model(1)), experiment.language_model(tiny_model(2))
    own = replace(own, policy=models[1])
    found = judge(experiment, *models, Ipvrm(), own, {})["localisation"]
    assert (found["sampled/process"]["erroneous"], found["sampled/process"]["correct"]) == (1, 2)
    assert found["sampled/process"]["accuracy_correct"] in (0, 0.5, 1)
    assert found["train/process"]["erroneous"] + found["train/process"]["correct"] == experiment.config.eval.traces
    experiment, own = written([["RIGHT"], ["RIGHT"]])
    own = replace(own, policy=models[1])
    assert set(judge(experiment, *models, Ipvrm(), own, {})["localisation"]) == {
        f"{style}/{protocol}" for style in ("train", "terse") for protocol in ("process", "prefix")
    }


def test_best_of_n_takes_the_highest_score(written, monkeypatch):
    """Scores of tokens: 1 in right answers, -1 in wrong ones, so that the best of N is right whenever any is."""
    experiment, own = written([["RIGHT", "#00", "#11", "#1"], ["#VALUE", "#VALUE", "#1+", "#2+"]], best_of=[1, 2, 4])

    def scores(_model, _objective, answers, _reference):
        return torch.cat(
            [
                torch.full((len(answer.response_ids),), sign)
                for answer, sign in zip(answers, (1.0 if v.correct else -1.0 for v in own.verdicts), strict=True)
            ]
        )

    monkeypatch.setattr(own_answers, "scores", scores)
    found = best_of_n(experiment, None, START, Ipvrm(), own)
    assert list(found) == ["1", "2", "4"]
    rights = [verdict.correct for verdict in own.verdicts]
    assert found["1"]["average"] == sum(rights) / 8
    for row in found.values():
        assert row["best:vbar"] == row["best:sum"] == row["pass"]
    assert found["4"]["pass"] == 1
    monkeypatch.setattr(own_answers, "scores", lambda *arguments: -scores(*arguments))
    assert best_of_n(experiment, None, START, Ipvrm(), own)["4"]["best:vbar"] == 0


def test_the_reference_of_the_scores(written, tiny_model):
    """The policy itself takes the log-probs that are kept; any other is asked."""
    experiment, own = written([["RIGHT", "#00"]], best_of=[2])
    start, model, other = (experiment.language_model(tiny_model(number, 2.0)) for number in (1, 2, 1))
    kept_N = start.logprobs(own.answers)
    own, first = replace(own, policy=start, logprobs_N=kept_N), slice(len(own.samples[0].response_ids))
    asked = best_of_n(experiment, model, other, Ipvrm(), own)
    assert best_of_n(experiment, model, start, Ipvrm(), own) == asked
    kept_N[first] += 1e3
    assert best_of_n(experiment, model, start, Ipvrm(), own)["2"]["best:vbar"] == 0  # the right one looks unlikely
    assert best_of_n(experiment, model, other, Ipvrm(), own) == asked
    kept_N[first] -= 2e3
    assert best_of_n(experiment, model, start, Ipvrm(), own)["2"]["best:vbar"] == 1


def test_own_answers_depend_on_the_configuration_alone(tiny_experiment, tiny_model):
    experiment = tiny_experiment(eval={"prompts": 3, "best_of_n": [2, 4]})
    policy = experiment.language_model(tiny_model(1, 2.0))
    first = sample_own(experiment, policy)
    torch.rand(5)
    again = sample_own(experiment, policy)
    assert (first.samples, first.verdicts) == (again.samples, again.verdicts)
    assert torch.equal(first.logprobs_N, again.logprobs_N)
    assert (first.per_prompt, len(first.samples), len(first.first)) == (4, 12, 3)
    assert first.first == first.samples[::4]
    prompts = [experiment.text.prompt_ids(example) for example in first.examples for _ in range(4)]
    assert [sample.prompt_ids for sample in first.samples] == prompts
    assert json.dumps([verdict.correct for verdict in first.verdicts])
