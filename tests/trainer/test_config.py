"""What a configuration may contain: everything else is refused with the key and what came."""

import json
import re
import tomllib
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from ipvrm_core.method import METHODS, Method
from ipvrm_core.trainer.config import Batch, Chats, ConfigError, check, load
from ipvrm_core.trainer.config.policy import BATCHES
from ipvrm_core.trainer.pipeline import jobs_of

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "trainer" / "configs").glob("*.toml"))
TASK = {"task": "chain", "task_args": {"min_ops": 1, "max_ops": 2}}
LEAST = {"model": {"scratch": {}}, "data": TASK, "test": TASK}


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
        method = rl.get("method", {})
        assert {key: getattr(config.rl[name].resolved(), key) for key in method} == method
        assert {key: getattr(config.rl[name].batch, key) for key in rl["batch"]} == rl["batch"]
    assert set(config.rm) == set(raw["rm"])


def test_a_preset_fills_what_the_file_leaves_open(base):
    config = load(base)
    assert config.rm["ipvrm"].build().beta == 10.0
    assert config.rl["grpo"].reward_model is None
    distrl = config.rl["distrl"].resolved()
    assert (distrl.alpha, distrl.process_coef) == (1.0, 0.0)
    assert distrl.p_min == METHODS["paper"].p_min


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


def test_missing_model():
    with pytest.raises(ConfigError, match=r"\bmodel: Field required"):
        check({"data": TASK, "test": TASK})


# ---- runs that only train reward models on chats

CHATS = {"path": "a.jsonl", "kind": "pointwise"}
ON_CHATS = {"model": {"path": "some/model"}, "rm": {"x": {"data": CHATS}}}
FILE = {"path": "b.jsonl", "solution_column": "s"}


def test_reward_models_on_chats_need_neither_data_nor_test():
    config = check(ON_CHATS)
    assert (config.data, config.test, config.task) == (None, None, None)
    assert [job.key for job in jobs_of(config)] == ["rm.x", "eval", "report"]


@pytest.mark.parametrize(
    ("given", "missing", "reader"),
    [
        ({"sft": {}}, "data", "sft"),
        ({"sft": {"data": FILE, "stop_accuracy": 0.5}}, "data", "sft"),
        ({"sft": {"data": FILE}}, "test", "sft"),
        ({"rollout": {}}, "data", "rollout"),
        ({"rollout": {}, "data": FILE}, "test", "rollout"),
        ({"rl": {"grpo": {}}}, "data", "rl"),
        ({"rl": {"grpo": {}}, "data": FILE}, "test", "rl"),
        ({"rm": {"x": {"data": CHATS, "experts": 2}}}, "data", "rm.<name>.experts"),
        ({"model": {"scratch": {}}}, "data", "model.scratch"),
        ({"data": TASK}, "test", "the built-in task"),
        ({"eval": {"benchmarks": {"b": FILE}}}, "test", "eval.benchmarks"),
        ({"eval": {"rank_prompts": 3}}, "test", "eval.rank_prompts"),
        ({"eval": {"best_of_n": [4]}}, "test", "eval.best_of_n"),
        ({"rm": {}}, "test", "the evaluation"),
    ],
)
def test_what_reads_a_missing_section_is_named(given, missing, reader):
    with pytest.raises(ConfigError) as caught:
        check({**ON_CHATS, **given})
    (named,) = re.findall(r"\[(\w+)\] is missing; needed by (.*)", str(caught.value))
    assert named[0] == missing
    assert reader in named[1]


def test_experts_without_evaluation():
    assert check({**ON_CHATS, "data": FILE, "rm": {"x": {"data": CHATS, "experts": 2}}}).test is None


def test_a_file_for_validation_replaces_the_share():
    data = (
        check({**ON_CHATS, "rm": {"x": {"data": {**CHATS, "validation_path": "v.parquet", "limit": 5}}}}).rm["x"].data
    )
    assert (data.validation, data.validates) == (0, True)
    assert data.of_validation().model_dump() == {**Chats(**CHATS, validation=0).model_dump(), "path": "v.parquet"}
    assert (
        check({**ON_CHATS, "rm": {"x": {"data": data.model_dump(), "stop_metric": "held_out_auc"}}}).rm["x"].data
        == data
    )


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"validation_path": "v.jsonl", "validation": 0.1}, "validation must be 0 or left out .*; got 0.1"),
        ({"validation_path": "some/set"}, r"must be a .jsonl, .json, .parquet file; got 'some/set'"),
    ],
)
def test_a_file_for_validation_that_cannot_be(given, says):
    with pytest.raises(ConfigError, match=rf"rm\.x\.data: .*{says}"):
        check({**ON_CHATS, "rm": {"x": {"data": {**CHATS, **given}}}})


