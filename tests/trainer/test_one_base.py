"""Policy, reward model and reference as roles on one frozen base: the numbers of three models, the memory of one."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ipvrm_core.heads import causal_lm
from ipvrm_core.trainer import models
from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.config import Lora, check
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.metrics import computed
from ipvrm_core.trainer.models import OneBase, Role, checkpoint_activations, load_pretrained
from ipvrm_core.trainer.optim import make_optimizer
from ipvrm_core.trainer.phases import rl, rollout, sft, train_rm
from ipvrm_core.trainer.rl.step import rl_step
from tests import tiny_runs
from tests.tiny_runs import BATCH

RM = {"steps": 5, "batch": 16, "optim": {"lr": 1e-3}}
RMS = {"prefix": RM, "explicit": {**RM, "objective": "qrm"}, "free": {"objective": "endorm"}}
RL = {
    "steps": 4,
    "minibatch": 12,
    "batch": BATCH,
    "optim": {"lr": 1e-2},
    "kl_coef": 0.1,
    "method": {"alpha": 1.0, "online_reference": "sft"},
    "reward_model": {"name": "prefix", "update": "before", "batch": 8, "optim": {"lr": 1e-2}},
}
ANSWERS = [Answer([3, 4, 5], [6, 7, 1]), Answer([8], [9, 2, 4, 1])]


def config(lora=None, **more) -> dict:
    model = {**tiny_runs.BASE["model"], "lora": {"rank": 4, "alpha": 8.0, **(lora or {})}}
    return {**tiny_runs.BASE, "model": model, "rm": RMS, "rl": {"x": RL}, "checkpoint_every": 2, **more}


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A run folder with sft and rollouts of the whole model, and with reward models that are adapters."""
    folder = tmp_path_factory.mktemp("start")
    whole = Experiment(check(tiny_runs.BASE), folder / "whole")
    sft.run(whole)
    rollout.run(whole)
    for phase in ("sft", "rollout"):
        shutil.copytree(folder / "whole" / phase, folder / "lora" / phase)
    experiment = Experiment(check(config()), folder / "lora")
    for name in RMS:
        train_rm.run(experiment, name)
    return folder / "lora"


@pytest.fixture
def experiment(start, tmp_path):
    """make(adapters, **sections) -> Experiment that goes on from `start`."""
    count = iter(range(100))

    def make(lora=None, **more) -> Experiment:
        folder = tmp_path / str(next(count))
        for phase in ("sft", "rollout", "rm"):
            shutil.copytree(start / phase, folder / phase)
        return Experiment(check(config(lora, **more)), folder)

    return make


def _three_models(experiment: Experiment):
    """The learner of experiment's run x with a model of its own for each role, the same adapters on two of them."""
    from peft import PeftModel

    learner = rl.make_learner(experiment, "x")
    policy = experiment.trainable(experiment.start_policy(), "rl", "x")
    folder = experiment.run / "rm/prefix/model_adapter"
    given = PeftModel.from_pretrained(experiment.start_policy().model, folder, is_trainable=True)
    reward_model = experiment.sparing(experiment.language_model(given))
    settings = experiment.config.rl["x"]
    return replace(
        learner,
        policy=policy,
        sampler=experiment.sampler(policy),
        reward_model=reward_model,
        reference=experiment.start_policy().eval(),
        optimizers={
            "policy": make_optimizer(policy.model, settings.optim),
            "reward_model": make_optimizer(reward_model.model, settings.reward_model.optim),
        },
    )


