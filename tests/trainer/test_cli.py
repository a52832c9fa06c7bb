"""The command line: help, the list of keys, mistakes, and where overrides may stand."""

import os
import re
import signal
import subprocess
import sys
import types
import typing
from dataclasses import fields
from pathlib import Path

import jinja2
import pytest
from safetensors import SafetensorError

from ipvrm_core.method import Method
from ipvrm_core.trainer.commands import main as cli
from ipvrm_core.trainer.config import Config, Rl, Section, load


def _leaves(section: type[Section], prefix: str = "") -> list[str]:
    """Every key that holds a value, found from the annotations alone."""
    keys = []
    for name, field in section.model_fields.items():
        is_table = typing.get_origin(field.annotation) is dict
        nested = [kind for kind in _flat(field.annotation) if isinstance(kind, type) and issubclass(kind, Section)]
        if (section, name) == (Rl, "method"):
            keys += [f"{prefix}method.{setting.name}" for setting in fields(Method)]
        elif nested:
            keys += _leaves(nested[0], f"{prefix}{name}.{'<name>.' if is_table else ''}")
        else:
            keys.append(f"{prefix}{name}")
    return keys


def _flat(annotation) -> list:
    return [annotation] + [
        kind
        for part in typing.get_args(annotation)
        if isinstance(part, type | types.UnionType | types.GenericAlias)
        for kind in _flat(part)
    ]


def test_config_lists_every_key(capsys):
    assert cli.main(["config"]) == 0
    listed = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if line and line[0] != "["]
    expected = _leaves(Config)
    assert len(expected) > 80
    assert {"rm.<name>.optim.lr", "rl.<name>.reward_model.optim.lr", "model.lora.rank"} <= set(expected)
    assert {"rl.<name>.method.p_min", "rl.<name>.batch.prompts"} <= set(expected)
    assert sorted(listed) == sorted(expected)


def test_config_tells_type_default_and_meaning(capsys):
    cli.main(["config"])
    lines = {line.split(":")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "default 0.6" in lines["eval.temperature"]
    assert "k of avg@k" in lines["eval.samples"]
    assert "required" in lines["rl.<name>.reward_model.name"]
    rates = {"sft": "5e-05", "rm.<name>": "5e-07", "rl.<name>": "1e-06", "rl.<name>.reward_model": "0.0001"}
    for section, rate in rates.items():  # not that of the class, but of the section that holds it
        assert f"default {rate} - " in lines[f"{section}.optim.lr"]
    assert "float, default 0.1 - least probability" in lines["rl.<name>.method.p_min"]
    assert (
        "'raw' | 'group' | 'none', default paper 'raw', official 'group', ipvrm-core 'raw' - "
        in lines["rl.<name>.method.dlw_scale"]
    )


def test_no_key_lacks_a_meaning(capsys):
    cli.main(["config"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert [line for line in lines if line[0] != "[" and not re.search(r", (default .*|required) - \w", line)] == []
    assert [line for line in lines if line[0] == "[" and not re.search(r"\]  [A-Z]", line)] == []


COMMANDS = ("sft", "rollout", "train-rm", "rl", "eval", "run", "report", "config")


@pytest.mark.parametrize("words", [[], *([command] for command in COMMANDS)], ids=lambda words: " ".join(words) or "-")
def test_help(words, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([*words, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: ipvrm")
    if not words:
        assert all(command in text for command in COMMANDS)
    elif words != ["config"]:
        assert "--run" in text
        assert "--resume" in text


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["train-rm", "--name", "nope"], ["--name", "ipvrm", "implicit_prm", "'nope'"]),
        (["rl", "--name", "nope"], ["--name", "grpo", "distrl", "'nope'"]),
        (["rollout", "sft.steps=0"], ["sft.steps", "got 0"]),
        (["run", "--jobs", "0"], ["--jobs", "got 0"]),
        (["rollout"], ["sft/model", "does not exist"]),
        (["train-rm"], ["rollout"]),
    ],
)
def test_mistakes_on_the_command_line_end_with_status_2(words, parts, base, tmp_path, capsys):
    command, *more = words
    options = [word for word in more if "=" not in word]
    overrides = [word for word in more if "=" in word]
    assert cli.main([command, str(base), *overrides, *options, "--run", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"ipvrm {command}: ")
    assert all(part in message for part in parts), message
    assert "Traceback" not in message


def test_run_refuses_a_folder_that_is_not_empty(base, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert cli.main(["run", str(base), "--run", str(tmp_path / "run")]) == 2
    assert "--resume" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_the_resolved_file_takes_no_overrides(base, tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(load(base).model_dump_json())
    assert cli.main(["sft", str(path), "sft.steps=3", "--run", str(tmp_path / "run")]) == 2
    assert "override" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["sft", "demo", "--run", "r", "seed=3", "name=x"],
        ["sft", "demo", "seed=3", "--run", "r", "name=x"],
        ["sft", "demo", "seed=3", "name=x", "--run", "r", "--resume"],
    ],
)
def test_overrides_may_stand_anywhere(words):
    options = cli._parse(words)
    assert (options.config, options.overrides) == ("demo", ["seed=3", "name=x"])


@pytest.mark.parametrize("words", [["sft", "demo", "--run", "r", "--sed=3"], ["config", "seed=3"]])
def test_words_that_nothing_takes_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        cli._parse(words)
    assert "unrecognized" in capsys.readouterr().err


# ---- how a command ends


FAILURES = [
    SafetensorError("header too large"),
    jinja2.UndefinedError("'x' is undefined"),
    Exception("data did not match any variant of untagged enum ModelWrapper"),  # tokenizers
    re.error("unterminated character set"),
    ImportError("no module named 'x'"),
    MemoryError("cannot allocate"),
    OSError(28, "No space left on device"),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_an_expected_failure_is_one_line(failure, monkeypatch, capsys):
    monkeypatch.setattr(cli.configuration, "describe", lambda: (_ for _ in ()).throw(failure))
    assert cli.main(["config"]) == 2
    assert capsys.readouterr().err == f"ipvrm config: {failure}\n"
    with pytest.raises(type(failure)):
        cli.main(["--traceback", "config"])


@pytest.mark.parametrize("failure", [TypeError("ours"), KeyError("ours"), AssertionError("ours")], ids=repr)
def test_a_mistake_of_ours_shows_its_trace(failure, monkeypatch):
    monkeypatch.setattr(cli.configuration, "describe", lambda: (_ for _ in ()).throw(failure))
    with pytest.raises(type(failure)):
        cli.main(["config"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_one_line(number, monkeypatch, capsys):
    monkeypatch.setattr(cli.configuration, "describe", lambda: os.kill(os.getpid(), number))
    assert cli.main(["config"]) == 128 + number
    assert capsys.readouterr().err == f"ipvrm config: ended by {number.name}\n"


def test_a_reader_that_goes_away_is_no_failure():
    """`ipvrm config | head -1`, with a head that is sure to be gone."""
    root = Path(__file__).resolve().parents[2]
    code = "import sys; sys.stdin.read(); from ipvrm_core.trainer.commands.main import main; sys.exit(main(['config']))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    process.stdin.close()
    with process.stderr as errors:
        assert errors.read() == b""
    assert process.wait() == 128 + signal.SIGPIPE


def test_a_damaged_config_json_is_named(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text('{"name": ')
    assert cli.main(["sft", str(path), "--run", str(tmp_path / "run")]) == 2
    assert f"ipvrm sft: {path}: not JSON" in capsys.readouterr().err
