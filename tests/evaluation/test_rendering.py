"""Problem and steps as one text, and which token belongs to which step."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")

from ipvrm_core.trainer.text.steps import Format, render, token_steps
from tests.tiny_models import TEMPLATE, tokenizer


def pieces_of(rendered, count):
    ids = [rendered.step_of.index(step) for step in range(count)]
    assert sorted(ids) == ids
    return [
        "".join(rendered.text[a:b] for (a, b), s in zip(rendered.offsets, rendered.step_of, strict=True) if s == step)
        for step in range(count)
    ]


def test_chat_boundaries():
    """The blank line closes its step; template and problem belong to none."""
    rendered = render(tokenizer(), "1+2?", ["1+2=3. ", "so 3"])
    assert rendered.text == "<u>1+2?<e>\n<a>1+2=3. \n\nso 3<e>\n"
    assert pieces_of(rendered, 2) == ["1+2=3. \n\n", "so 3"]
    assert rendered.text[rendered.offsets[rendered.start][0] :].startswith("1+2=3")
    assert rendered.text[rendered.offsets[rendered.end][0] :] == "<e>\n"
    numbered = render(tokenizer(), "1+2?", ["1+2", "so 3"], Format(step="Step {number}: {step}", system_prompt="so"))
    assert numbered.text.startswith("<s>so<e>\n<u>")
    assert pieces_of(numbered, 2) == ["Step 1: 1+2\n\n", "Step 2: so 3"]


def test_plain_boundaries():
    rendered = render(tokenizer(None), "1+2?", ["1+2=3", "so 3"])
    assert rendered.text == "1+2?\n\n1+2=3\n\nso 3"
    assert pieces_of(rendered, 2) == ["1+2=3\n\n", "so 3"]
    assert rendered.end == len(rendered.ids)


def test_a_template_that_strips_the_answer():
    strip = TEMPLATE.replace("m['content']", "m['content'] | trim")
    rendered = render(tokenizer(strip), "1+2?", [" 1+2", "so 3 "])
    assert rendered.text.endswith("<a>1+2\n\nso 3<e>\n")
    assert pieces_of(rendered, 2) == ["1+2\n\n", "so 3"]


def test_an_answer_that_repeats_the_problem():
    rendered = render(tokenizer(), "so 3", ["so 3"])
    assert rendered.start == len("<u>so 3<e>\n<a>")


@pytest.mark.parametrize(
    ("template", "steps", "message"),
    [
        (TEMPLATE.replace("m['content']", "m['content'] | upper"), ["so 3"], "p7: the chat template does not show"),
        ("{{ raise_exception('no roles') }}", ["so 3"], "p7: the chat template refuses the conversation: no roles"),
        ("<u>{{ messages[0]['content'] }}<a>", ["so 3"], "does not show the answer as it is: 'so 3'"),
        (TEMPLATE, ["so", "\n"], r"p7: step 1 leaves no text"),
    ],
)
def test_answers_that_do_not_render(template, steps, message):
    with pytest.raises(ValueError, match=message):
        render(tokenizer(template), "so 3", steps, where="p7")


def test_errors_of_the_format():
    with pytest.raises(ValueError, match=r"must contain '\{step\}'; got 'Step'"):
        Format(step="Step")
    with pytest.raises(ValueError, match="a system prompt needs a tokenizer with a chat template"):
        render(tokenizer(None), "1", ["2"], Format(system_prompt="so"))
    with pytest.raises(ValueError, match="need a fast tokenizer"):
        render(object(), "1", ["2"])


def test_straddling_tokens():
    """Text "pp|ab|cd|ee": problem 0-2, steps end at 4, 6, 8, template from 8. A token counts for its last character."""
    offsets = [(0, 1), (1, 3), (3, 5), (5, 6), (6, 7), (7, 9), (9, 10), (0, 0)]
    assert token_steps(offsets, [4, 6, 8], 2, 8) == [-1, 0, 1, 1, 2, 2, -1, -1]
    assert token_steps([(2, 6), (6, 8)], [4, 6, 8], 2, 8) == [1, 2]  # step 0 is swallowed whole
    assert token_steps([(2, 3), (2, 3), (3, 4)], [4], 2, 4) == [0, 0, 0]  # the bytes of one character


def test_a_real_bpe_that_merges_over_the_boundary():
    """Merges " so" and "3.\\n\\n": the newline token that holds "3." stays with its step."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<eos>", "1", "3", ".", "\n", "s", "o", " ", ".\n", ".\n\n", "3.\n\n", "so", "\nso", "3\nso"]
    merges = [(".", "\n"), (".\n", "\n"), ("3", ".\n\n"), ("s", "o"), ("\n", "so"), ("3", "\nso")]
    bpe = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")
    rendered = render(fast, "1", ["3.", "so"])
    assert [rendered.text[a:b] for a, b in rendered.offsets] == ["1", "\n", "\n", "3.\n\n", "so"]
    assert rendered.step_of == [-1, -1, -1, 0, 1]
    joined = render(fast, "1", ["3", "so"], Format(joiner="\n"))  # "3\nso" is one token: it knows step 1
    assert [rendered.text[a:b] for a, b in rendered.offsets][-1] == "so"
    assert joined.step_of == [-1, -1, -1, 1]
