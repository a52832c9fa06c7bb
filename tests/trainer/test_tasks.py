"""The generated tasks: known answers by hand, labels against an independent reading, any garbage accepted."""

import os
import re
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipvrm_core.trainer.data.example import Example
from ipvrm_core.trainer.data.tasks import TASKS, ChainTask, LetGraphTask, make_task
from ipvrm_core.trainer.data.tasks.base import STYLES

CHAIN = Example("c", "5*5-6-3?", "6")
GRAPH = Example("g", "j=f+l;k=3;b=l+f;l=1;f=l-k;b?", "9")
CHAIN_TRACE = "5*5=5;5-6=9;9-3=6;#6"
GRAPH_TRACE = "k=3;l=1;f=l-k=1-3=8;b=l+f=1+8=9;#9"

both_tasks = pytest.mark.parametrize("task", [ChainTask(), LetGraphTask()], ids=lambda task: task.name)


@pytest.mark.parametrize(
    ("task", "example", "style", "trace"),
    [
        (ChainTask(), CHAIN, "train", CHAIN_TRACE),
        (ChainTask(), CHAIN, "terse", "5*5=5;-6=9;-3=6;#6"),
        (LetGraphTask(), GRAPH, "train", GRAPH_TRACE),
        (LetGraphTask(), GRAPH, "terse", "k=3;l=1;f=1-3=8;b=1+8=9;#9"),
    ],
)
def test_reference_trace_by_hand(task, example, style, trace):
    assert "".join(task.solve(example.prompt, style)) == trace
    assert task.step_labels(example, trace, style).first_error == -1


@pytest.mark.parametrize(
    ("response", "first_error"),
    [
        (CHAIN_TRACE, -1),
        ("5*5=4;4-6=8;8-3=5;#5", 0),  # wrong result
        ("5*5=5;5-6=1;1-3=8;#8", 1),  # wrong result, then consistent
        ("5*5=5;5+6=1;1-3=8;#8", 1),  # wrong operator
        ("5*5=5;5-7=8;8-3=5;#5", 1),  # wrong operand
        ("5*5=5;4-6=8;8-3=5;#5", 1),  # left operand is not the value stated
        ("5*5=5;5-6=9;9-3=6;#7", 3),  # wrong final digit
        ("5*5=5;5-6=9;#9", 2),  # stops computing too early
        ("5*5=5;5-6=9;", 2),  # nothing after two right steps
        ("5*5=5;5-6=9;9-3=6;", 3),  # no final answer
        ("5*5=5;5-6=9;9-3=6", 2),  # unclosed step
        ("5*5=5;5-6=9;9-3=6;#6;", 3),
        ("5*5=5;5-6=9;9-3=6;#66", 3),
        ("5*5=5;;5-6=9;9-3=6;#6", 1),
        ("", 0),
        ("#6", 0),
    ],
)
def test_chain_first_error_by_hand(response, first_error):
    assert ChainTask().step_labels(CHAIN, response).first_error == first_error


@pytest.mark.parametrize(
    ("response", "first_error"),
    [
        (GRAPH_TRACE, -1),
        ("l=1;k=3;f=l-k=1-3=8;b=l+f=1+8=9;#9", -1),  # another order
        ("k=3;l=1;f=l-k=1-3=8;j=f+l=8+1=9;b=l+f=1+8=9;#9", -1),  # a variable that is not needed
        ("k=4;l=1;f=l-k=1-4=7;b=l+f=1+7=8;#8", 0),  # wrong constant
        ("k=3;f=l-k=1-3=8;l=1;b=l+f=1+8=9;#9", 1),  # l is used before it is stated
        ("k=3;l=1;f=l-k=1-4=7;b=l+f=1+7=8;#8", 2),  # substitutes what was not stated
        ("k=3;l=1;f=k-l=3-1=2;b=l+f=1+2=3;#3", 2),  # another operation
        ("k=3;l=1;l=1;f=l-k=1-3=8;b=l+f=1+8=9;#9", 2),  # states l twice
        ("k=3;l=1;f=l-k=1-3=8;#9", 3),  # answers without the query's value
        ("k=3;l=1;z=2;#9", 2),
        ("k=3;l=1;f=l-k=1-3=8;b=l+f=1+8=9;", 4),
    ],
)
def test_let_graph_first_error_by_hand(response, first_error):
    assert LetGraphTask().step_labels(GRAPH, response).first_error == first_error


def test_step_spans_tile_the_response():
    assert ChainTask().step_labels(CHAIN, "5*5=5;x;;#6").steps == ((0, 6), (6, 8), (8, 9), (9, 11))


