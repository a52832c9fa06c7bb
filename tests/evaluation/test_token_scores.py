"""Token scores of the three kinds of reward models against plain logits and hidden states; what is refused."""

import pytest
import torch

pytest.importorskip("transformers")

from ipvrm_core.objectives.endorm import Endorm
from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.evaluation import token_scores as module
from ipvrm_core.trainer.evaluation.token_scores import (
    check_vocabulary,
    load_language_model,
    load_scorer,
    scored_batches,
    token_scores,
)
from ipvrm_core.trainer.models import add_value_head, character_tokenizer, load
from tests import tiny_models
from tests.tiny_models import log_ratio_scorer, model, plain_scores, saved, scorer_of, tokenizer, value_model

KINDS = ("log-ratio", "log-prob", "value")
ANSWERS = [Answer([4, 5, 6], [7, 8]), Answer([9, 3], [5, 6, 7, 8, 9, 10]), Answer([5], [6, 7, 8, 9])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_tokens", [10, 100])
def test_against_plain_forward_passes(kind, max_tokens):
    scorer = scorer_of(kind)
    found = token_scores(scorer, ANSWERS, max_tokens)
    batches = [indices for indices, _ in scored_batches(scorer, ANSWERS, max_tokens)]
    assert batches == ([[1], [0, 2]] if max_tokens == 10 else [[1, 0, 2]])  # the longest alone, the others padded to 5
    for answer, score_N in zip(ANSWERS, found, strict=True):
        expected = plain_scores(scorer, [*answer.prompt_ids, *answer.response_ids], len(answer.prompt_ids))
        assert score_N.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
        assert score_N.dtype == torch.float32


def test_stopping_and_going_on_gives_the_same_micro_batches():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 12, (2, 40), generator=generator).tolist()
    answers = [Answer([4] * p, list(range(5, 5 + r))) for p, r in zip(*lengths, strict=True)]
    scorer = scorer_of("log-prob")
    whole = [[answers[i] for i in indices] for indices, _ in scored_batches(scorer, answers, 60)]
    for stop in (1, 3, len(whole) - 1):
        done = [id(answer) for batch in whole[:stop] for answer in batch]
        left = [answer for answer in answers if id(answer) not in done]
        assert [[left[i] for i in indices] for indices, _ in scored_batches(scorer, left, 60)] == whole[stop:]


def test_loading_each_kind(tmp_path):
    paths = saved(tmp_path, model=model(1), reference=model(2), head=value_model(3))
    loaded = {
        "log-ratio": load_scorer(paths["model"], paths["reference"], device="cpu"),
        "log-prob": load_scorer(paths["model"], device="cpu"),
        "value": load_scorer(paths["head"], device="cpu"),
    }
    assert {kind: scorer.kind for kind, scorer in loaded.items()} == {kind: kind for kind in KINDS}
    assert loaded["log-prob"].decay == Endorm().decay < 1
    assert load_scorer(paths["model"], decay=0.5, device="cpu").decay == 0.5
    assert loaded["log-ratio"].decay == 1
    ids = list(range(4, 12))
    for scorer in loaded.values():
        score_N = token_scores(scorer, [Answer(ids[:3], ids[3:])], 100)[0]
        assert score_N.tolist() == pytest.approx(plain_scores(scorer, ids, 3).tolist(), abs=1e-4)
    with pytest.raises(ValueError, match=r"head scores by its value head, which takes no reference; got .*reference"):
        load_scorer(paths["head"], paths["reference"], device="cpu")
    with pytest.raises(ValueError, match="head scores by a value head; expected a language model, for its log-probs"):
        load_scorer(paths["model"], paths["head"], device="cpu")
    with pytest.raises(ValueError, match="expected a language model"):
        load_language_model(paths["head"], device="cpu")
    with pytest.raises(ValueError, match=r"a model's own log-probs; got 0.5 with the reference .*reference"):
        load_scorer(paths["model"], paths["reference"], decay=0.5, device="cpu")
    with pytest.raises(ValueError, match=r"a model's own log-probs; got 0.5 with a value head"):
        load_scorer(paths["head"], decay=0.5, device="cpu")
    with pytest.raises(ValueError, match=r"decay must be in \(0, 1\]; got 2.0"):
        load_scorer(paths["model"], decay=2.0, device="cpu")


def test_another_vocabulary_is_refused():
    check_vocabulary(tokenizer(), tokenizer())
    with pytest.raises(ValueError, match="same vocabulary; got 41 and 4 tokens"):
        check_vocabulary(tokenizer(), character_tokenizer("ab"))


def test_scores_that_say_nothing_are_refused(monkeypatch):
    scorer = log_ratio_scorer()
    with pytest.raises(ValueError, match="all log-ratios are 0: model and reference have the same weights"):
        token_scores(scorer._replace(reference=scorer.model), ANSWERS, 100)
    untrained = model(1)
    add_value_head(untrained)
    with pytest.raises(ValueError, match="all values are 0: the value head was never trained"):
        token_scores(tiny_models.scorer(untrained), ANSWERS, 100)
    monkeypatch.setattr(module, "_scores", lambda *_, **how: torch.tensor([1.0, float("nan"), float("inf")]))
    with pytest.raises(ValueError, match="token scores must be finite; 2 of 3 are not"):
        token_scores(scorer, ANSWERS, 100)


def test_a_gguf_file_without_its_package(monkeypatch):
    monkeypatch.setattr(load, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"a\.gguf needs the package gguf.*pip install 'ipvrm-core\[gguf\]'"):
        load_language_model("folder/a.gguf")
