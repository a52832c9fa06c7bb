"""What a configuration may contain: everything else is refused with the key and what came."""

import json
import tomllib
import types
import typing
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from ipvrm_core.presets import PRESETS, Preset
from ipvrm_core.trainer import cli
from ipvrm_core.trainer.config import Config, ConfigError, Section, check, load

SHIPPED = sorted((Path(__file__).resolve().parents[1] / "trainer" / "configs").glob("*.toml"))
BASE = """
name = "base"
model.scratch = { hidden_size = 128, layers = 2 }
data = { task = "chain", task_args = { min_ops = 4, max_ops = 8 } }
test = { task = "chain", task_args = { min_ops = 4, max_ops = 8 } }
verifier.kind = "exact"
generation = { max_new_tokens = 64, batch = 512 }
sft = { steps = 190, batch = 128, optim = { lr = 2e-3, warmup = 10 } }
rollout = { prompts = 2048, samples = 8, held_out = 128, batch = 64 }
eval = { prompts = 512, samples = 8 }

[rm.ipvrm]
objective = "ipvrm"
args = { beta = 10.0, margin = 5.0 }

[rm.implicit_prm]
objective = "implicit_prm"

[rl.grpo]
method = { prompts = 64, keep_prompts = 32, rollouts = 8 }

[rl.distrl]
method = { prompts = 64, keep_prompts = 32, rollouts = 8, alpha = 1.0, gae_coef = 0.0 }
reward_model = { name = "ipvrm", update = "before", optim = { lr = 1e-4 } }
"""
TASK = {"task": "chain", "task_args": {"min_ops": 1, "max_ops": 2}}
LEAST = {"model": {"scratch": {}}, "data": TASK, "test": TASK}


@pytest.fixture
def base(tmp_path) -> Path:
    path = tmp_path / "base.toml"
    path.write_text(BASE)
    return path


