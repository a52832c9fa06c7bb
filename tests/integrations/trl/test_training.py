"""DistRL through TRL's own training loop: LoRA, checkpointing, accumulation, resuming, evaluation, bfloat16."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trl import GRPOTrainer

from ipvrm_core.integrations.trl import DistRL, DistRLMixin, DistRLTrainer
from tests.integrations.trl import cases

ONLINE = {"online": "before", "learning_rate": 1e-3}


def trained(build, config=(), distrl=(), resume=None, **arguments):
    trainer = build({"learning_rate": 1e-3, **dict(config)}, distrl, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def numbers(trainer, name: str) -> list[float]:
    return [float(line[name]) for line in trainer.state.log_history if name in line]


@pytest.mark.parametrize("fused", [False, True])
def test_candidates_change_what_is_learnt(build, fused):
    with_candidates = trained(build, {}, {"alpha": 1.0, "fused": fused}, rollout_func=cases.rollouts)
    without = trained(build, {}, {"alpha": 0.0, "fused": fused}, rollout_func=cases.rollouts)
    assert cases.largest_difference(cases.weights(with_candidates.model), cases.weights(without.model)) > 1e-4
    assert len(numbers(with_candidates, "distrl/loss_candidates")) == 2
    assert all(value > 1 for value in numbers(with_candidates, "distrl/candidates"))


@pytest.mark.parametrize("config", [{}, {"loss_type": "grpo", "beta": 0.02}], ids=["dapo", "grpo-beta"])
def test_fused_training_is_training(build, config):
    """Four steps on two generations, by SGD: Adam's step is as long where a gradient is rounding alone."""
    config = {"num_iterations": 2, "max_steps": 4, "optim": "sgd", "learning_rate": 0.01, **config}
    start = cases.weights(build(config, {}).model)
    plain, fused = (cases.weights(trained(build, config, {"alpha": 0.5, "fused": f}).model) for f in (False, True))
    assert cases.largest_difference(plain, start) > 1e-3
    assert cases.largest_difference(plain, fused) < 1e-7


def test_gradient_checkpointing(build):
    ends = []
    for on in (True, False):
        trainer = trained(build, {"gradient_checkpointing": on, "num_iterations": 2}, {"alpha": 0.5})
        assert trainer.model.is_gradient_checkpointing == on
        ends.append(cases.weights(trainer.model))
    assert cases.largest_difference(*ends) < 1e-6


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_accumulation_is_one_batch(build, loss_type):
    """Two micro-batches of 4 answers, in one optimizer step, and one of 8."""
    ends = []
    for size in (4, 8):
        how = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "loss_type": loss_type}
        trainer = trained(build, how, {"alpha": 0.5, **ONLINE}, rollout_func=cases.rollouts)
        ends.append((cases.weights(trainer.model), cases.weights(trainer.reward_model.asked.model)))
    for one, other in zip(*ends, strict=True):
        assert cases.largest_difference(one, other) < 2e-5


@pytest.mark.parametrize("online", [False, True], ids=["frozen", "online"])
def test_lora_with_a_reward_model_of_its_own(build, models, online):
    policy = cases.lora(cases.model_of(models, "tied"))
    before = cases.weights(policy)
    trainer = trained(build, {}, {"alpha": 0.5, **(ONLINE if online else {})}, policy=policy)
    after = cases.weights(policy)
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed
    assert all(".default." in name for name in changed)
    reward_model = cases.weights(trainer.reward_model.asked.model)
    start = cases.weights(cases.model_of(models, "reward"))
    assert (cases.largest_difference(reward_model, start) > 0) == online


@pytest.mark.parametrize("online", [False, True], ids=["frozen", "online"])
def test_the_reward_model_as_an_adapter_on_the_policys_base(build, models, online):
    """It scores as the same weights merged into a model of their own do, and learns nothing of the policy's."""
    policy = cases.lora(cases.model_of(models, "tied"), "judge")
    merged = cases.lora(cases.model_of(models, "tied"), "judge")
    merged.set_adapter("judge")
    merged = merged.merge_and_unload()
    d = {"alpha": 0.5, **(ONLINE if online else {})}
    given = {"rollout_func": cases.rollouts}
    shared = build({}, d, policy=policy, reward_model="judge", **given)
    if not online:
        apart = build({}, d, policy=cases.lora(cases.model_of(models, "tied")), reward_model=merged, **given)
        credits = [cases.generated(trainer)["advantages"] for trainer in (shared, apart)]
        torch.testing.assert_close(*credits, rtol=1e-3, atol=1e-4)
    before = cases.weights(policy)
    shared.train()
    changed = {name for name, value in cases.weights(policy).items() if not before[name].equal(value)}
    assert any(".default." in name for name in changed)
    assert any(".judge." in name for name in changed) == online
    assert all("lora_" in name for name in changed)
    assert policy.active_adapter == "default"