@pytest.mark.parametrize(
    ("response", "answer"),
    [("1+1=2;#2", "2"), ("#1;#3", "3"), ("#", None), ("2", None), ("#12", None), ("#x", None), ("#²", None)],
)
def test_answer_of(response, answer):
    assert ChainTask().answer_of(response) == answer


@pytest.mark.parametrize(
    ("response", "due"),  # `due`: the determined characters in place of what was written; ";" is not counted
    [
        (CHAIN_TRACE, CHAIN_TRACE),
        ("5*5=4;4-6=8;8-3=5;#6", "5*5=5;4-6=8;8-3=5;#5"),  # judged by what was stated
        ("5*5=5;5+6=1;1-3=8;#8", "5*5=5;5-"),  # another operation: nothing is determined after it
        ("5*5=x;5-6=9;", "5*5=5"),  # a digit was due, none came
        ("5*5=", "5*5="),  # nothing more was written
        ("5*5=55;", "5*5=5"),
        ("#5", "5"),  # too early: a first step was due
        ("", ""),
    ],
)
def test_chain_due_positions_by_hand(response, due):
    expected = [(at, character) for at, character in enumerate(due) if character != ";"]
    assert ChainTask().due_positions(CHAIN, response) == expected


def test_let_graph_due_positions_by_hand():
    task = LetGraphTask()
    assert task.due_positions(GRAPH, "l=2;k=3;f=l-k=2-3=8;#8") == [
        (2, "1"),
        (6, "3"),
        (14, "2"),
        (16, "3"),
        (18, "9"),
    ]
    # A wrong substitution leaves the rest of the step undetermined.
    assert task.due_positions(GRAPH, "k=3;l=1;f=l-k=1-5=6;b=l+f=1+6=7;") == [
        (2, "3"),
        (6, "1"),
        (14, "1"),
        (16, "3"),
    ]


def independent_answer(prompt: str) -> int:
    """The answer by Python's own evaluation, sharing nothing with the task's reading of a prompt."""
    if ";" not in prompt:
        value, *operations = re.findall(r"^\d|[-+*]\d", prompt)
        value = int(value)
        for operation in operations:
            value = eval(f"{value}{operation}") % 10
        return value
    *lines, query = prompt.split(";")
    definitions = dict(line.split("=") for line in lines)
    expression = query[0]
    while re.search("[a-z]", expression):
        expression = re.sub("[a-z]", lambda match: f"({definitions[match[0]]})", expression)
    return eval(expression) % 10


@both_tasks
def test_examples_are_right_and_within_the_alphabet(task):
    examples = task.examples(3, "train", 10, 200)
    assert len({example.prompt for example in examples}) > 190
    assert examples[5] == task.example(3, "train", 15)
    for example in examples:
        assert example.answer == str(independent_answer(example.prompt))
        assert task.answer_of(example.solution) == example.answer
        assert task.step_labels(example, example.solution).first_error == -1
        terse = "".join(task.solve(example.prompt, "terse"))
        assert set(example.prompt + example.solution + terse) <= set(task.alphabet)
    assert len(set(task.alphabet)) == len(task.alphabet)