def _roles(learner) -> tuple[LanguageModel, ...]:
    return learner.policy, learner.reward_model, learner.reference


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dropout", "checkpointing", "packing"),
    [(0.0, False, False), (0.3, False, False), (0.3, True, False), (0.0, True, True)],
    ids=["plain", "dropout", "dropout and checkpoints", "checkpoints and packing"],
)
def test_three_roles_on_one_base_are_three_models(experiment, dropout, checkpointing, packing):
    """Three steps that sample, update the reward model, credit and update the policy: each number and log-prob."""
    made = experiment({"dropout": dropout}, activation_checkpointing=checkpointing, packing=packing)
    learners = rl.make_learner(made, "x"), _three_models(made)
    before = [model.eval().logprobs(ANSWERS) for model in _roles(learners[0])]
    for step in (1, 2, 3):
        results = [rl_step(made, learner, step, 12 * step, lambda *_, **__: None) for learner in learners]
        (batch, numbers), (other_batch, other_numbers) = results
        assert batch.answers == other_batch.answers
        assert numbers.keys() == other_numbers.keys() >= {"rm_loss", "loss_sampled", "loss_candidates", "kl_ref"}
        for name, value in computed(numbers).items():
            assert value == pytest.approx(other_numbers[name], rel=1e-6, abs=1e-6), (step, name)
        for shared, own in zip(*map(_roles, learners), strict=True):
            shared.eval(), own.eval()
            torch.testing.assert_close(shared.logprobs(ANSWERS), own.logprobs(ANSWERS), rtol=0, atol=1e-6)
    after = [model.logprobs(ANSWERS) for model in _roles(learners[0])]
    assert (before[0] - after[0]).abs().max() > 1e-3  # the policy has learnt,
    assert (before[1] - after[1]).abs().max() > 1e-3  # the reward model too,
    assert torch.equal(before[2], after[2])  # and the reference has not moved


@pytest.mark.slow
def test_weights_are_there_once(experiment):
    made = experiment()
    learner, base = rl.make_learner(made, "x"), made.start_policy().model
    held = {p.data_ptr(): p.numel() for role in _roles(learner) for p in role.model.parameters()}
    adapters = [sum(p.numel() for p in role.model.parameters() if p.requires_grad) for role in _roles(learner)]
    assert adapters[0] == adapters[1] > 0
    assert adapters[2] == 0
    assert sum(held.values()) == sum(p.numel() for p in base.parameters()) + 2 * adapters[0]


@pytest.mark.slow
def test_saved_apart_and_gone_on_with(experiment, monkeypatch):
    """A run that is interrupted after its checkpoint ends in the adapters of one that is not, and so do the models."""
    from peft import PeftModel

    whole, broken = experiment(), experiment()
    rl.run(whole, "x")
    original = rl.rl_step

    def breaks(*given):
        if given[2] == 3:
            raise KeyboardInterrupt
        return original(*given)

    with monkeypatch.context() as patch:
        patch.setattr(rl, "rl_step", breaks)
        with pytest.raises(KeyboardInterrupt):
            rl.run(broken, "x")
    rl.run(broken, "x", resume=True)
    base = causal_lm(whole.start_policy().model)
    for role in ("model", "reward_model"):
        saved = [load_file(made.run / f"rl/x/{role}_adapter/adapter_model.safetensors") for made in (whole, broken)]
        assert saved[0].keys() == saved[1].keys()
        assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])
        merged = LanguageModel(load_pretrained(whole.run / f"rl/x/{role}")).logprobs(ANSWERS)
        apart = PeftModel.from_pretrained(whole.start_policy().model, whole.run / f"rl/x/{role}_adapter").eval()
        torch.testing.assert_close(LanguageModel(apart).logprobs(ANSWERS), merged, rtol=0, atol=1e-5)
        assert (merged - LanguageModel(base).logprobs(ANSWERS)).abs().max() > 1e-3
    kept = json.loads((whole.run / "rl/x/model_adapter/adapter_config.json").read_text())
    assert (kept["r"], kept["peft_type"]) == (4, "LORA")


@pytest.mark.slow
def test_value_heads_and_reward_models_without_training(experiment):
    """A value head stays with its role; a reward model that trains nothing is the base alone."""
    explicit = {"name": "explicit", "update": "none"}
    made = experiment(
        rl={
            "x": {**RL, "kl_coef": 0.0, "method": {"alpha": 0.0, "estimator": "td"}, "reward_model": explicit},
            "free": {**RL, "kl_coef": 0.0, "method": {}, "reward_model": {"name": "free", "update": "none"}},
        }
    )
    learner = rl.make_learner(made, "x")
    merged = made.load(made.run / "rm/explicit/model").eval()
    values = learner.reward_model.eval().values(ANSWERS)
    torch.testing.assert_close(values, merged.values(ANSWERS), rtol=0, atol=1e-5)
    assert values.abs().max() > 1e-3
    assert learner.policy.value_head is None
    assert not any(p.requires_grad for p in learner.reward_model.model.parameters())
    rl.run(made, "x")
    assert not (made.run / "rl/x/model/value_head.safetensors").exists()
    free = rl.make_learner(made, "free")
    assert torch.equal(free.reward_model.logprobs(ANSWERS), made.start_policy().eval().logprobs(ANSWERS))