@pytest.fixture
def refused(base):
    """refused(*overrides) -> the message."""

    def message(*overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load(base, list(overrides))
        return str(caught.value)

    return message


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_configuration_loads(path):
    config = load(path)
    assert check(json.loads(config.model_dump_json())) == config


def test_the_demo_has_the_values_of_its_file():
    (path,) = (path for path in SHIPPED if path.stem == "demo")
    raw, config = tomllib.loads(path.read_text()), load(path)
    assert config.name == raw["name"]
    assert config.sft.steps == raw["sft"]["steps"]
    assert config.sft.optim.lr == raw["sft"]["optim"]["lr"]
    for name, rl in raw["rl"].items():
        assert config.rl[name].steps == rl["steps"]
        assert {key: getattr(config.rl[name].resolved(), key) for key in rl["method"]} == rl["method"]
    assert set(config.rm) == set(raw["rm"])


def test_a_preset_fills_what_the_file_leaves_open(base):
    config = load(base)
    assert config.rm["ipvrm"].build().beta == 10.0
    assert config.rl["grpo"].reward_model is None
    distrl = config.rl["distrl"].resolved()
    assert (distrl.alpha, distrl.gae_coef) == (1.0, 0.0)
    assert distrl.p_min == PRESETS["paper"].p_min


def test_the_least_configuration_has_defaults():
    config = check(LEAST)
    assert config.sft is None
    assert config.rm == {}
    assert config.eval.temperature == 0.6
    assert config.generation.temperature == 1.0


@pytest.mark.parametrize(
    ("override", "key", "came"),
    [
        ("nonsense=1", "nonsense", "1"),
        ("sft.stepz=3", "sft.stepz", "3"),
        ("sft.optim.learning_rate=1.0", "sft.optim.learning_rate", "1.0"),
        ("model.scratch.depth=3", "model.scratch.depth", "3"),
        ("rl.grpo.alpha=1.0", "rl.grpo.alpha", "1.0"),
        ("generation.top_p=0.9", "generation.top_p", "0.9"),
        ("rl.distrl.reward_model.lr=1.0", "rl.distrl.reward_model.lr", "1.0"),
        ("rm.ipvrm.margin=4.0", "rm.ipvrm.margin", "4.0"),
    ],
)
def test_unknown_keys(override, key, came, refused):
    message = refused(override)
    assert f"{key}:" in message
    assert f"got {came}" in message


@pytest.mark.parametrize(
    ("override", "key", "came"),
    [
        ("sft.steps=many", "sft.steps", "'many'"),
        ("sft.steps=1.5", "sft.steps", "1.5"),
        ("sft.steps=0", "sft.steps", "0"),
        ("sft.steps=-1", "sft.steps", "-1"),
        ("sft.optim.lr=0", "sft.optim.lr", "0"),
        ("sft.optim.lr=nan", "sft.optim.lr", "nan"),
        ("sft.optim.schedule=sine", "sft.optim.schedule", "'sine'"),
        ("sft.optim.betas=[0.9]", "sft.optim.betas.1", "[0.9]"),
        ("sft=3", "sft", "3"),
        ("name=5", "name", "5"),
        ("seed=many", "seed", "'many'"),
        ("device=tpu", "device", "'tpu'"),
        ("precision=fp16", "precision", "'fp16'"),
        ("model.scratch.architecture=gpt2", "model.scratch.architecture", "'gpt2'"),
        ("model.lora={rank = 0}", "model.lora.rank", "0"),
        ("model.lora={dropout = 1.0}", "model.lora.dropout", "1.0"),
        ("data.task_args.min_ops=few", "data.task_args.min_ops", "'few'"),
        ("verifier.kind=nonsense", "verifier.kind", "'nonsense'"),
        ("verifier.timeout_s=0", "verifier.timeout_s", "0"),
        ("rollout.held_out=-1", "rollout.held_out", "-1"),
        ("eval.top_p=1.5", "eval.top_p", "1.5"),
        ("eval.temperature=0", "eval.temperature", "0"),
        ("generation.temperature=0", "generation.temperature", "0"),
        ("rl.grpo.preset=mine", "rl.grpo.preset", "'mine'"),
        ("rl.distrl.reward_model.update=sometimes", "rl.distrl.reward_model.update", "'sometimes'"),
        ("rl.grpo.kl_coef=-0.1", "rl.grpo.kl_coef", "-0.1"),
        ("rm.ipvrm.args.margin=wide", "rm.ipvrm.args.margin", "'wide'"),
        ("rm.ipvrm.args.weighting=middle", "rm.ipvrm.args.weighting", "'middle'"),
        ("rm.ipvrm.pairing=all", "rm.ipvrm.pairing", "'all'"),
        ("sft.stop_accuracy=0", "sft.stop_accuracy", "0"),
        ("micro_batch_tokens=0", "micro_batch_tokens", "0"),
    ],
)
def test_wrong_types_and_ranges(override, key, came, refused):
    message = refused(override)
    assert f"{key}:" in message
    assert f"got {came}" in message


def test_every_offending_key_is_named_at_once(refused):
    message = refused("sft.steps=many", "nonsense=1", "eval.prompts=0")
    assert all(key in message for key in ("sft.steps", "nonsense", "eval.prompts"))


@pytest.mark.parametrize("missing", ["model", "data", "test"])
def test_missing_section(missing):
    with pytest.raises(ConfigError, match=rf"\b{missing}: Field required"):
        check({name: value for name, value in LEAST.items() if name != missing})


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        # Model
        (["model.path=some/model"], ["model:", "path='some/model'", "scratch="]),
        (["model={}"], ["model:", "path=None", "scratch=None"]),
        (["model.gguf_file=a.gguf"], ["model:", "gguf_file", "path"]),
        # Source
        (["data.path=a.jsonl"], ["data:", "task='chain'", "path='a.jsonl'"]),
        (["test={}"], ["test:", "task=None", "path=None"]),
        (["data.task=sudoku"], ["data:", "'sudoku'"]),
        (["test.task_args={min_ops = 5, max_ops = 2}"], ["test:", "min_ops=5", "max_ops=2"]),
        (["test.task_args.depth=3"], ["test:", "depth"]),
        # RewardModel
        (["rm.ipvrm.batch=63"], ["rm.ipvrm:", "batch", "even", "63"]),
        (["rm.ipvrm.objective=nonsense"], ["rm.ipvrm:", "objective", "'nonsense'"]),
        (["rm.ipvrm.args.slope=1"], ["rm.ipvrm:", "args", "slope", "margin"]),
        (["rm.implicit_prm.args.margin=1"], ["rm.implicit_prm:", "args", "margin"]),
        (["rm.ipvrm.objective=dpo", "rm.ipvrm.args={}", "rm.ipvrm.pairing=none"], ["rm.ipvrm:", "pairing", "'dpo'"]),
        (
            ["rm.ipvrm.objective=qrm", "rm.ipvrm.args={}", "rm.ipvrm.stop_metric=held_out_ece_100"],
            ["rm.ipvrm:", "stop_metric", "'qrm'"],
        ),
        (["rm.ipvrm.stop_metric=held_out_auc", "rollout.held_out=0"], ["rm.ipvrm.stop_metric", "rollout.held_out"]),
        (
            ["rm.ipvrm.data={path = 'a', kind = 'pairwise', validation = 0}", "rm.ipvrm.stop_metric=held_out_auc"],
            ["rm.ipvrm:", "stop_metric", "data.validation"],
        ),
        (
            ["rm.ipvrm.data={path = 'a', kind = 'pairwise', reference = 'b'}"],
            ["rm.ipvrm.data.reference", "rl.distrl", "'b'"],
        ),
        # Rl
        (["rl.grpo.method.keep_prompts=65"], ["rl.grpo:", "keep_prompts", "64", "65"]),
        (["rl.grpo.method.keep_prompts=0"], ["rl.grpo:", "keep_prompts", "0"]),
        (["rl.grpo.method.rollouts=1"], ["rl.grpo:", "rollouts", "1"]),
        (["rl.grpo.method.clip_low=1.5"], ["rl.grpo:", "clip_low", "1.5"]),
        (["rl.grpo.method.candidate_clip_high=-1"], ["rl.grpo:", "candidate_clip_high", "-1"]),
        (["rl.grpo.method.dual_clip=1.0"], ["rl.grpo:", "dual_clip", "1.0"]),
        (["rl.grpo.method.alpha=-1"], ["rl.grpo:", "alpha", "-1"]),
        (["rl.grpo.method.p_min=0"], ["rl.grpo:", "p_min", "0"]),
        (["rl.grpo.method.top_k=-2"], ["rl.grpo:", "top_k", "-2"]),
        (["rl.grpo.method.gamme=1"], ["rl.grpo:", "method", "gamme", "gamma"]),
        # Config
        (["rollout.held_out=2048"], ["rollout.held_out", "rollout.prompts", "2048"]),
        (["rl.distrl.reward_model.name=other"], ["rl.distrl.reward_model.name", "ipvrm", "'other'"]),
        (["rm.a/b.objective=ipvrm"], ["folders", "'a/b'"]),
        (["rl.start.steps=3"], ["rl.start"]),
        (
            ["rm.pairs.objective=dpo", "rl.distrl.reward_model.name=pairs"],
            ["rl.distrl.reward_model.update", "'dpo'", "'before'"],
        ),
        (["test.task=let_graph", "test.task_args={}"], ["test.task", "'chain'", "'let_graph'"]),
        (["data={path = 'a.jsonl'}"], ["sft", "solution_column"]),
    ],
)
def test_impossible_combinations(overrides, parts, refused):
    message = refused(*overrides)
    assert all(part in message for part in parts), message


