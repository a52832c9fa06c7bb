"""Loading examples from files and data sets, and finding overlap between them."""

import gzip
import json
import logging
from pathlib import Path

import pytest

from ipvrm_core.trainer.data.example import Example
from ipvrm_core.trainer.data.files import load_examples
from ipvrm_core.trainer.data.overlap import overlap

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
ROWS = [
    {"q": "1+1?", "a": "so #### 2 ", "n": {"gold": 2.0}, "chat": [{"role": "user", "content": "1+1?"}]},
    {"q": "1+2?", "a": "so #### 1,003", "n": {"gold": 14.5}, "chat": [{"role": "user", "content": "1+2?"}]},
    {"q": "1+3?", "a": "#### x", "n": {"gold": 7}, "chat": [{"role": "user", "content": "1+3?"}]},
]


def write(path: Path, rows: list) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path)
    return path


@pytest.fixture
def jsonl(tmp_path):
    return write(tmp_path / "toy.jsonl", ROWS)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_formats_give_the_same_examples(tmp_path, suffix):
    path = write(tmp_path / f"toy{suffix}", ROWS)
    examples = load_examples(
        path,
        columns={"prompt": "q", "answer": "a", "solution": "a"},
        prompt_template="\\boxed{} {prompt}",
        answer_pattern="#### (.+)",
        limit=2,
        meta=["n.gold"],
    )
    assert examples == [
        Example("toy-0", "\\boxed{} 1+1?", "2", "so #### 2 ", {"n.gold": 2.0}),
        Example("toy-1", "\\boxed{} 1+2?", "1,003", "so #### 1,003", {"n.gold": 14.5}),
    ]


def test_nested_columns_numbers_and_messages(jsonl):
    examples = load_examples(jsonl, columns={"prompt": "chat", "answer": "n.gold", "id": "q"})
    assert [example.answer for example in examples] == ["2", "14.5", "7"]
    assert examples[0].prompt == ({"role": "user", "content": "1+1?"},)
    assert [example.id for example in examples] == ["1+1?", "1+2?", "1+3?"]
    assert examples[0].solution is None


def test_rows_without_an_answer_are_dropped_on_demand_only(tmp_path, caplog):
    path = write(
        tmp_path / "gaps.json", [{"prompt": c, "answer": a} for c, a in zip("abc", ["1", None, " "], strict=True)]
    )
    with pytest.raises(ValueError, match="row 1, column 'answer': no answer; got None"):
        load_examples(path)
    with caplog.at_level(logging.WARNING):
        assert load_examples(path, drop_unanswered=True) == [Example("gaps-0", "a", "1")]
    assert "dropped 2 of 3 rows without an answer" in caplog.text