# ---- switching


@pytest.fixture
def one(tiny_model) -> tuple[Role, Role, Role]:
    """Two adapters that are something, and none."""
    torch.manual_seed(0)
    base = OneBase(tiny_model(), Lora(rank=2, alpha=4.0, dropout=0.2), "first")
    roles = Role(base, "first"), base.add("second", trained=True), Role(base, None)
    with torch.no_grad():
        for key, parameter in base.model.named_parameters():
            if ".lora_B." in key:
                parameter.normal_(std=0.3)
    return roles


def _loss(role: Role) -> torch.Tensor:
    made = LanguageModel(role)
    torch.manual_seed(1)  # of the dropout
    return made.batch_logprobs(made.batch(ANSWERS)).sum()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_backward_pass_may_come_after_a_switch(one, checkpointing):
    """Gradients, and layers that are made again, are those of the role and the mode of the forward pass."""
    a, b, none = (role.train() for role in one)
    if checkpointing:
        checkpoint_activations(a)
    _loss(a).backward()
    expected = {key: p.grad.clone() for key, p in a.named_parameters() if p.requires_grad}
    a.zero_grad()
    loss = _loss(a)
    _loss(b.eval())
    none.eval()(input_ids=torch.tensor([[3, 4]]))
    loss.backward()
    assert len(expected) > 5
    found = {key: p.grad for role in (a, b) for key, p in role.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_each_role_is_seen_with_its_own_adapter_and_mode(one, tiny_model):
    a, b, none = one
    alone = LanguageModel(tiny_model()).logprobs(ANSWERS)
    seen = {name: LanguageModel(role.eval()).logprobs(ANSWERS) for name, role in zip("abn", one, strict=True)}
    assert torch.equal(seen["n"], alone)
    assert [list(role.peft_config) for role in one] == [["first"], ["second"], []]
    assert len({tuple(values.tolist()) for values in seen.values()}) == 3
    a.train()
    assert causal_lm(a).training
    assert not causal_lm(b).training
    assert (a.training, b.training, none.training) == (True, False, False)
    for role, name in zip(one, "abn", strict=True):
        assert torch.equal(LanguageModel(role.eval()).logprobs(ANSWERS), seen[name])
    assert set(dict(a.named_parameters())) & set(dict(b.named_parameters())) == set(dict(none.named_parameters()))


def test_merging_is_of_one_role_into_a_copy(one, tmp_path):
    from ipvrm_core.trainer.models.adapters import merged_weights

    none = [role.eval() for role in one][-1]
    before = {key: value.clone() for key, value in causal_lm(none).state_dict().items() if ".lora_" not in key}
    merged = {name: merged_weights(role) for name, role in zip("abn", one, strict=True)}
    key = next(key for key in merged["a"] if "q_proj" in key)
    assert not torch.equal(merged["a"][key], merged["b"][key])
    assert torch.equal(merged["n"][key], before[key.replace("q_proj.", "q_proj.base_layer.")])
    assert all(torch.equal(value, before[key]) for key, value in causal_lm(none).state_dict().items() if key in before)


def test_an_adapter_of_another_base(one, tmp_path, tiny_config):
    models.save_adapter(one[1], tmp_path / "adapter")
    scratch = tiny_config().model.scratch.model_copy(update={"layers": 1, "architecture": "llama"})
    tokenizer = models.character_tokenizer("0123456789+-*=?;#")
    other = OneBase(models.build_scratch(scratch, tokenizer), Lora(rank=2, target_modules=["q_proj"]), "first")
    weights = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert any("mlp" in key for key in weights)
    kept = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({**kept, "target_modules": ["q_proj"]}))
    with pytest.raises(ValueError, match="does not fit its base"):
        other.load(tmp_path / "adapter", "second", trained=True)