def test_reward_models_need_rollouts():
    with pytest.raises(ConfigError, match=r"rm needs a \[rollout\] section"):
        check({**LEAST, "rm": {"ipvrm": {}}})


def test_reward_models_with_chats_of_their_own_need_no_rollouts():
    config = check({**LEAST, "rm": {"ipvrm": {"data": {"path": "a.jsonl", "kind": "pointwise"}}}})
    assert config.rm["ipvrm"].data.on_long == "error"


def test_a_pairwise_reward_model_may_stay_as_it_is(base):
    config = load(base, ["rm.pairs.objective=dpo", "rl.distrl.reward_model={name = 'pairs', update = 'none'}"])
    assert config.rm["pairs"].args == {"beta": 0.05}


def test_bfloat16_is_possible_with_and_without_lora(base):
    assert load(base, ["model.dtype=bfloat16"]).model.lora is None
    assert load(base, ["model.dtype=bfloat16", "model.lora={}"]).model.lora.rank == 128


# ---- overrides


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("sft.steps=7", lambda c: c.sft.steps == 7),
        ("sft.optim.lr=2.5e-4", lambda c: c.sft.optim.lr == 2.5e-4),
        ("wandb=true", lambda c: c.wandb is True),
        ("name=other", lambda c: c.name == "other"),  # a bare word
        ('name="two words"', lambda c: c.name == "two words"),
        ("name=a=b", lambda c: c.name == "a=b"),  # the first = separates
        ("name=", lambda c: c.name == ""),
        ("sft.optim.betas=[0.8, 0.95]", lambda c: c.sft.optim.betas == (0.8, 0.95)),
        ("data.task_args={min_ops = 2, max_ops = 3}", lambda c: c.data.task_args == {"min_ops": 2, "max_ops": 3}),
        ("rl.new.steps=3", lambda c: c.rl["new"].steps == 3),  # a new table
        ("rm.ipvrm.args.margin=1.5", lambda c: c.rm["ipvrm"].build().margin == 1.5),
        ("rl.distrl.method.dual_clip=3", lambda c: c.rl["distrl"].resolved().dual_clip == 3.0),
    ],
)
def test_overrides(override, read, base):
    assert read(load(base, [override]))


def test_later_overrides_win(base):
    assert load(base, ["sft.steps=7", "sft.steps=8"]).sft.steps == 8