def test_prompt_of_several_columns_and_no_answer(jsonl):
    assert load_examples(jsonl, columns={"prompt": ["q", "a"]}, limit=1) == [Example("toy-0", "1+1? so #### 2 ", "")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"columns": {"prompt": "question"}}, r"row 0: no column 'question'; it has \['q', 'a', 'n.gold', 'chat'\]"),
        ({"columns": {"prompt": "q", "answer": "n.silver"}}, "row 0: no column 'n.silver'"),
        ({"columns": {"prompt": "q", "answer": "a"}, "answer_pattern": r"#### (\d.*)"}, "row 2: answer does not match"),
        ({"columns": {"prompt": "q", "answer": "a"}, "answer_pattern": "####"}, "must have a group"),
        ({"columns": {"prompt": "q", "answer": "chat"}}, "row 0, column 'chat': expected text or a number"),
        ({"columns": {"prompt": "n.gold"}}, "column 'n.gold': expected text or chat messages; got float"),
        ({"columns": {"prompt": "q", "solution": "n.gold"}}, "column 'n.gold': expected a solution as text; got float"),
        ({"columns": {"prompt": "chat"}, "prompt_template": "{prompt}!"}, "prompt_template is for text prompts"),
        ({"columns": {"prompt": "q", "gold": "a"}}, "columns must map 'prompt'"),
        ({"columns": {"answer": "a"}}, "columns must map 'prompt'"),
        ({"prompt_template": "solve"}, "must contain '{prompt}'; got 'solve'"),
        ({"limit": 0}, "limit must be at least 1; got 0"),
        ({"split": "train"}, "has no splits or configurations; got split='train'"),
    ],
)
def test_errors_name_the_row_and_the_column(jsonl, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_examples(jsonl, **arguments)


def test_errors_of_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such data file: .*absent.jsonl"):
        load_examples(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match=r"empty.json has no rows"):
        load_examples(write(tmp_path / "empty.json", []))
    with pytest.raises(ValueError, match="row 0: expected an object; got int"):
        load_examples(write(tmp_path / "numbers.json", [1]))
    (tmp_path / "object.json").write_text("{}")
    with pytest.raises(ValueError, match="expected a list of objects; got dict"):
        load_examples(tmp_path / "object.json")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt":\n')
    with pytest.raises(ValueError, match=r"broken.jsonl, line 2: not JSON"):
        load_examples(tmp_path / "broken.jsonl")
    with pytest.raises(ValueError, match="row 0, column 'prompt': expected messages with texts"):
        load_examples(write(tmp_path / "chat.json", [{"prompt": [{"role": "user"}], "answer": "1"}]))
    for value in (True, float("nan"), [1]):
        with pytest.raises(ValueError, match="column 'answer': expected text or a number"):
            load_examples(write(tmp_path / "value.json", [{"prompt": "p", "answer": value}]))


@pytest.mark.parametrize("name", ["toy.JSON", "toy.jsonl.gz", "Toy.Json.GZ", "toy.jsonl"])
def test_packed_files_large_letters_and_byte_order_marks(tmp_path, name):
    text = "\n".join(map(json.dumps, ROWS)) if "jsonl" in name else json.dumps(ROWS)
    data = text.encode("utf-8-sig")
    (tmp_path / name).write_bytes(gzip.compress(data) if name.lower().endswith("gz") else data)
    examples = load_examples(tmp_path / name, columns={"prompt": "q"})
    assert [example.prompt for example in examples] == ["1+1?", "1+2?", "1+3?"]
    assert examples[0].id == f"{name[:3]}-0"


def test_bytes_that_are_no_utf8_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "a", "answer": "b"}\n{"prompt": "caf\xe9", "answer": "b"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: not UTF-8: byte 0xe9 at 15 \(invalid continuation byte\)"):
        load_examples(tmp_path / "a.jsonl")
    (tmp_path / "b.json").write_text(json.dumps(ROWS), encoding="utf-16-le")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe" + (tmp_path / "b.json").read_bytes())
    with pytest.raises(ValueError, match=r"b.json: not UTF-8: byte 0xff at 0"):
        load_examples(tmp_path / "b.json")
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode())[:-9])
    with pytest.raises(ValueError, match=r"c.json.gz: not gzip, or cut short"):
        load_examples(tmp_path / "c.json.gz")
    (tmp_path / "d.jsonl.gz").write_text("{}")
    with pytest.raises(ValueError, match=r"d.jsonl.gz: not gzip, or cut short"):
        load_examples(tmp_path / "d.jsonl.gz")


def test_data_set_by_name_goes_through_datasets(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"question": "1+1?", "answer": "#### 2"}] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    columns = {"prompt": "question", "answer": "answer"}
    examples = load_examples("some/set", "train", columns, config="main", answer_pattern="#### (.+)", limit=2)
    assert asked == [("some/set", "main", "train")]
    assert examples == [Example("set-0", "1+1?", "2"), Example("set-1", "1+1?", "2")]
    with pytest.raises(ValueError, match=r"'some/set' is not a .jsonl, .json or .parquet file; .* needs a split"):
        load_examples("some/set")


