"""`ipvrm processbench`, `best-of-n` and `candidates` on saved models of every kind, and killed half-way."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")

from ipvrm_core.trainer import files
from ipvrm_core.trainer.commands import main as cli
from ipvrm_core.trainer.evaluation import token_scores
from ipvrm_core.trainer.evaluation.processbench.files import read_scores
from tests.tiny_models import ROWS, made_up, model, saved, value_model

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
SAID = {
    "log-ratio": "Scores: log-ratios of {model} to {reference}.",
    "log-prob": "Scores: log-probs of {model} itself, without a reference, decay 0.9 a token.",
    "value": "Scores: outputs of the value head of {head}.",
}

# A process that kills itself when it is about to give its n-th finished file its name.
KILLED_AT_REPLACE = """
import os, signal, sys
replace, left = os.replace, [int(sys.argv.pop(1))]
def killing(source, target):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = killing
from ipvrm_core.trainer.commands.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("models"), model=model(1), reference=model(2), head=value_model(3))


def of_kind(kind, paths):
    return {
        "log-ratio": ["--model", paths["model"], "--reference", paths["reference"]],
        "log-prob": ["--model", paths["model"], "--decay", "0.9"],
        "value": ["--model", paths["head"]],
    }[kind] + ["--device", "cpu"]


def test_processbench_from_problems_to_tables(paths, tmp_path, capsys):
    made_up(tmp_path / "data")
    made_up(tmp_path / "data", name="math")
    words = ["processbench", *of_kind("log-ratio", paths), "--data", str(tmp_path / "data")]
    words += ["--resamples", "20", "--official"]
    out = tmp_path / "out"
    assert cli.main([*words, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "| process | from gsm8k |" in printed
    assert "| process | official |" in printed
    result = json.loads((out / "results.json").read_text())
    assert result["origin"]["format"]["step"] == "Step {number}: {step}"
    assert result["counts"]["math"]["problems"] == 4
    # Without the model, the same numbers.
    assert cli.main(["processbench", "--rescore", str(out), "--resamples", "20"]) == 0
    assert capsys.readouterr().out == printed
    # Old scores are neither overwritten nor mixed with others.
    assert cli.main([*words, "--out", str(out)]) == 2
    assert "already has scores (gsm8k.parquet); pass --resume" in capsys.readouterr().err
    (out / "math.parquet").unlink()
    assert cli.main([*words, "--out", str(out), "--resume"]) == 0
    assert capsys.readouterr().out == printed
    assert cli.main([*words, "--out", str(out), "--resume", "--limit", "2"]) == 2
    assert "holds scores made in another way (limit)" in capsys.readouterr().err
    other = ["processbench", *of_kind("value", paths), "--data", str(tmp_path / "data"), "--out", str(out), "--resume"]
    assert cli.main(other) == 2
    assert "in another way (score, model, reference, format, official)" in capsys.readouterr().err


@pytest.mark.parametrize("kind", SAID)
def test_processbench_says_what_the_scores_are(kind, paths, tmp_path, capsys):
    words = ["processbench", *of_kind(kind, paths), "--data", str(made_up(tmp_path / "data")), "--resamples", "0"]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(SAID[kind].format(**paths) + "\n")
    assert SAID[kind].format(**paths) in printed.err  # before the scoring, too
    origin = read_scores([tmp_path / "out"])[1]
    assert origin["score"] == kind
    assert origin["decay"] == (0.9 if kind == "log-prob" else None)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["origin"] == origin


def test_processbench_killed_within_a_subset_goes_on(paths, tmp_path, monkeypatch):
    """12 problems, two a micro-batch: six parts. Killed before the third has its name, then before the whole has."""
    made_up(tmp_path / "data", [{**row, "steps": [*row["steps"], "5" * n]} for n in (1, 2, 3) for row in ROWS])
    words = ["processbench", *of_kind("value", paths), "--data", str(tmp_path / "data"), "--micro-batch-tokens", "70"]
    words += ["--resamples", "0", "--out"]
    assert cli.main([*words, str(tmp_path / "whole")]) == 0
    out = tmp_path / "killed"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_AT_REPLACE, "3", *words, str(out)], env=ENVIRONMENT, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [len(read_scores([part])[0]) for part in sorted((out / "gsm8k.parts").glob("*.parquet"))] == [2, 2]
    assert not (out / "gsm8k.parquet").exists()
    assert cli.main([*words, str(out)]) == 2  # not without --resume

    scored, replace, plain = [], os.replace, token_scores._scores

    def counted(scorer, answers, **how):
        scored.append(len(answers))
        return plain(scorer, answers, **how)

    monkeypatch.setattr(token_scores, "_scores", counted)

    def failing(source, target):
        if target == out / "gsm8k.parquet":
            raise OSError("killed")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", failing)
        assert cli.main([*words, str(out), "--resume"]) == 2
    assert scored == [2] * 4
    assert cli.main([*words, str(out), "--resume"]) == 0
    assert scored == [2] * 4  # all of it was in the parts
    assert not (out / "gsm8k.parts").exists()
    for name in ("gsm8k.parquet", "results.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_processbench_does_not_go_on_with_other_data_or_weights(paths, tmp_path, capsys):
    """Behind the same paths: a label, then the weights."""
    model_path = tmp_path / "model"
    shutil.copytree(paths["head"], model_path)
    data, out = made_up(tmp_path / "data"), tmp_path / "out"
    words = ["processbench", "--model", str(model_path), "--data", str(data), "--out", str(out), "--device", "cpu"]
    words += ["--resamples", "0", "--resume"]
    assert cli.main(words) == 0
    before = data.read_text()
    data.write_text(before.replace('"label": 0', '"label": 1'))
    capsys.readouterr()
    assert cli.main(words) == 2
    assert "gsm8k.parquet holds scores of other data (contents of gsm8k.json)" in capsys.readouterr().err
    data.write_text(before)
    assert cli.main(words) == 0
    shutil.copytree(saved(tmp_path, other=value_model(4))["other"], model_path, dirs_exist_ok=True)
    assert cli.main(words) == 2
    assert (
        "made in another way (contents of model/model.safetensors, model/value_head.safetensors)"
        in capsys.readouterr().err
    )
    assert cli.main([*words, "--columns", "problem=problem"]) == 2
    assert "holds scores of other data (columns)" in capsys.readouterr().err


def test_processbench_leaves_bad_rows_out_by_choice(paths, tmp_path, capsys):
    rows = [{"question": row["problem"], "wrong": row["label"] + 1, "steps": row["steps"]} for row in ROWS]
    data = tmp_path / "mine.jsonl"
    data.write_text("\n".join(map(json.dumps, [*rows, {**rows[0], "wrong": 9}, {**rows[0], "question": ""}])))
    words = ["processbench", "--model", paths["head"], "--data", str(data), "--device", "cpu", "--resamples", "0"]
    words += ["--out", str(tmp_path / "out"), "--first-step", "1", "--columns", "problem=question", "label=wrong"]
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert "2 rows cannot be used" in error
    assert "row 4: label must be -1 or 0 (all right) or a step, 1 .. 2; got 9" in error
    assert cli.main([*words, "--bad-rows", "skip"]) == 0
    printed = capsys.readouterr()
    assert "left out: " in printed.err
    assert "mine: 2 rows left out\n" in printed.out
    assert "mine: 4 problems, 2 erroneous, 2 correct" in printed.out
    assert json.loads((tmp_path / "out" / "results.json").read_text())["sources"]["mine"]["skipped"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "scoring needs --model, --data, --out; or pass --rescore"),
        (["--rescore", "x", "--model", "y"], "takes no --model"),
        (["--rescore", "x", "--reference", "y", "--decay", "0.0"], "takes no --reference, --decay"),
        (["--rescore", "/nowhere"], "no score files"),
        (["--rescore", "x", "--limit", "0"], "--limit must be >= 1; got 0"),
        (["--rescore", "x", "--resamples", "-1"], "--resamples must be >= 0; got -1"),
        (["--model", "x", "--data", "y", "--out", "z", "--official"], "scores log-ratios: it needs --reference"),
    ],
)
def test_errors_of_processbench(words, message, capsys):
    assert cli.main(["processbench", *words]) == 2
    assert message in capsys.readouterr().err