@pytest.mark.parametrize("policy", ["whole", "adapters"])
def test_resuming_from_trls_checkpoint_is_exact(build, models, tmp_path, policy):
    """Policy, reward model and its optimizer; 4 steps, and 2 and 2."""

    def run(max_steps: int, resume=None):
        chosen = {"policy": "tied", "reward_model": "reward"}
        if policy == "adapters":
            chosen = {"policy": cases.lora(cases.model_of(models, "tied"), "judge"), "reward_model": "judge"}
        config = {"save_strategy": "steps", "save_steps": 2, "max_steps": max_steps, "lr_scheduler_type": "constant"}
        return trained(build, config, {"alpha": 0.5, **ONLINE}, resume, **chosen)

    whole = run(4)
    first = tmp_path / "out" / "checkpoint-2"
    assert (first / "reward_model.pt").is_file()
    resumed = run(4, str(first))
    assert resumed.state.global_step == 4
    assert numbers(resumed, "distrl/rm_loss")[-2:] == numbers(whole, "distrl/rm_loss")[-2:]
    for one, other in ((whole, resumed),):
        assert cases.largest_difference(cases.weights(one.model), cases.weights(other.model)) == 0
        models_ = (cases.weights(trainer.reward_model.asked.model) for trainer in (one, other))
        assert cases.largest_difference(*models_) == 0


def test_evaluation(build):
    trainer = build({"per_device_eval_batch_size": 4}, {"alpha": 0.5, **ONLINE}, eval_dataset=cases.dataset(4))
    before = cases.weights(trainer.reward_model.asked.model)
    trainer.evaluate()
    assert numbers(trainer, "eval_distrl/candidates")[0] > 1
    assert (
        cases.largest_difference(before, cases.weights(trainer.reward_model.asked.model)) == 0
    )  # it only learns in training


def test_bfloat16_layers(build):
    """bf16=True on a CPU: the layers in bfloat16, head and loss in float32; near the float32 run."""
    losses = []
    for bf16 in (False, True):
        trainer = build({"bf16": bf16}, {"alpha": 0.5}, rollout_func=cases.rollouts)
        inputs = cases.generated(trainer)
        with trainer.compute_loss_context_manager():
            losses.append(trainer._compute_loss(trainer.model, inputs).item())
    assert losses[0] == pytest.approx(losses[1], rel=0.2, abs=0.02)
    assert losses[0] != losses[1]


def test_a_path_is_a_reward_model(build, models):
    one, other = (
        cases.generated(build({}, {}, reward_model=given, rollout_func=cases.rollouts))["advantages"]
        for given in ("reward", str(models["reward"]))
    )
    assert one.equal(other)


LIGER = """
import sys
from pathlib import Path

import torch
from transformers.models.qwen3 import modeling_qwen3

from ipvrm_core.bench.interpreter import patch_once
from tests.integrations.trl import cases

patch_once()
folder = Path(sys.argv[1])
models, ends = cases.save_models(folder), []
for on in (False, True):
    layers = {"use_liger_kernel": True, "liger_kernel_config": {"rms_norm": False, "swiglu": False}} if on else {}
    config = {"max_steps": 1, "per_device_train_batch_size": 4, **layers}
    trainer = cases.build(models, folder, config, {"alpha": 0.5}, rollout_func=cases.rollouts)
    trainer.train()
    assert modeling_qwen3.apply_rotary_pos_emb.__module__.startswith("liger_kernel") == on
    ends.append(cases.weights(trainer.model))
print("largest difference", cases.largest_difference(*ends))
"""


@pytest.mark.skipif(cases.VERSION < (1, 14), reason="refused there: see test_refused.py")
def test_liger_layers(tmp_path):
    """Its rotary embedding in Triton's interpreter, which cannot run its other layers; a step ends in equal weights."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": "."}
    command = [sys.executable, "-W", "ignore", "-c", LIGER, str(tmp_path)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout.split("largest difference")[1]) < 1e-6


def test_the_mixin_hides_nothing_of_trls(build):
    """Of TRL's names it has those alone that it extends."""
    theirs = set(dir(build({}, None)))
    trainer = build()
    ours = set(vars(DistRLMixin)) | (set(vars(trainer)) - set(vars(build({}, None))))
    extended = {"_calculate_rewards", "_generate_and_score_completions", "_compute_loss"}
    extended |= {"_save_checkpoint", "_load_from_checkpoint", "_load_optimizer_and_scheduler", "__init__"}
    assert {name for name in ours & theirs if not name.startswith("__")} == extended - {"__init__"}
    for name in extended - {"__init__"}:
        assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters)


def test_the_class_is_made_when_asked_for():
    assert issubclass(DistRLTrainer, GRPOTrainer)
    assert DistRLTrainer.__mro__[1] is DistRLMixin
    assert Path(inspect.getfile(DistRL)).parts[-3:] == ("integrations", "trl", "settings.py")
