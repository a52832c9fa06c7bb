"""The page of `ipvrm inspect`: its numbers from the models' own logits, its text whole, nothing fetched."""

import json
import re

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("jinja2")

from ipvrm_core.trainer import cli
from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.evaluation.rendering import Format
from ipvrm_core.trainer.evaluation.token_scores import Scorer, token_scores
from ipvrm_core.trainer.models import add_value_head, save_model
from ipvrm_core.trainer.report.inspection import inspect, token_texts, write_page

FORM = Format(joiner=";", plain_joiner="")
PROBLEM, STEPS = "5*5-6?", ["5*5=5", "5-6=9", "#9"]


@pytest.fixture
def scorer(tiny_experiment, tiny_model):
    return Scorer(tiny_experiment().tokenizer, tiny_model(1, 4.0), tiny_model(2, 4.0))


def log_softmax(scorer):
    """log-probs [N, V] of every answer position under model and reference, and the answer's ids."""
    ids = scorer.tokenizer(PROBLEM + ";".join(STEPS))["input_ids"]
    start = len(PROBLEM)
    with torch.no_grad():
        both = [
            m(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
            for m in (scorer.model, scorer.reference)
        ]
    return *both, ids[start:]


def test_numbers_against_plain_logits(scorer):
    shown = inspect(scorer, PROBLEM, STEPS, FORM, beta=2.0, p_min=0.1, label=1, threshold=0.0)
    ours, theirs, ids = log_softmax(scorer)
    q = torch.stack([ours[n, token] - theirs[n, token] for n, token in enumerate(ids)]).double()
    tokens = shown["tokens"]
    assert "".join(token["text"] for token in tokens) == ";".join(STEPS)
    assert [token["step"] for token in tokens] == [0] * 6 + [1] * 6 + [2] * 2
    assert [token["delta"] for token in tokens] == pytest.approx((2 * q).tolist(), abs=1e-4)
    values = 2 * q.cumsum(0)
    assert [token["value"] for token in tokens] == pytest.approx(values.tolist(), abs=1e-4)
    assert [token["mean"] for token in tokens] == pytest.approx((values / torch.arange(1, 15)).tolist(), abs=1e-4)
    assert shown["sigma"] == pytest.approx(values.std(correction=0).item(), abs=1e-4)
    assert [step["process"] for step in shown["steps"]] == pytest.approx(
        [q[:6].sum().item(), q[6:12].sum().item(), q[12:].sum().item()], abs=1e-4
    )
    for n, token in enumerate(tokens):
        expected = [v for v in theirs[n].argsort(descending=True).tolist() if theirs[n, v].exp() >= 0.1]
        assert [item["id"] for item in token["candidates"]] == expected
        for item in token["candidates"]:
            assert item["text"] == scorer.tokenizer.decode([item["id"]])
            assert item["theirs"] == pytest.approx(theirs[n, item["id"]].item(), abs=1e-4)
            assert item["delta"] == pytest.approx(2 * (ours - theirs)[n, item["id"]].item(), abs=1e-4)


def test_log_probs_alone(scorer):
    """Without a reference: delta = beta decay^(t-1) log pi, of the model's own candidates too."""
    alone = scorer._replace(reference=None, decay=0.9)
    shown = inspect(alone, PROBLEM, STEPS, FORM, beta=2.0, p_min=0.1)
    ours, _, ids = log_softmax(scorer)
    scale = 2 * 0.9 ** torch.arange(len(ids))
    expected = torch.stack([ours[n, token] for n, token in enumerate(ids)]) * scale
    tokens = shown["tokens"]
    assert shown["kind"] == "log-prob"
    assert [token["delta"] for token in tokens] == pytest.approx(expected.tolist(), abs=1e-4)
    assert [token["value"] for token in tokens] == pytest.approx(expected.cumsum(0).tolist(), abs=1e-4)
    assert shown["steps"][0]["process"] == pytest.approx(expected[:6].sum().item() / 2, abs=1e-4)
    for n, token in enumerate(tokens):
        own = [v for v in ours[n].argsort(descending=True).tolist() if ours[n, v].exp() >= 0.1]
        assert [item["id"] for item in token["candidates"]] == own
        for item in token["candidates"]:
            assert item["theirs"] is None
            assert item["delta"] == pytest.approx((scale[n] * ours[n, item["id"]]).item(), abs=1e-4)


def test_a_value_head(scorer):
    """The head's outputs are the values; the mean so far is what training compares; no candidates, no sigma."""
    head = add_value_head(scorer.model)
    torch.nn.init.normal_(head.weight)
    alone = scorer._replace(reference=None)
    shown = inspect(alone, PROBLEM, STEPS, FORM, beta=2.0, threshold=0.0)
    ids = scorer.tokenizer(PROBLEM + ";".join(STEPS))["input_ids"]
    z = token_scores(alone, [Answer(ids[: len(PROBLEM)], ids[len(PROBLEM) :])], 100)[0].double()
    tokens = shown["tokens"]
    assert shown["kind"] == "value"
    assert [token["value"] for token in tokens] == pytest.approx((2 * z).tolist(), abs=1e-4)
    assert [token["mean"] for token in tokens] == pytest.approx(
        (2 * z.cumsum(0) / torch.arange(1, 15)).tolist(), abs=1e-4
    )
    assert shown["steps"][1]["process"] == pytest.approx(z[6:12].sum().item(), abs=1e-4)
    assert not any(token["candidates"] for token in tokens)
    assert shown["sigma"] is None
    with pytest.raises(ValueError, match=r"sigma scales TD errors, and a value head gives values; got 2.0"):
        inspect(alone, PROBLEM, STEPS, FORM, sigma=2.0)


def test_a_long_text_is_refused(scorer):
    scorer.reference.config.max_position_embeddings = 20
    with pytest.raises(ValueError, match="the text: 21 tokens, more than the 20 that the model has positions for"):
        inspect(scorer, "1" + PROBLEM, STEPS, FORM)


def test_bytes_of_one_character():
    assert token_texts("xaé b", [(1, 2), (2, 3), (2, 3), (3, 5)]) == ["a", "é", "", " b"]


def test_the_page_is_whole_and_safe(scorer, tmp_path):
    shown = inspect(scorer, PROBLEM, STEPS, FORM, sigma=3.0)
    shown["problem"] = "a </script><b> & 'c'"
    path = tmp_path / "deep" / "page.html"
    write_page(path, shown, "<title>")
    page = path.read_text()
    assert "&lt;title&gt;" in page
    assert "a </script><b>" not in page
    embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(embedded) == json.loads(json.dumps(shown))
    assert not re.search(r"(src|href)\s*=|https?://(?!www\.w3\.org/2000/svg)|@import|url\(", page)


def test_bad_sigma(scorer):
    with pytest.raises(ValueError, match="sigma must be > 0; got 0"):
        inspect(scorer._replace(reference=scorer.model), PROBLEM, STEPS, FORM)


@pytest.mark.parametrize("kind", ["log-ratio", "log-prob", "value"])
def test_the_command(scorer, tmp_path, capsys, kind):
    if kind == "value":
        torch.nn.init.normal_(add_value_head(scorer.model).weight)
    for name, part in (("model", scorer.model), ("reference", scorer.reference)):
        save_model(part, scorer.tokenizer, tmp_path / name)
    (tmp_path / "answer.txt").write_text(";".join(STEPS) + "\n")
    words = ["inspect", "--model", str(tmp_path / "model"), "--device", "cpu", "--joiner", ";", "--plain-joiner", ""]
    words += ["--out", str(tmp_path / "page.html")]
    words += ["--reference", str(tmp_path / "reference")] if kind == "log-ratio" else []
    assert cli.main([*words, "--problem", PROBLEM, "--answer", f"@{tmp_path / 'answer.txt'}"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert '"step": 2' in page
    said = {
        "log-ratio": ["log-ratios q of reward model to reference", "β = 10,", "reference probability ≥ 0.05"],
        "log-prob": ["log-probs of the model itself, without a reference (EndoRM)", "d = 0.95", "β = 1,"],
        "value": ["outputs z of the model's value head", "so there are no candidates", "β = 1;"],
    }
    assert {each for each in said if all(text in page for text in said[each])} == {kind}
    assert cli.main([*words, "--problem", PROBLEM]) == 2
    assert "pass either --problem and --answer, or --data and --id" in capsys.readouterr().err