ANSWERS = [
    {"problem": "1?", "text": "1+2\n\n3", "answer": "3", "correct": True},
    {"problem": "1?", "text": "5+5+5+5\n\n3", "answer": "3", "correct": True},
    {"problem": "1?", "text": "6\n\n4", "answer": "4", "correct": False},
]


@pytest.mark.parametrize("kind", SAID)
def test_best_of_n_with_long_answers(kind, paths, tmp_path, capsys):
    """A limit of 20 tokens leaves 8 for the answer: the second has 10. It votes, but no score chooses it."""
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, ANSWERS)))
    words = ["best-of-n", str(path), *of_kind(kind, paths), "--prompt", "problem", "--text", "text", "--n", "1", "2"]
    words += ["--resamples", "0", "--max-length", "20", "--out", str(tmp_path / "out.json")]
    assert cli.main(words) == 2
    assert "1 of 3 answers have more than 20 tokens, the longest 22 (problem '1?', answer 1)" in capsys.readouterr().err
    assert cli.main([*words, "--too-long", "truncate"]) == 0
    assert "Answers: 2 ok, 1 truncated\n" in capsys.readouterr().out
    assert cli.main([*words, "--too-long", "skip"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(SAID[kind].format(**paths) + "\nAnswers: 2 ok, 1 too long\n")
    assert "N = 2: 1 problems; 1 of 3 answers have no score: never the best, but they vote" in printed
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["status"] == {"1?": ["ok", "too_long", "ok"]}
    assert [score is None for score in found["scores"]["1?"]["vbar"]] == [False, True, False]
    assert found["origin"]["score"] == kind
    assert found["origin"]["beta"] == (10 if kind == "log-ratio" else 1)
    assert found["sizes"]["1"]["average"]["mean"] == pytest.approx(2 / 3)
    assert found["sizes"]["1"]["best:vbar"]["mean"] == found["sizes"]["1"]["vote:vbar"]["mean"] == pytest.approx(1 / 3)
    assert found["sizes"]["2"]["majority"]["mean"] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)


def test_errors_of_best_of_n(tmp_path, capsys):
    path = str(tmp_path / "a.jsonl")
    assert cli.main(["best-of-n", path, "--model", "x"]) == 2
    assert "scoring here needs --model, --prompt, --text; got only --model" in capsys.readouterr().err
    assert cli.main(["best-of-n", path, "--max-length", "5"]) == 2
    assert "--max-length is of scores made here, with --model; got none" in capsys.readouterr().err


def test_the_candidates_command(paths, tmp_path, capsys):
    words = ["candidates", str(made_up(tmp_path / "data")), "--device", "cpu", "--prompt", "problem", "--text", "steps"]
    words += ["--limit", "3", "--model"]
    assert cli.main([*words, paths["model"], "--out", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["answers"], found["tokens"]) == (3, 12 + 16 + 13)
    assert list(found["p_min"]) == ["0.05", "0.1", "0.2"]
    assert "3 answers, 41 tokens, temperature 1" in capsys.readouterr().out
    assert cli.main([*words, paths["head"]]) == 2
    assert "expected a language model, for its log-probs" in capsys.readouterr().err
