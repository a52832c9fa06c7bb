"""Chats for reward models: what is read, what is refused, the split by prompt, rendering and length."""

from pathlib import Path

import pytest

from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.config import Chats
from ipvrm_core.trainer.data.chats import by_prompt, held_out, load_chats
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.phases import rm_chats
from ipvrm_core.trainer.phases.rm_chats import encode, fit
from tests.chats import conversation, pair, row

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "rm_val"


# ---- reading


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_pointwise(source, suffix):
    chats = load_chats(source([row("1+1?", "#2;", 1), row("1+1?", "#3;", 0)], suffix=suffix))
    assert [(chat.row, chat.answer, chat.correct) for chat in chats] == [(0, "#2;", True), (1, "#3;", False)]
    assert chats[0].prompt == ({"role": "user", "content": "1+1?"},)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_pairwise_rows_are_a_right_and_a_wrong_answer(source, suffix):
    chats = load_chats(source([pair("1+1?", "#2;", "#3;"), pair("2+2?", "#4;", "#5;")], "pairwise", suffix))
    assert [(chat.row, chat.answer, chat.correct) for chat in chats] == [
        (0, "#2;", True),
        (0, "#3;", False),
        (1, "#4;", True),
        (1, "#5;", False),
    ]


def test_other_columns_and_a_limit(source):
    rows = [{"talk": conversation("1?", "1"), "good": False}, {"talk": [], "good": 7}]
    chats = load_chats(source(rows, conversation_column="talk", label_column="good", limit=1))
    assert [(chat.answer, chat.correct) for chat in chats] == [("1", False)]


@pytest.mark.parametrize("label", [2, -1, 0.5, "1", None, float("nan")])
def test_labels_other_than_0_and_1_are_refused(source, label):
    with pytest.raises(ValueError, match=r"row 1, column 'label': a label must be 0 or 1; got"):
        load_chats(source([row("1?", "1", 1), row("1?", "1", label)]))


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        (conversation("1?", ""), "the answer is empty"),
        (conversation("1?", " \n"), "the answer is empty"),
        (conversation("1?", "1")[:1], "the last message must be the assistant's answer; got the role 'user'"),
        (conversation("1?", "1")[1:], "there must be a user's message before the answer"),
        (conversation(" ", "1"), "there must be a user's message before the answer"),
        ([], "expected at least one message"),
        ("1? 1", "expected a list of messages; got str"),
        ([{"from": "human", "value": "1?"}], "expected messages with texts 'role' and 'content'"),
    ],
)
def test_conversations_that_are_none(source, messages, says):
    with pytest.raises(ValueError, match=r"row 0, column 'conversation': .*") as caught:
        load_chats(source([{"conversation": messages, "label": 1}]))
    assert says in str(caught.value)


def test_missing_columns_rows_and_files(source, tmp_path):
    with pytest.raises(ValueError, match=r"no column 'label'; it has \['conversation', 'score'\]"):
        load_chats(source([{"conversation": conversation("1?", "1"), "score": 1}]))
    with pytest.raises(ValueError, match="has no rows"):
        load_chats(source([]))
    with pytest.raises(FileNotFoundError, match="no such data file"):
        load_chats(Chats(path=str(tmp_path / "none.parquet"), kind="pointwise"))


def test_pairs_that_are_none(source):
    with pytest.raises(ValueError, match=r"row 0, columns 'chosen' and 'rejected': .* must have the same prompt"):
        load_chats(source([{"chosen": conversation("1?", "1"), "rejected": conversation("2?", "2")}], "pairwise"))
    with pytest.raises(ValueError, match=r"row 0.* must differ; got '1' twice"):
        load_chats(source([pair("1?", "1", "1")], "pairwise"))


# ---- the split


def test_a_prompt_is_never_on_both_sides_and_the_order_of_rows_does_not_matter(source):
    rows = [row(f"{n}?", f"#{k};", k % 2) for k in range(3) for n in range(20)] + [row(" 3? ", "#7;", 1)]

    def kept(rows) -> set[str]:
        groups = by_prompt(load_chats(source(rows)))
        assert len(groups) == 20  # white space makes no other prompt
        assert sum(map(len, groups)) == 61
        return {groups[index][0].prompt[0]["content"].strip() for index in held_out(groups, 0.25)}

    first = kept(rows)
    assert len(first) == 5
    assert kept(rows[::-1]) == first
    assert kept(rows[40:] + rows[:40]) == first


def test_sizes_of_the_split(source):
    groups = by_prompt(load_chats(source([row(f"{n}?", "1", 1) for n in range(4)])))
    assert held_out(groups, 0) == set()
    assert len(held_out(groups, 0.01)) == 1
    with pytest.raises(ValueError, match="none is left to train on"):
        held_out(groups[:1], 0.1)


