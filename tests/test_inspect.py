"""The page of `ipvrm inspect`: its numbers from the models' own logits, its text whole, nothing fetched."""

import json
import re

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("jinja2")

from ipvrm_core.trainer import cli
from ipvrm_core.trainer.evaluation.log_ratios import Pair
from ipvrm_core.trainer.evaluation.rendering import Format
from ipvrm_core.trainer.models import save_model
from ipvrm_core.trainer.report.inspection import inspect, token_texts, write_page

FORM = Format(joiner=";", plain_joiner="")
PROBLEM, STEPS = "5*5-6?", ["5*5=5", "5-6=9", "#9"]


@pytest.fixture
def pair(tiny_experiment, tiny_model):
    return Pair(tiny_experiment().tokenizer, tiny_model(1, 4.0), tiny_model(2, 4.0))


def log_softmax(pair):
    """log-probs [N, V] of every answer position under model and reference, and the answer's ids."""
    ids = pair.tokenizer(PROBLEM + ";".join(STEPS))["input_ids"]
    start = len(PROBLEM)
    with torch.no_grad():
        both = [
            m(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
            for m in (pair.model, pair.reference)
        ]
    return *both, ids[start:]


def test_numbers_against_plain_logits(pair):
    shown = inspect(pair, PROBLEM, STEPS, FORM, beta=2.0, p_min=0.1, label=1, threshold=0.0)
    ours, theirs, ids = log_softmax(pair)
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
            assert item["text"] == pair.tokenizer.decode([item["id"]])
            assert item["theirs"] == pytest.approx(theirs[n, item["id"]].item(), abs=1e-4)
            assert item["delta"] == pytest.approx(2 * (ours - theirs)[n, item["id"]].item(), abs=1e-4)


def test_bytes_of_one_character():
    assert token_texts("xaé b", [(1, 2), (2, 3), (2, 3), (3, 5)]) == ["a", "é", "", " b"]


def test_the_page_is_whole_and_safe(pair, tmp_path):
    shown = inspect(pair, PROBLEM, STEPS, FORM, sigma=3.0)
    shown["problem"] = "a </script><b> & 'c'"
    path = tmp_path / "deep" / "page.html"
    write_page(path, shown, "<title>")
    page = path.read_text()
    assert "&lt;title&gt;" in page
    assert "a </script><b>" not in page
    embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(embedded) == json.loads(json.dumps(shown))
    assert not re.search(r"(src|href)\s*=|https?://(?!www\.w3\.org/2000/svg)|@import|url\(", page)


def test_bad_sigma(pair):
    with pytest.raises(ValueError, match="sigma must be > 0; got 0"):
        inspect(pair._replace(reference=pair.model), PROBLEM, STEPS, FORM)


def test_the_command(pair, tmp_path, capsys):
    for name, part in (("model", pair.model), ("reference", pair.reference)):
        save_model(part, pair.tokenizer, tmp_path / name)
    (tmp_path / "answer.txt").write_text(";".join(STEPS) + "\n")
    words = ["inspect", "--model", str(tmp_path / "model"), "--reference", str(tmp_path / "reference")]
    words += ["--device", "cpu", "--joiner", ";", "--plain-joiner", "", "--out", str(tmp_path / "page.html")]
    assert cli.main([*words, "--problem", PROBLEM, "--answer", f"@{tmp_path / 'answer.txt'}"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    assert '"step": 2' in (tmp_path / "page.html").read_text()
    assert cli.main([*words, "--problem", PROBLEM]) == 2
    assert "pass either --problem and --answer, or --data and --id" in capsys.readouterr().err