@pytest.mark.parametrize("override", ["sft.steps", "=7", ""])
def test_bad_overrides(override, refused):
    assert f"got {override!r}" in refused(override)


def test_an_override_inside_a_value(refused):
    message = refused("name.first=x")
    assert "name.first=x" in message
    assert "not a table" in message


def test_a_file_that_is_missing_or_is_no_toml(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        load(tmp_path / "nowhere.toml")
    (tmp_path / "broken.toml").write_text("steps = = 3")
    with pytest.raises(ConfigError, match=r"broken\.toml"):
        load(tmp_path / "broken.toml")


# ---- presets


WRONG = {float: "much", int: 1.5, bool: "perhaps", str: "nonsense"}


@pytest.mark.parametrize("field", fields(Preset), ids=lambda field: field.name)
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_field_of_a_preset_is_checked_and_reaches_the_method(field, preset):
    """A value of another type is refused with the whole key; the value of the other preset is accepted and arrives."""

    def with_method(value):
        return check({**LEAST, "rl": {"x": {"preset": preset, "method": {field.name: value}}}})

    with pytest.raises(ConfigError) as caught:
        with_method(["nonsense"])
    assert f"rl.x.method.{field.name}" in str(caught.value)
    assert "got ['nonsense']" in str(caught.value)

    (other,) = set(PRESETS) - {preset}
    if field.name in ("prompts", "keep_prompts"):  # they depend on each other
        other = preset
    value = getattr(PRESETS[other], field.name)
    if field.name == "offline_margin":  # would be ignored there, so it is refused
        with pytest.raises(ConfigError, match=r"method\.offline_margin belongs to the reward model"):
            with_method(value)
        return
    rl = with_method(value).rl["x"]
    assert asdict(rl.resolved()) == {**asdict(PRESETS[preset]), field.name: value}
    assert rl.method == asdict(rl.resolved())


@pytest.mark.parametrize("word", ["sft.steps=true", 'sft.steps="5"', "sft.steps=4.0", "sft.optim.lr=nan"])
def test_values_of_another_kind_are_not_converted(refused, word):
    assert word.split("=")[0] in refused(word)


def test_a_beta_for_the_policy_run_is_refused(refused):
    assert "method.beta belongs to the reward model" in refused("rl.distrl.method.beta=5.0")


# ---- the resolved configuration


def test_resolved_configuration_survives_json(base):
    config = load(base, ["rl.distrl.preset=official", "rl.distrl.optim.betas=[0.5, 0.6]"])
    text = config.model_dump_json()
    assert Config.model_validate_json(text) == config
    assert check(json.loads(text)) == config
    assert json.loads(text)["rl"]["distrl"]["method"]["top_k"] == 5  # what runs, not what was written


def test_experiment_writes_it_once(tiny_experiment, tiny_config, tmp_path):
    from ipvrm_core.trainer.experiment import Experiment

    tiny_experiment(rollout={"prompts": 8, "held_out": 2}, rm={"a": {}}, rl={"b": {"reward_model": {"name": "a"}}})
    path = tmp_path / "run" / "config.json"
    assert check(json.loads(path.read_text())) == tiny_config(
        rollout={"prompts": 8, "held_out": 2}, rm={"a": {}}, rl={"b": {"reward_model": {"name": "a"}}}
    )
    before = path.read_text()
    with pytest.raises(ConfigError, match=r"\(differing: .*eval\.prompts.*\)"):
        Experiment(tiny_config(eval={"prompts": 3}), tmp_path / "run")
    assert path.read_text() == before


# ---- the command line


def _leaves(section: type[Section], prefix: str = "") -> list[str]:
    """Every key that holds a value, found from the annotations alone."""
    keys = []
    for name, field in section.model_fields.items():
        is_table = typing.get_origin(field.annotation) is dict
        nested = [kind for kind in _flat(field.annotation) if isinstance(kind, type) and issubclass(kind, Section)]
        if nested:
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
    assert sorted(listed) == sorted(expected)


def test_config_tells_type_default_and_meaning(capsys):
    cli.main(["config"])
    lines = {line.split(":")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "default 0.6" in lines["eval.temperature"]
    assert "k of avg@k" in lines["eval.samples"]
    assert "required" in lines["rl.<name>.reward_model.name"]


COMMANDS = ("sft", "rollout", "train-rm", "distrl", "eval", "run", "report", "config")


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
        (["distrl", "--name", "nope"], ["--name", "grpo", "distrl", "'nope'"]),
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


def test_a_bare_name_is_a_shipped_configuration():
    assert load("demo").rl.keys() == {"grpo", "grpo_ipvrm", "distrl"}
    with pytest.raises(ConfigError, match=r"one of demo, .*got nothing_of_the_kind"):
        load("nothing_of_the_kind")


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