# ---- rendering and length


def test_rendering(source, tiny_experiment):
    experiment = tiny_experiment()
    eos = experiment.text.tokenizer.eos_token_id
    chats = load_chats(source([row("1+1?", "#2;", 1)]))
    ((_, plain),) = encode(experiment, chats)
    assert experiment.text.tokenizer.decode(plain.prompt_ids) == "1+1?"
    assert experiment.text.tokenizer.decode(plain.response_ids[:-1]) == "#2;"
    assert plain.response_ids[-1] == eos
    experiment.text.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }};{% endfor %}{% if add_generation_prompt %}#{% endif %}"
    )
    ((_, rendered),) = encode(experiment, chats)
    assert experiment.text.tokenizer.decode(rendered.prompt_ids) == "1+1?;#"
    assert rendered.response_ids == plain.response_ids


def test_several_messages_need_a_chat_template(source, tiny_experiment):
    messages = [{"role": "system", "content": "1"}, *conversation("1?", "1")]
    chats = load_chats(source([{"conversation": messages, "label": 1}]))
    with pytest.raises(ValueError, match="row 0 is a chat, but the tokenizer has no chat template"):
        encode(tiny_experiment(), chats)


def _encoded(source, lengths):
    """Pairwise rows; the prompt has 3 tokens."""
    rows = [pair("1+1", "2" * a, "3" * b) for a, b in lengths]
    made = source(rows, "pairwise")
    chats = load_chats(made)
    return [(chat, Answer([1, 2, 3], [5] * len(chat.answer))) for chat in chats]


@pytest.mark.parametrize(
    ("on_long", "lengths", "dropped", "truncated"),
    [("drop", [5, 4, 5, 5], 1, 0), ("truncate", [5, 4, 7, 1, 5, 5], 0, 1)],
)
def test_long_rows_are_counted(source, on_long, lengths, dropped, truncated):
    encoded = _encoded(source, [(5, 4), (8, 1), (5, 5)])
    settings = Chats(path="x", kind="pairwise", max_tokens=8 if on_long == "drop" else 10, on_long=on_long)
    chats, answers, counts = fit(encoded, settings, "rm.x.data")
    assert [len(answer.response_ids) for answer in answers] == lengths
    assert len(chats) == len(answers) == counts["answers"]  # a pair goes as a whole
    assert (counts["rows"], counts["dropped_rows"], counts["truncated_rows"]) == (3, dropped, truncated)
    assert counts["longest_tokens"] == 11


def test_long_rows_are_an_error_unless_told_otherwise(source):
    encoded = _encoded(source, [(5, 4), (8, 1), (5, 9)])
    with pytest.raises(ValueError, match=r"2 of 3 rows are longer than rm.x.data.max_tokens = 8 .* first is row 1\)"):
        fit(encoded, Chats(path="x", kind="pairwise", max_tokens=8), "rm.x.data")
    with pytest.raises(ValueError, match="truncation would leave no answer"):
        fit(encoded, Chats(path="x", kind="pairwise", max_tokens=3, on_long="truncate"), "rm.x.data")
    with pytest.raises(ValueError, match="all 3 rows are longer"):
        fit(encoded, Chats(path="x", kind="pairwise", max_tokens=3, on_long="drop"), "rm.x.data")
    assert len(fit(encoded, Chats(path="x", kind="pairwise", max_tokens=12), "rm.x.data")[0]) == 6


def test_rows_longer_than_the_model_are_refused(tiny_model):
    with pytest.raises(ValueError, match=r"rm.x.data: the model has 256 positions, the longest row needs 300"):
        rm_chats.check_positions([Answer([1] * 100, [1] * 200)], LanguageModel(tiny_model()), "rm.x.data")


# ---- the real files


@pytest.mark.skipif(not SHARED.is_dir(), reason="the data of ../shared is not on this machine")
def test_the_real_files():
    pointwise = load_chats(Chats(path=str(SHARED / "pointwise_val.parquet"), kind="pointwise"))
    pairwise = load_chats(Chats(path=str(SHARED / "pairwise_val.parquet"), kind="pairwise"))
    assert (len(pointwise), sum(chat.correct for chat in pointwise)) == (1086, 543)
    assert (len(pairwise), sum(chat.correct for chat in pairwise)) == (1086, 543)
    groups = [by_prompt(chats) for chats in (pointwise, pairwise)]
    assert [len(group) for group in groups] == [260, 260]
    first, second = (
        {group[index][0].prompt[0]["content"].strip() for index in held_out(group, 0.1)} for group in groups
    )
    assert len(first) == 26
    assert first == second  # the same validation prompts, whichever of the two files is trained on
