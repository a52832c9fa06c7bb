"""ProcessBench files: what is read, what is refused, what a limit keeps."""

import gzip
import json
import logging
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")

from ipvrm_core.trainer.data.processbench import Layout, load_processbench, parse_columns, read_subsets
from tests.tiny_models import ROWS, made_up

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "processbench"


def test_a_file_and_a_folder(tmp_path):
    made_up(tmp_path / "data", name="omnimath")
    path = made_up(tmp_path / "data", ROWS[:2])
    problems = load_processbench(path)
    assert [(p.subset, p.id, p.label, p.final_answer_correct) for p in problems] == [
        ("gsm8k", "gsm8k-0", -1, True),
        ("gsm8k", "gsm8k-1", 0, False),
    ]
    assert problems[0].steps == ("1+2=3.", "so 3")
    assert [p.subset for p in load_processbench(tmp_path / "data")] == ["gsm8k"] * 2 + ["omnimath"] * 4


def test_a_limit_keeps_both_kinds(tmp_path):
    rows = [ROWS[0]] * 9 + [ROWS[1]] * 3
    labels = [p.label for p in load_processbench(made_up(tmp_path, rows), limit=4)]
    assert labels == [-1, -1, -1, 0]
    assert [p.label for p in load_processbench(made_up(tmp_path, [ROWS[0]] * 50 + [ROWS[1]]), limit=2)] == [-1, 0]
    assert [p.id for p in load_processbench(made_up(tmp_path, [ROWS[0]] * 9), limit=3)] == [
        "gsm8k-0",
        "gsm8k-3",
        "gsm8k-6",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 2}, r"row 0: label must be -1 \(all right\) or a step, 0 .. 1; got 2"),
        ({"label": -2}, "got -2"),
        ({"label": "1"}, "got '1'"),
        ({"label": True}, "got True"),
        ({"steps": []}, "steps must be a list of at least one text"),
        ({"steps": "1+2"}, "steps must be a list of at least one text"),
        ({"steps": ["a", " \n"]}, "step 1 must be a text"),
        ({"problem": " "}, "problem must be a text"),
        ({"id": 1.5}, "row 0: id must be a text or an integer; got 1.5"),
        ({"label": None}, "got None"),
        ({"final_answer_correct": 2}, "final_answer_correct must be true or false"),
    ],
)
def test_bad_rows(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_processbench(made_up(tmp_path, [{**ROWS[0], **change}]))


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \.json"):
        load_processbench(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"notes.txt must be a .jsonl, .json, .parquet file"):
        load_processbench(tmp_path / "notes.txt")
    (tmp_path / "a.json").write_text('[{"problem": "x"}]')
    with pytest.raises(ValueError, match=r"row 0: no column steps, label; it has \['problem'\]"):
        load_processbench(tmp_path)
    with pytest.raises(ValueError, match="row 1: id 'gsm8k-0' is also that of row 0"):
        load_processbench(made_up(tmp_path / "b", [ROWS[0], {**ROWS[0], "id": "gsm8k-0"}]))


def test_all_bad_rows_at_once_or_without_them(tmp_path):
    rows = [{**row, "label": label} for label in (-1, 7, 8, 7, None) for row in ROWS[:1]] + ROWS[1:]
    folder = made_up(tmp_path / "data", rows).parent
    made_up(folder, [ROWS[0], {**ROWS[1], "steps": []}], "mine")
    with pytest.raises(ValueError, match="5 rows cannot be used; repair or leave out") as caught:
        load_processbench(folder)
    assert [line.partition("data/")[2] for line in str(caught.value).splitlines()[1:]] == [
        "gsm8k.json, rows 1, 3: label must be -1 (all right) or a step, 0 .. 1; got 7",
        "gsm8k.json, row 2: label must be -1 (all right) or a step, 0 .. 1; got 8",
        "gsm8k.json, row 4: label must be -1 (all right) or a step, 0 .. 1; got None",
        "mine.json, row 1: steps must be a list of at least one text; got []",
    ]
    first, second = read_subsets(folder, layout=Layout(bad_rows="skip"))
    assert ([p.id for p in first.problems], list(first.skipped)) == (
        ["gsm8k-0", "gsm8k-5", "gsm8k-6", "gsm8k-7"],
        [1, 2, 3, 4],
    )
    assert ([p.id for p in second.problems], list(second.skipped)) == (["mine-0"], [1])
    with pytest.raises(ValueError, match="has no rows that can be used"):
        read_subsets(made_up(tmp_path / "bad", [{**ROWS[0], "label": 9}]), layout=Layout(bad_rows="skip"))


def test_columns_and_labels_from_one(tmp_path):
    rows = [{"q": "1?", "answer": {"steps": ["a", "b"]}, "wrong": label} for label in (-1, 0, 1, 2.0)]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    columns = parse_columns(["problem=q", "steps=answer.steps", "label=wrong"])
    found = load_processbench(tmp_path, layout=Layout(columns, first_step=1))
    assert [(p.steps, p.label) for p in found] == [(("a", "b"), label) for label in (-1, -1, 0, 1)]
    with pytest.raises(ValueError, match=r"row 3: label must be -1 \(all right\) or a step, 0 .. 1; got 2.0"):
        load_processbench(tmp_path, layout=Layout(columns))
    with pytest.raises(ValueError, match=r"rows 0-3: column of id: no column 'uid'; it has \['q', 'answer.steps', "):
        load_processbench(tmp_path, layout=Layout({**columns, "id": "uid"}, 1))
    with pytest.raises(ValueError, match=r"columns are of problem, steps, label, .*; got question"):
        Layout({"question": "q"})
    with pytest.raises(ValueError, match="count the steps from 0 or 1; got 2"):
        Layout(first_step=2)
    with pytest.raises(ValueError, match="--columns takes role=column; got 'steps'"):
        parse_columns(["label=x", "steps"])


def test_null_ids_are_numbered(tmp_path):
    found = load_processbench(made_up(tmp_path, [{**row, "id": None, "generator": None} for row in ROWS[:2]]))
    assert [(p.id, p.generator) for p in found] == [("gsm8k-0", ""), ("gsm8k-1", "")]


def test_files_of_a_folder(tmp_path, caplog):
    """Packed files and large letters are read; one name twice, one problem twice and data in subfolders are named."""
    made_up(tmp_path / "data")
    (tmp_path / "data" / "other.JSON.gz").write_bytes(gzip.compress(made_up(tmp_path, name="x").read_bytes()))
    (tmp_path / "data" / ".hidden.json").write_text("[")
    assert [p.subset for p in load_processbench(tmp_path / "data")] == ["gsm8k"] * 4 + ["other"] * 4
    (tmp_path / "data" / "gsm8k.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"gsm8k.json and .*gsm8k.jsonl would both be the subset 'gsm8k': rename"):
        load_processbench(tmp_path / "data")
    (tmp_path / "data" / "gsm8k.jsonl").unlink()
    (tmp_path / "data" / "again.json").write_text(json.dumps([{**ROWS[3], "id": "z"}, {**ROWS[0], "steps": ["1"]}]))
    with pytest.raises(ValueError, match=r"again.json, row 0: problem and steps are also in .*gsm8k.json"):
        load_processbench(tmp_path / "data")
    with pytest.raises(FileNotFoundError, match=r"no \.jsonl, .* file at .*; there are some in .*/data"):
        load_processbench(made_up(tmp_path / "deep" / "data").parents[1])
    made_up(tmp_path / "deep", name="top")
    with caplog.at_level(logging.WARNING):
        assert {p.subset for p in load_processbench(tmp_path / "deep")} == {"top"}
    assert "data in subfolders are not read: data" in caplog.text


PRMBENCH = {
    "idx": "x0",
    "original_question": "1?",
    "modified_question": "1?",
    "original_process": ["1. a", "2. b"],
    "modified_process": ["1. a", "2. c", "3. d"],
    "error_steps": [2, 3],
    "classification": "circular",
}
MISTAKES = [
    {"input": "1?", "steps": ["a", "b"], "answer": "2", "target": "2", "mistake_index": None},
    {"input": "2?", "steps": ["a", "b"], "answer": "3", "target": "2", "mistake_index": 0},
]


def prm800k(ratings, reason, steps=("a", "b")):
    question = {
        "problem": reason,
        "pre_generated_steps": steps,
        "pre_generated_answer": "1",
        "ground_truth_answer": "2",
    }
    labels = [{"completions": [{"text": "a", "rating": rating}, {"text": "z", "rating": -1}]} for rating in ratings]
    return {
        "question": question,
        "label": {"steps": labels, "finish_reason": reason},
        "is_quality_control_question": False,
    }


@pytest.mark.parametrize(
    ("source", "rows", "labels"),
    [
        ("prmbench.jsonl", [PRMBENCH, {**PRMBENCH, "idx": "x1", "error_steps": [1]}], [1, -1, 0]),
        ("multistep_arithmetic.jsonl", MISTAKES, [-1, 0]),
        (
            "phase2_test.jsonl",
            [prm800k([0, -1], "found_error"), prm800k([1, 1], "solution"), prm800k([1], "give_up")],
            [1, -1],
        ),
    ],
)
def test_the_conversions_of_the_guide(tmp_path, monkeypatch, source, rows, labels):
    """Its very code, on rows of the layout that the data sets' own pages describe."""
    guide = (Path(__file__).resolve().parents[2] / "docs" / "evaluate-your-own-steps.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if source in block]
    monkeypatch.chdir(tmp_path)
    Path("converted").mkdir()
    Path(source).write_text("\n".join(map(json.dumps, rows)))
    exec(code, {})
    assert [problem.label for problem in load_processbench("converted")] == labels


def test_the_published_files():
    if not SHARED.is_dir():
        pytest.skip("needs shared/data/processbench beside the checkout")
    problems = load_processbench(SHARED)
    counts = {
        subset: tuple(sum(p.subset == subset and (p.label < 0) == kind for p in problems) for kind in (True, False))
        for subset in dict.fromkeys(p.subset for p in problems)
    }
    assert counts == {
        "gsm8k": (193, 207),
        "math": (406, 594),
        "olympiadbench": (339, 661),
        "omnimath": (241, 759),
    }
