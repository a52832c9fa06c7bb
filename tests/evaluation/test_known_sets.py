"""Presets of well-known test sets, groups, and what the shares of right answers are."""

import json
from itertools import combinations
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from ipvrm_core.trainer.config import ConfigError, Source, check
from ipvrm_core.trainer.data.example import Example
from ipvrm_core.trainer.data.known_sets import KNOWN_SETS, preset_settings
from ipvrm_core.trainer.data.sources import by_group, read_source
from ipvrm_core.trainer.evaluation.policy.accuracy import Judged, accuracy, average
from ipvrm_core.trainer.text.prompts import encode_prompt

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
ASKED = "\n\nPresent the answer in LaTex format: \\boxed{Your answer}"


def source(**settings) -> Source:
    return check(settings, "data", Source)


# ---- presets


def test_a_preset_is_its_settings_and_what_is_given_goes_before_them():
    found = source(path="x.jsonl", preset="gsm8k", answer_pattern="#+ (.+)", limit=3)
    assert (found.prompt_column, found.answer_column, found.limit) == ("question", "answer", 3)
    assert found.answer_pattern == "#+ (.+)"
    assert found.prompt_template == "{prompt}" + ASKED
    assert check(found.model_dump(), "again", Source) == found  # as config.json is read back
    assert source(path="x.jsonl").prompt_column == "prompt"


@pytest.mark.parametrize("preset", KNOWN_SETS)
def test_every_preset_has_settings_that_a_source_knows(preset):
    found = source(path="x.jsonl", preset=preset)
    assert {name: getattr(found, name) for name in KNOWN_SETS[preset]} == KNOWN_SETS[preset]
    preset_settings(preset).clear()
    assert KNOWN_SETS[preset]


@pytest.mark.parametrize("name", ["gsm", 5, ["gsm8k"]])
def test_an_unknown_preset_names_the_known_ones(name):
    with pytest.raises(ConfigError, match="preset must be one of gsm8k, math500, mawps, asdiv, svamp, policy_val; got"):
        source(path="x.jsonl", preset=name)
    benchmarks = {"mine": {"path": "x.jsonl", "preset": name}}
    with pytest.raises(ConfigError, match=r"eval.benchmarks.mine: .*preset must be one of gsm8k"):
        check(
            {"model": {"path": "x"}, "data": {"path": "x"}, "test": {"path": "x"}, "eval": {"benchmarks": benchmarks}}
        )


def test_a_preset_is_of_a_file():
    with pytest.raises(ConfigError, match="preset needs a path; got task='chain'"):
        source(task="chain", preset="gsm8k")


FIRST = {  # preset, file: (rows, answers of the first, how the first prompt starts and ends)
    ("gsm8k", "gsm8k/test.jsonl"): (1319, ["18", "3", "70000"], "Janet’s ducks", "farmers' market?" + ASKED),
    ("math500", "math/math500.jsonl"): (500, ["\\left( 3, \\frac{\\pi}{2} \\right)"], "Convert the", "\\pi.$" + ASKED),
    ("mawps", "word_problems/mawps_addsub.jsonl"): (395, ["43", "26"], "Joan found 70", "to Sam ?" + ASKED),
    ("mawps", "word_problems/mawps_multiarith.jsonl"): (600, ["39", "8"], "For Halloween", "have left?" + ASKED),
    ("mawps", "word_problems/mawps_singleeq.jsonl"): (508, ["43", "26"], "Joan found 70", "to Sam ?" + ASKED),
    ("mawps", "word_problems/mawps_singleop.jsonl"): (562, ["14", "9"], "If there are 7", "the box?" + ASKED),
    ("asdiv", "word_problems/asdiv.jsonl"): (2215, ["9", "15"], "Seven red apples", "the basket?" + ASKED),
    ("svamp", "word_problems/svamp.jsonl"): (1000, ["145", "19"], "There are 87 oranges", "group of bananas?" + ASKED),
    ("policy_val", "policy_val/val.parquet"): (1620, ["142.0"], "$\\frac{m}{n}$ is the", ASKED),
}


@pytest.mark.parametrize(("preset", "name"), FIRST)
def test_real_files(preset, name):
    if not (SHARED / name).is_file():
        pytest.skip(f"needs shared/data/{name} beside the checkout")
    rows, answers, start, end = FIRST[preset, name]
    examples = read_source(source(path=str(SHARED / name), preset=preset))
    assert len(examples) == rows
    assert [example.answer for example in examples[: len(answers)]] == answers
    prompts = [e.prompt if isinstance(e.prompt, str) else e.prompt[-1]["content"] for e in examples]
    assert prompts[0].startswith(start)
    assert all(prompt.endswith(ASKED) for prompt in prompts)
    assert prompts[0].endswith(end)


