"""A reward model's scores of stored answers, of those that are too long in particular."""

import pytest

pytest.importorskip("transformers")

from ipvrm_core.trainer.evaluation.lengths import length_status, refuse_long
from ipvrm_core.trainer.evaluation.policy.stored_answers import Stored
from ipvrm_core.trainer.evaluation.reward_model.score_answers import score_stored
from ipvrm_core.trainer.text.steps import Format
from tests.tiny_models import TEMPLATE, log_ratio_scorer, plain_scores, scorer_of, tokenizer


@pytest.fixture(scope="module")
def scorer():
    return log_ratio_scorer()


@pytest.mark.parametrize("closing", ["<e>\n", "<eos>\n"])
def test_scores_of_stored_answers(scorer, closing):
    """ "<eos>" is the EOS token, which belongs to the answer; "<e>" is only text of the template."""
    template = TEMPLATE.replace("<e>\n", closing)
    stored = {"p": Stored(prompts=["1+2?"] * 2, texts=["1+2=3.\n\nso 3", " 5\n"])}
    score_stored(scorer._replace(tokenizer=tokenizer(template)), stored, Format(), 2.0, 1000, None)
    scores = stored["p"].scores
    head = f"<u>1+2?{closing}<a>"
    ids = scorer.tokenizer(f"{head}1+2=3.\n\nso 3{closing}")["input_ids"]
    start = len(scorer.tokenizer(head)["input_ids"])
    q = plain_scores(scorer, ids, start)[: 12 + (closing == "<eos>\n")]
    assert scores["sum"][0] == pytest.approx(2 * q.sum(), abs=1e-3)
    assert scores["vbar"][0] == pytest.approx(2 * q.mean(), abs=1e-3)
    steps = [2 * q[:8].sum(), 2 * q[8:12].sum()]
    assert scores["min_step"][0] == pytest.approx(min(steps), abs=1e-3)
    assert scores["last_step"][0] == pytest.approx(steps[1], abs=1e-3)
    assert len(scores["sum"]) == 2


def test_stored_answers_that_cannot_be_scored(scorer):
    with pytest.raises(ValueError, match="problem 'p', answer 1: the answer is empty"):
        score_stored(scorer, {"p": Stored(prompts=["1"] * 2, texts=["2", " \n"])}, Format(), 1.0, 1000, None)
    long = {"p": Stored(prompts=["1"] * 2, texts=["2", "23"])}
    message = r"2 of 2 answers have more than 5 tokens, the longest 13 \(problem 'p', answer 1\): pass --too-long skip"
    with pytest.raises(ValueError, match=message):
        score_stored(scorer, long, Format(), 1.0, 1000, 5)
    with pytest.raises(ValueError, match="no answer was scored: all 2 are too long"):
        score_stored(scorer, long, Format(), 1.0, 1000, 5, "truncate")


@pytest.mark.parametrize("kind", ["log-ratio", "log-prob", "value"])
def test_long_answers(kind):
    """ "<u>1?<e>\\n<a>" is 12 tokens; a limit of 18 leaves 6 of the first answer, one in its second step."""
    scorer, prompts, texts = scorer_of(kind), ["1?"] * 3, ["1+2\n\nso 3\n\n7", "5", "1+2\n\n6"]
    whole, skipped, cut = ({"p": Stored(prompts=prompts, texts=texts)} for _ in range(3))
    score_stored(scorer, whole, Format(), 3.0, 1000, None)
    assert score_stored(scorer, skipped, Format(), 3.0, 1000, 18, "skip") == {"p": ["too_long", "ok", "ok"]}
    assert score_stored(scorer, cut, Format(), 3.0, 1000, 18, "truncate") == {"p": ["truncated", "ok", "ok"]}
    for name, values in whole["p"].scores.items():
        assert skipped["p"].scores[name] == [None, *map(pytest.approx, values[1:])]
        assert cut["p"].scores[name][1:] == list(map(pytest.approx, values[1:]))
    ids = scorer.tokenizer("<u>1?<e>\n<a>1+2\n\ns")["input_ids"]
    q = 3 * plain_scores(scorer, ids, 12)
    assert len(q) == 6
    expected = {"vbar": q.mean(), "sum": q.sum(), "min_step": min(q[:5].sum(), q[5]), "last_step": q[5]}
    assert {name: values[0] for name, values in cut["p"].scores.items()} == pytest.approx(expected, abs=1e-3)


def test_what_is_too_long():
    texts = [("a", 2, 4), ("b", 4, 5), ("c", 6, 6)]
    assert length_status(texts, 6, "refuse") == length_status(texts, None, "refuse") == ["ok"] * 3
    assert length_status(texts, 4, "skip") == ["ok", "too_long", "too_long"]
    assert length_status(texts, 3, "truncate") == ["truncated", "too_long", "too_long"]
    with pytest.raises(ValueError, match=r"2 of 3 texts have more than 4 tokens, the longest 6 \(c\): pass --too-long"):
        length_status(texts, 4, "refuse")
    refuse_long("a", 4, None)
    refuse_long("a", 4, 4)
    with pytest.raises(ValueError, match="a: 5 tokens, more than the 4 that the model has positions for"):
        refuse_long("a", 5, 4)
