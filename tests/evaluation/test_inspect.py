"""The page of `ipvrm inspect`: its numbers from the models' own logits, its text whole, nothing fetched."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("jinja2")

from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.commands import main as cli
from ipvrm_core.trainer.evaluation.reward_model.inspection import inspect, token_texts
from ipvrm_core.trainer.evaluation.token_scores import Scorer, token_scores
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.models import add_value_head, save_model
from ipvrm_core.trainer.report.inspect_page import write_page
from ipvrm_core.trainer.text.steps import Format

FORM = Format(joiner=";", plain_joiner="")
PROBLEM, STEPS = "5*5-6?", ["5*5=5", "5-6=9", "#9"]


@pytest.fixture
def scorer(tiny_experiment, tiny_model):
    models = (LanguageModel(tiny_model(number, 4.0)) for number in (1, 2))
    return Scorer(tiny_experiment().text.tokenizer, *models)


def log_softmax(scorer):
    """log-probs [N, V] of every answer position under model and reference, and the answer's ids."""
    ids = scorer.tokenizer(PROBLEM + ";".join(STEPS))["input_ids"]
    start = len(PROBLEM)
    with torch.no_grad():
        both = [
            m.model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
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
    assert shown["predicted"] == next((k for k, step in enumerate(shown["steps"]) if step["process"] < 0), -1)
    entropies = -(theirs.exp() * theirs).sum(1)
    assert [token["entropy"] for token in tokens] == pytest.approx(entropies.tolist(), abs=1e-4)
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
    head = add_value_head(scorer.model.model)
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
    scorer.reference.model.config.max_position_embeddings = 20
    with pytest.raises(ValueError, match="the text: 21 tokens, more than the 20 that the model has positions for"):
        inspect(scorer, "1" + PROBLEM, STEPS, FORM)


def test_bytes_of_one_character():
    assert token_texts("xaé b", [(1, 2), (2, 3), (2, 3), (3, 5)]) == ["a", "é", "", " b"]


def test_the_page_is_whole_and_safe(scorer, tmp_path):
    shown = inspect(scorer, PROBLEM, STEPS, FORM, sigma=3.0)
    shown["problem"] = "a </script><b> & 'c'"
    path = tmp_path / "deep" / "page.html"
    write_page(path, [shown], "<title>")
    page = path.read_text()
    assert "&lt;title&gt;" in page
    assert "a </script><b>" not in page
    embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(embedded) == json.loads(json.dumps([shown]))
    assert not re.search(r"(src|href)\s*=|https?://(?!www\.w3\.org/2000/svg)|@import|url\(", page)


def test_bad_sigma(scorer):
    with pytest.raises(ValueError, match="sigma must be > 0; got 0"):
        inspect(scorer._replace(reference=scorer.model), PROBLEM, STEPS, FORM)


@pytest.mark.parametrize("kind", ["log-ratio", "log-prob", "value"])
def test_the_command(scorer, tmp_path, capsys, kind):
    if kind == "value":
        torch.nn.init.normal_(add_value_head(scorer.model.model).weight)
    for name, part in (("model", scorer.model), ("reference", scorer.reference)):
        save_model(part.model, scorer.tokenizer, tmp_path / name)
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
    assert "pass either --problem and --answer, or --data, with --id" in capsys.readouterr().err


@pytest.fixture
def words(scorer, tmp_path):
    """The command's models and the format of the chain task."""
    for name, part in (("model", scorer.model), ("reference", scorer.reference)):
        save_model(part.model, scorer.tokenizer, tmp_path / name)
    models = ["--model", str(tmp_path / "model"), "--reference", str(tmp_path / "reference"), "--device", "cpu"]
    return ["inspect", *models, "--joiner", ";", "--plain-joiner", ""]


def test_the_page_names_models_and_threshold(words, tmp_path):
    page = tmp_path / "page.html"
    texts = ["--problem", PROBLEM, "--answer", ";".join(STEPS)]
    assert cli.main([*words, *texts, "--threshold", "-2.5", "--out", str(page)]) == 0
    text = page.read_text()
    assert f"{tmp_path / 'model'} against {tmp_path / 'reference'}" in text
    assert "threshold -2.5: the first step whose process score is below it is predicted wrong" in text
    assert cli.main([*words, *texts, "--other-answer", "5*5=6;#1", "--out", str(page)]) == 0
    views = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)[1])
    assert [[len(view["steps"]), view["model"]] for view in views] == [[3, words[2]], [2, words[2]]]
    other = ["--other-model", words[4], "--other-reference", words[2], "--other-threshold", "1"]
    assert cli.main([*words, *texts, *other, "--out", str(page)]) == 0
    views = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)[1])
    assert [[view["model"], view["threshold"]] for view in views] == [[words[2], None], [words[4], 1.0]]
    deltas = [[token["delta"] for token in view["tokens"]] for view in views]
    assert deltas[0] == pytest.approx([-delta for delta in deltas[1]], abs=1e-3)