def test_units_of_asdiv(tmp_path):
    answers = ["9 (apples)", "14  (seats)", "-(1/3)", "Rug B", "5:45", "2.5 (a.m.)"]
    path = tmp_path / "asdiv.jsonl"
    path.write_text("\n".join(json.dumps({"body": "A.", "question": "B?", "answer": text}) for text in answers))
    examples = read_source(source(path=str(path), preset="asdiv"))
    assert [example.answer for example in examples] == ["9", "14", "-(1/3)", "Rug B", "5:45", "2.5"]
    assert examples[0].prompt == "A. B?" + ASKED


def test_the_sources_of_policy_val_apart():
    path = SHARED / "policy_val/val.parquet"
    if not path.is_file():
        pytest.skip("needs shared/data/policy_val beside the checkout")
    settings = source(path=str(path), preset="policy_val")
    groups = by_group(settings, "val", read_source(settings))
    sizes = {"aimo-amc": 83, "aimo-aime2024": 90, "math-500": 500, "minerva-math": 272, "olympiad-bench": 675}
    assert {name: len(examples) for name, examples in groups.items()} == {f"val/{k}": v for k, v in sizes.items()}
    few = settings.model_copy(update={"limit": 85})
    assert [len(group) for group in by_group(few, "val", read_source(few)).values()] == [83, 85, 85, 85, 85]


# ---- prompts


class Letters:
    """A tokenizer whose ids are code points; the template shows roles by their first letters."""

    def __init__(self, chat_template):
        self.chat_template = chat_template

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(letter) for letter in ("^" if add_special_tokens else "") + text]}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize
        assert add_generation_prompt
        return "".join(f"{message['role'][0]}:{message['content']}\n" for message in messages) + "a:"


@pytest.mark.parametrize(
    ("template", "system", "prompt", "expected"),
    [
        (None, None, "1+1?", "^1+1?"),
        (None, "ignored", ({"role": "user", "content": "1+1?"},), "^1+1?"),
        ("yes", None, "1+1?", "u:1+1?\na:"),
        ("yes", "Be brief.", "1+1?", "s:Be brief.\nu:1+1?\na:"),
        ("yes", "Be brief.", ({"role": "user", "content": "1+1?"},), "s:Be brief.\nu:1+1?\na:"),
        (
            "yes",
            "Be brief.",
            ({"role": "system", "content": "Own."}, {"role": "user", "content": "x"}),
            "s:Own.\nu:x\na:",
        ),
    ],
)
def test_prompts(template, system, prompt, expected):
    ids = encode_prompt(Letters(template), Example("e", prompt, ""), system)
    assert "".join(map(chr, ids)) == expected


# ---- shares


def test_shares_by_hand():
    """Two prompts of four answers, right: 1 of 4 and none. avg 1/8; pass@2 of the first 1 - C(3,2)/C(4,2) = 1/2."""
    greedy = [Judged(True, True, 5, True), Judged(False, False, 9, False)]
    first = [Judged(i == 2, True, 10, True) for i in range(4)]
    second = [Judged(False, i < 3, 20, i == 0) for i in range(4)]
    found = accuracy(greedy, first + second, 4, (2,))
    assert found == {
        "prompts": 2,
        "greedy": 0.5,
        "avg@4": 1 / 8,
        "pass@2": 1 / 4,
        "pass@4": 1 / 2,
        "response_length": 15,
        "finished": 5 / 8,
        "undecided": 2,
    }
    pairs = [any(first[i].correct for i in pair) for pair in combinations(range(4), 2)]
    assert found["pass@2"] == sum(pairs) / len(pairs) / 2
    with pytest.raises(ValueError, match="expected 4 drawn answers for each greedy one; got 7 and 2"):
        accuracy(greedy, (first + second)[:7], 4)


def test_the_average_is_over_benchmarks_not_problems():
    found = {"a": {"prompts": 9, "greedy": 1.0, "avg@2": 0.5}, "b": {"prompts": 1, "greedy": 0.0, "avg@2": 0.25}}
    assert average(found) == {"greedy": 0.5, "avg@2": 0.375}
