"""Configurations read from a file, with overrides, and written down as they run."""

import json

import pytest

from ipvrm_core.trainer.config import Config, ConfigError, check, load


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


def test_a_bare_name_is_a_shipped_configuration():
    assert load("demo").rl.keys() == {"grpo", "distrl", "oracle"}
    with pytest.raises(ConfigError, match=r"one of credit, demo, .*got nothing_of_the_kind"):
        load("nothing_of_the_kind")


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