def test_an_index_of_many_problems(words, tmp_path, capsys):
    rows = [{"problem": PROBLEM, "steps": STEPS[: 2 + i], "label": 1 - 2 * i, "id": f"p{i}"} for i in (0, 1)]
    (tmp_path / "chains.json").write_text(json.dumps(rows))
    words = [*words, "--data", str(tmp_path / "chains.json")]
    assert cli.main([*words, "--threshold", "1e6", "--out", str(tmp_path / "pages")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "pages/index.html")
    index = (tmp_path / "pages/index.html").read_text()
    assert '<a href="00001.html">p0</a>' in index
    assert '<a href="00002.html">p1</a>' in index
    assert "finds 0 of 2" in index  # at this threshold the first step is wrong throughout
    assert re.findall(r'<td class="miss">(.*?)</td>', index) == ["1", "1"]
    assert 'href="index.html"' in (tmp_path / "pages/00002.html").read_text()
    assert cli.main([*words, "--id", "p1", "--out", str(tmp_path / "p1.html")]) == 0
    assert "<h1>p1 · </h1>" in (tmp_path / "p1.html").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "x", "--out", "a.html"], "--out must be a folder, for many problems (--id shows one); got a.html"),
        (["--data", "x", "--id", "y", "--out", "a"], "--out must be a page, FILE.html; got a"),
        (["--data", "x", "--id", "y", "--limit", "3", "--out", "a.html"], "--limit is of many problems"),
        (["--data", "x", "--problem", "p", "--answer", "a", "--out", "a.html"], "pass either --problem and --answer"),
        (["--data", "x", "--other-id", "y", "--out", "a"], "--other-id needs --id"),
        (["--data", "x", "--other-reference", "y", "--out", "a"], "--other-reference needs --other-model"),
        (
            ["--data", "x", "--id", "y", "--other-id", "z", "--other-model", "m", "--out", "a.html"],
            "two models or of two",
        ),
    ],
)
def test_errors_of_the_command(more, message, capsys):
    assert cli.main(["inspect", "--model", "m", *more]) == 2
    assert message in capsys.readouterr().err


# ---- the page's own script, in node with as much of a browser as it uses

BROWSER = Path(__file__).parents[1] / "browser.js"


def shown_in_node(tmp_path, views, hash=""):
    if shutil.which("node") is None:
        pytest.skip("needs node")
    write_page(tmp_path / "page.html", views, "t")
    command = ["node", str(BROWSER), str(tmp_path / "page.html"), hash]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_the_script_draws_two_models(scorer, tmp_path):
    views = [
        inspect(each, PROBLEM, STEPS, FORM, label=1, threshold=1e6)
        for each in (scorer, Scorer(scorer.tokenizer, scorer.reference, scorer.model))
    ]
    found = shown_in_node(tmp_path, views, "#8")
    assert found["numbers"] == found["steps"] == ["1", "2", "3"]  # as the tokens, from 1
    assert found["heads"] == ["Token 8 of 14, step 2 -"] * 2
    assert found["clicked"] == ["Token 4 of 14, step 1 ="] * 2  # the same answer: both show the same token
    assert found["hash"] == "#4"
    assert sorted(found["flags"]) == ["first wrong step", "predicted wrong"]
    value, mean = found["ticks"]
    assert "0" in value
    assert len(value) >= 3
    assert mean == ["0%", "50%", "100%"]
    assert {name: entry[0] for name, entry in found["colours"].items()} == {
        "advantage": "TD advantage",
        "ratio": "log-ratio",
        "ours": "π_φ",
        "theirs": "π_ref",
        "entropy": "entropy",
        "value": "value",
    }
    drawn = [tuple(entry[1]) for entry in found["colours"].values()]
    assert all(len(row) == 14 and all(colour.startswith("rgba(var(--") for colour in row) for row in drawn)
    assert len(set(drawn)) == 5  # advantage and log-ratio differ by a factor alone
    assert found["colours"]["ours"][1] == found["colours"]["theirs"][2]


@pytest.mark.parametrize("kind", ["log-prob", "value"])
def test_the_script_draws_other_kinds(scorer, tmp_path, kind):
    if kind == "value":
        torch.nn.init.normal_(add_value_head(scorer.model.model).weight)
    found = shown_in_node(tmp_path, [inspect(scorer._replace(reference=None), PROBLEM, STEPS, FORM)])
    names = {"log-prob": ["advantage", "ours", "entropy", "value"], "value": ["value"]}[kind]
    assert list(found["colours"]) == names
    assert found["heads"][0] == "Token 1 of 14, step 1 5"