# ---- combinations


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
        (["rl.grpo.batch.keep_prompts=65"], ["rl.grpo:", "keep_prompts", "64", "65"]),
        (["rl.grpo.batch.keep_prompts=0"], ["rl.grpo.batch.keep_prompts", "got 0"]),
        (["rl.grpo.batch.rollouts=1"], ["rl.grpo:", "rollouts", "1"]),
        (["rl.grpo.method.clip_low=1.5"], ["rl.grpo:", "clip_low", "1.5"]),
        (["rl.grpo.method.candidate_clip_high=-1"], ["rl.grpo:", "candidate_clip_high", "-1"]),
        (["rl.grpo.method.dual_clip=1.0"], ["rl.grpo:", "dual_clip", "1.0"]),
        (["rl.grpo.method.alpha=-1"], ["rl.grpo:", "alpha", "-1"]),
        (["rl.grpo.method.p_min=0"], ["rl.grpo:", "p_min", "0"]),
        (["rl.grpo.method.top_k=-2"], ["rl.grpo:", "top_k", "-2"]),
        (["rl.grpo.method.aggregation=token_sum"], ["rl.grpo.method.aggregation", "'sequence_mean'", "'token_sum'"]),
        (["rl.grpo.method.sigma_max=-1"], ["rl.grpo.method:", "sigma_max", "-1"]),
        (
            ["rl.grpo.credit=oracle", "rl.grpo.method.alpha=0"],
            ["rl.grpo:", "credit = 'oracle'", "alpha = 0.0", "no reward_model"],
        ),
        (["rl.distrl.credit=oracle"], ["rl.distrl:", "credit = 'oracle'", "a reward_model"]),
        (
            ["rl.distrl.method.candidate_form=agreement", "rl.distrl.method.td_reference=sft"],
            ["rl.distrl.method:", "agreement", "candidate_form", "'sft'", "'ipvrm'"],
        ),
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


# ---- presets


WRONG = {float: "much", int: 1.5, bool: "perhaps", str: "nonsense"}


@pytest.mark.parametrize("field", fields(Method), ids=lambda field: field.name)
@pytest.mark.parametrize("preset", sorted(METHODS))
def test_every_field_of_a_preset_is_checked_and_reaches_the_method(field, preset):
    """A value of another type is refused with the whole key; the value of the other preset is accepted and arrives."""

    def with_method(value):
        return check({**LEAST, "rl": {"x": {"preset": preset, "method": {field.name: value}}}})

    with pytest.raises(ConfigError) as caught:
        with_method(["nonsense"])
    assert f"rl.x.method.{field.name}" in str(caught.value)
    assert "got ['nonsense']" in str(caught.value)

    value = getattr(METHODS["paper" if preset == "official" else "official"], field.name)
    rl = with_method(value).rl["x"]
    assert asdict(rl.resolved()) == {**asdict(METHODS[preset]), field.name: value}
    assert rl.method == asdict(rl.resolved())


@pytest.mark.parametrize("word", ["sft.steps=true", 'sft.steps="5"', "sft.steps=4.0", "sft.optim.lr=nan"])
def test_values_of_another_kind_are_not_converted(refused, word):
    assert word.split("=")[0] in refused(word)


@pytest.mark.parametrize(
    ("setting", "where"),
    [
        ("beta=5.0", "rm.<name>.args"),
        ("margin=5.0", "rm.<name>.args"),
        ("offline_margin=0.0", "rm.<name>.args (margin)"),
        ("prompts=64", "rl.<name>.batch"),
        ("too_few_mixed=fill", "rl.<name>.batch"),
    ],
)
def test_a_setting_of_the_method_that_stands_elsewhere(refused, setting, where):
    key = setting.split("=")[0]
    message = refused(f"rl.distrl.method.{setting}")
    assert f"rl.distrl: Value error, method.{key} is no setting of the method: set it in {where}" in message


OTHER = {
    "prompts": 600,
    "keep_prompts": 5,
    "rollouts": 7,
    "accuracy_range": (0.1, 0.9),
    "too_few_mixed": "fill",
    "max_rounds": 9,
}


@pytest.mark.parametrize("key", Batch.model_fields)
def test_every_setting_of_a_batch_starts_from_the_preset(key):
    """What is given arrives; the others are the preset's."""
    rl = check({**LEAST, "rl": {"x": {"batch": {key: OTHER[key]}}}}).rl["x"]
    paper = {**BATCHES["paper"], "accuracy_range": (0.0, 1.0), "max_rounds": 4}
    assert rl.batch.model_dump() == {**paper, key: OTHER[key]}
    assert check(json.loads(check({**LEAST, "rl": {"x": rl.model_dump()}}).model_dump_json())).rl["x"] == rl