def test_difficulty_bounds_hold():
    operations = Counter(len(e.prompt) // 2 - 1 for e in ChainTask(2, 4).examples(0, "train", 0, 300))
    assert set(operations) == {2, 3, 4}
    variables = Counter(e.prompt.count(";") for e in LetGraphTask(3, 5).examples(0, "train", 0, 300))
    assert set(variables) == {3, 4, 5}


@both_tasks
def test_splits_share_no_prompt(task):
    train = {e.prompt for seed in range(3) for e in task.examples(seed, "train", 0, 300)}
    test = {e.prompt for seed in range(3) for e in task.examples(seed, "test", 0, 300)}
    assert not train & test
    small = ChainTask(1, 1)  # 300 problems in all: both splits meet every one of theirs
    train = {e.prompt for e in small.examples(0, "train", 0, 3000)}
    test = {e.prompt for e in small.examples(0, "test", 0, 1000)}
    assert not train & test
    assert len(train | test) == 300


def test_examples_do_not_depend_on_the_hash_seed():
    code = (
        "from ipvrm_core.trainer.data.tasks import TASKS\n"
        "for task in TASKS.values():\n"
        "    print(task().examples(7, 'test', 0, 3), task().labelled_traces(7, 3, 'terse'))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    # Frozen: a change here changes every data set that was ever generated, and all results with it.
    assert ChainTask().example(0, "test", 0).prompt == "7*6*9*4*8+7?"
    assert LetGraphTask().example(0, "test", 0).prompt == "g=j+s;s=0;c=j-r;j=6;r=s-j;c?"


@both_tasks
@pytest.mark.parametrize("style", STYLES)
def test_labelled_traces_agree_with_the_step_labels(task, style):
    traces = task.labelled_traces(1, 400, style)
    wrong = [trace for trace in traces if trace.label >= 0]
    assert 150 < len(wrong) < 250
    for trace in traces:
        example = Example(trace.id, trace.prompt, str(independent_answer(trace.prompt)))
        response = "".join(trace.steps)
        check = task.step_labels(example, response, style)
        assert [response[start:end] for start, end in check.steps] == list(trace.steps)
        assert check.first_error == trace.label
        assert trace.final_answer_correct == (task.answer_of(response) == example.answer)
        assert set(response) <= set(task.alphabet)
    # Errors fall on every step, the final answer included.
    assert {trace.label for trace in wrong} >= set(range(4))
    assert any(trace.label == len(trace.steps) - 1 for trace in wrong)


@both_tasks
def test_styles_differ_in_format_only(task):
    train, terse = (task.labelled_traces(2, 100, style) for style in STYLES)
    for a, b in zip(train, terse, strict=True):
        assert (a.id, a.prompt, a.label, a.final_answer_correct) == (b.id, b.prompt, b.label, b.final_answer_correct)
        assert [step[-2:] for step in a.steps] == [step[-2:] for step in b.steps]
    assert all(a.steps != b.steps for a, b in zip(train, terse, strict=True) if len(a.steps) > 3)


def test_error_fraction_and_lucky_traces():
    task = ChainTask()
    assert {trace.label for trace in task.labelled_traces(0, 50, "train", error_fraction=0.0)} == {-1}
    traces = task.labelled_traces(0, 300, "train", error_fraction=1.0)
    assert all(trace.label >= 0 for trace in traces)
    # A later *0 wipes an error out: right answers through a wrong step exist, and are few.
    assert 5 < sum(trace.final_answer_correct for trace in traces) < 150
    with pytest.raises(ValueError, match=r"error_fraction must be within \[0, 1\]; got 2"):
        task.labelled_traces(0, 1, "train", error_fraction=2)


GARBAGE = st.text(alphabet="0123456789+-*=;#?abfjkl. é²\n", max_size=40)


@both_tasks
@settings(max_examples=200, deadline=None)
@given(garbage=GARBAGE, cut=st.integers(0, 40), style=st.sampled_from(STYLES))
def test_any_response_is_read(task, garbage, cut, style):
    example = CHAIN if task.name == "chain" else GRAPH
    trace = "".join(task.solve(example.prompt, style))
    response = trace[:cut] + garbage
    check = task.step_labels(example, response, style)
    assert "".join(response[start:end] for start, end in check.steps) == response
    assert -1 <= check.first_error <= len(check.steps)
    if check.first_error == -1:
        assert task.answer_of(response) == example.answer
    positions = task.due_positions(example, response, style)
    assert all(0 <= at < len(response) and len(digit) == 1 for at, digit in positions)
    if check.first_error == -1:
        assert all(response[at] == digit for at, digit in positions)


def test_errors_name_what_came():
    with pytest.raises(ValueError, match=r"unknown task 'sort'; expected one of \['chain', 'let_graph'\]"):
        make_task("sort")
    with pytest.raises(ValueError, match=r"no parameter \['ops'\]; expected some of \['min_ops', 'max_ops'\]"):
        make_task("chain", ops=3)
    with pytest.raises(ValueError, match="got min_ops=5, max_ops=4"):
        make_task("chain", min_ops=5, max_ops=4)
    with pytest.raises(ValueError, match="<= 26; got min_vars=3, max_vars=27"):
        make_task("let_graph", min_vars=3, max_vars=27)
    with pytest.raises(ValueError, match=r"split must be one of .* got 'dev'"):
        ChainTask().example(0, "dev", 0)
    with pytest.raises(ValueError, match=r"style must be one of .* got 'long'"):
        ChainTask().solve(CHAIN.prompt, "long")
    with pytest.raises(ValueError, match="expected a chain prompt such as '5"):
        ChainTask().step_labels(GRAPH, "")
    with pytest.raises(ValueError, match="uses variable 'z' without a definition"):
        LetGraphTask().solve("a=z+b;b=1;a?")
    with pytest.raises(ValueError, match="defines variable 'a' by itself"):
        LetGraphTask().solve("a=b+c;b=a+c;c=1;a?")
    with pytest.raises(ValueError, match="defines a variable twice"):
        LetGraphTask().solve("a=1;a=2;a?")
    assert make_task("let_graph", max_vars=5) == LetGraphTask(4, 5)
    assert sorted(TASKS) == ["chain", "let_graph"]