def test_overlap_ignores_case_and_punctuation_but_not_signs():
    train = [Example("a", "How many  Apples?", ""), Example("b", "1+2?", "")]
    test = [
        Example("x", ({"role": "user", "content": "how many apples"},), ""),
        Example("y", "1-2?", ""),
        Example("z", "How many pears?", ""),
    ]
    assert overlap(train, test) == {0: [0]}


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"needs shared/data/{name} beside the checkout")
    return path


@pytest.mark.parametrize(
    ("name", "arguments", "rows", "answers"),
    [
        (
            "gsm8k/test.jsonl",
            {
                "columns": {"prompt": "question", "answer": "answer", "solution": "answer"},
                "answer_pattern": "#### (.+)",
            },
            1319,
            ["18", "3"],
        ),
        ("word_problems/mawps_singleop.jsonl", {"columns": {"prompt": "input", "answer": "target"}}, None, ["14"]),
        (
            "word_problems/svamp.jsonl",
            {"columns": {"prompt": ["Body", "Question"], "answer": "Answer"}},
            None,
            ["145"],
        ),
        (
            "math/math500.jsonl",
            {"columns": {"prompt": "problem", "answer": "answer", "solution": "solution", "id": "unique_id"}},
            500,
            ["\\left( 3, \\frac{\\pi}{2} \\right)"],
        ),
        (
            "policy_val/val.parquet",
            {"columns": {"prompt": "prompt", "answer": "reward_model.ground_truth"}, "meta": ["data_source"]},
            1620,
            ["142.0"],
        ),
    ],
)
def test_real_files(name, arguments, rows, answers):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    examples = load_examples(shared(name), **arguments)
    assert rows is None or len(examples) == rows
    assert [example.answer for example in examples[: len(answers)]] == answers
    assert len({example.id for example in examples}) == len(examples)
    assert all(example.prompt and example.answer for example in examples)


def test_no_math500_problem_is_in_the_math_training_answers():
    train = load_examples(
        shared("math/train_answers.json"), columns={"prompt": "problem", "answer": "answer"}, drop_unanswered=True
    )
    test = load_examples(shared("math/math500.jsonl"), columns={"prompt": "problem"})
    assert len(train) == 7470  # of 7474, four have no answer
    assert overlap(train, test) == {}
    assert len(overlap(test, test)) == 500


def test_overlap_sees_through_instructions():
    """From eight words on, a problem inside a longer prompt counts, by whole words; shorter ones only as a whole."""
    problem = "Ann has three apples and buys two more pears."
    asked = f"Solve it.\n\n{problem} How many?\n\nPut the answer in a box."
    found = overlap([Example("a", problem, "")], [Example("x", asked, ""), Example("y", problem[:-2], "")])
    assert found == {0: [0]}
    assert overlap([Example("a", asked, "")], [Example("x", problem, "")]) == {0: [0]}
    assert overlap([Example("a", "Solve: how many apples?", "")], [Example("x", "how many apples", "")]) == {}
    chat = ({"role": "system", "content": "Think."}, {"role": "user", "content": "how many apples"})
    assert overlap([Example("a", chat, "")], [Example("x", "How many apples?", "")]) == {0: [0]}
    twice = [Example("a", "other words", ""), Example("b", problem, ""), Example("c", problem, "")]
    assert overlap(twice, [Example("x", problem, "")]) == {0: [1, 2]}


@pytest.mark.parametrize(
    ("train", "test", "count"),
    [
        ("gsm8k/test.jsonl", "processbench/gsm8k.json", 400),  # every one of them
        ("gsm8k/train.jsonl", "processbench/gsm8k.json", 0),
        ("math/train_with_solutions.json", "processbench/math.json", 2),
        ("math/math500.jsonl", "policy_val/val.parquet", 487),  # 13 are too short to be seen within their instruction
    ],
)
def test_overlap_of_real_files(train, test, count):
    pytest.importorskip("pyarrow")
    columns = {"gsm8k/test.jsonl": "question", "gsm8k/train.jsonl": "question", "policy_val/val.parquet": "prompt"}
    sides = [load_examples(shared(name), columns={"prompt": columns.get(name, "problem")}) for name in (train, test)]
    assert len(overlap(*sides)) == count
