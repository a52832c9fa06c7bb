"""ProcessBench files: what is read, what is refused, what a limit keeps."""

from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")

from ipvrm_core.trainer.data.processbench import load_processbench
from tests.tiny_models import ROWS, made_up

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "processbench"


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
        ({"label": 2}, r"row 0: label must be -1 or a step, 0 .. 1; got 2"),
        ({"label": -2}, "got -2"),
        ({"label": "1"}, "got '1'"),
        ({"label": True}, "got True"),
        ({"steps": []}, "steps must be a list of at least one text"),
        ({"steps": "1+2"}, "steps must be a list of at least one text"),
        ({"steps": ["a", " \n"]}, "step 1 must be a text"),
        ({"problem": " "}, "problem must be a text"),
        ({"final_answer_correct": 2}, "final_answer_correct must be true or false"),
    ],
)
def test_bad_rows(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_processbench(made_up(tmp_path, [{**ROWS[0], **change}]))


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \.json"):
        load_processbench(tmp_path / "nothing")
    (tmp_path / "a.json").write_text('[{"problem": "x"}]')
    with pytest.raises(ValueError, match=r"row 0: no column steps, label; it has \['problem'\]"):
        load_processbench(tmp_path)
    with pytest.raises(ValueError, match="row 1: id 'gsm8k-0' is also that of row 0"):
        load_processbench(made_up(tmp_path / "b", [ROWS[0], {**ROWS[0], "id": "gsm8k-0"}]))


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
