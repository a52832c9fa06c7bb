"""bfloat16 weights learn through float32 copies: small steps add up, and neither checkpoint nor result loses them."""

import pytest
import torch
from torch import nn

from ipvrm_core.trainer import checkpoint
from ipvrm_core.trainer.config import Optim
from ipvrm_core.trainer.optim import (
    MasterAdamW,
    apply_step,
    install,
    keep_moments_on,
    make_optimizer,
    set_weights,
    trained_weights,
    vanishing_steps,
)

SMALL = Optim(lr=5e-7)


def linear(dtype=torch.bfloat16) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3, dtype=dtype)


def steps(model, optimizer, optim, count, start=0):
    for step in range(start + 1, start + count + 1):
        model(torch.ones(2, 4, dtype=model.weight.dtype)).sum().backward()
        apply_step(optimizer, optim, step, 10_000)


def test_a_step_of_5e_7_vanishes_in_bfloat16_alone():
    """What is prevented: torch's AdamW on bfloat16 weights."""
    model = linear()
    before = model.weight.detach().clone()
    plain = torch.optim.AdamW(model.parameters(), lr=5e-7, weight_decay=0.0)
    steps(model, plain, SMALL, 50)
    assert torch.equal(model.weight, before)


def test_a_step_of_5e_7_is_in_the_master_weights():
    model = linear()
    before = model.weight.detach().float()
    optimizer = make_optimizer(model, SMALL)
    steps(model, optimizer, SMALL, 1)
    weight = trained_weights(model, optimizer)["weight"]
    assert weight.dtype == torch.float32
    torch.testing.assert_close(before - weight, torch.full((3, 4), 5e-7), rtol=0.2, atol=0)
    assert torch.equal(model.weight.float(), before)  # too small to be seen there yet
    steps(model, optimizer, SMALL, 399, start=1)
    assert not torch.equal(model.weight.float(), before)  # 400 of them are not, for the smallest weights
    torch.testing.assert_close(model.weight, trained_weights(model, optimizer)["weight"].bfloat16(), rtol=0, atol=0)


def test_the_steps_are_those_of_float32_training():
    """The same gradients (a linear sum: they do not depend on the weights), the same float32 weights."""
    low, full = linear(), linear(torch.float32)
    with torch.no_grad():
        for ours, theirs in zip(full.parameters(), low.parameters(), strict=True):
            ours.copy_(theirs)
    optim = Optim(lr=1e-3, weight_decay=0.01)
    first, second = make_optimizer(low, optim), make_optimizer(full, optim)
    assert isinstance(first, MasterAdamW)
    assert type(second) is torch.optim.AdamW
    steps(low, first, optim, 5)
    steps(full, second, optim, 5)
    for name, weight in trained_weights(low, first).items():
        torch.testing.assert_close(weight, trained_weights(full, second)[name], rtol=0, atol=0)


def test_gradients_of_micro_batches_are_added_in_float32():
    """1 + 2^-9 is 1 in bfloat16."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    optimizer = make_optimizer(model, SMALL)
    for value in (1.0, 2.0**-9):
        model(torch.full((1, 1), value, dtype=torch.bfloat16)).sum().backward()
    assert model.weight.grad is None
    assert optimizer.param_groups[0]["params"][0].grad.item() == 1 + 2.0**-9


def test_only_low_precision_weights_have_copies():
    model = nn.Sequential(linear(), linear(torch.float32))
    optimizer = make_optimizer(model, SMALL)
    same = [parameter is master for parameter, master in optimizer.pairs]
    assert same == [False, False, True, True]


def test_a_checkpoint_keeps_the_copies(tmp_path):
    optim = Optim(lr=1e-4)

    def fresh():
        model = linear()
        return model, make_optimizer(model, optim)

    straight, optimizer = fresh()
    steps(straight, optimizer, optim, 6)
    cut, other = fresh()
    steps(cut, other, optim, 3)
    checkpoint.save(tmp_path, 3, {"m": cut}, {"m": other}, {})
    resumed, third = fresh()
    assert checkpoint.load(tmp_path, {"m": resumed}, {"m": third})["step"] == 3
    steps(resumed, third, optim, 3, start=3)
    for name, weight in trained_weights(straight, optimizer).items():
        assert torch.equal(weight, trained_weights(resumed, third)[name])
    assert torch.equal(straight.weight, resumed.weight)


def test_what_is_installed_has_every_step(tmp_path):
    model = linear()
    optimizer = make_optimizer(model, SMALL)
    steps(model, optimizer, SMALL, 1)
    kept = {name: weight.clone() for name, weight in trained_weights(model, optimizer).items()}
    steps(model, optimizer, SMALL, 3, start=1)
    set_weights(model, optimizer, kept)
    install(model, trained_weights(model, optimizer))
    assert model.weight.dtype == torch.float32
    assert torch.equal(model.weight, kept["weight"])


def test_a_training_that_could_not_be_seen_is_announced():
    """Weights of 0.02: half a rounding step is 0.02 / 2^9 = 3.9e-5, that is 78 steps of 5e-7."""
    model = linear()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.02)
    assert "never change" in vanishing_steps(model, SMALL, 77)
    assert vanishing_steps(model, SMALL, 80) is None
    assert vanishing_steps(linear(torch.float32), SMALL, 1) is None


@pytest.mark.slow
def test_a_whole_reward_model_in_bfloat16(tiny_experiment, tmp_path, monkeypatch):
    """lr 5e-7: the saved model is float32 and differs from its start by about lr x steps, everywhere."""
    import json

    from ipvrm_core.trainer.experiment import Experiment
    from ipvrm_core.trainer.phases import train_rm

    path = tmp_path / "chats.jsonl"
    with path.open("w") as file:
        for n in range(20):
            for label, answer in ((1, f"#{n % 10};"), (0, f"#{(n + 3) % 10}=")):
                chat = [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": answer}]
                file.write(json.dumps({"conversation": chat, "label": label}) + "\n")
    data = {"path": str(path), "kind": "pointwise"}
    experiment = tiny_experiment(rm={"x": {"data": data, "steps": 4, "batch": 8, "optim": {"lr": 5e-7}}})
    start = experiment.start_policy().bfloat16()
    before = {name: parameter.detach().float().clone() for name, parameter in start.model.named_parameters()}
    monkeypatch.setattr(Experiment, "start_policy", lambda self: start)
    train_rm.run(experiment, "x")
    after = dict(experiment.load(experiment.run / "rm/x/model").model.named_parameters())
    moved = [(after[name] - before[name]).abs() for name in before]
    assert all(0 < change.max() < 4.1 * 5e-7 for change in moved)


# ---- moments elsewhere


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_that_wait_on_the_cpu_change_nothing(tmp_path, dtype):
    """Weights and moments, with a checkpoint in the middle."""
    found = []
    for offload in (False, True):
        optim = Optim(lr=1e-2, offload=offload)
        model = linear(dtype)
        optimizer = make_optimizer(model, optim)
        steps(model, optimizer, optim, 3)
        checkpoint.save(tmp_path / str(offload), 3, {"model": model}, {"model": optimizer}, {})
        other = linear(dtype)
        other_optimizer = make_optimizer(other, optim)
        checkpoint.load(tmp_path / str(offload), {"model": other}, {"model": other_optimizer})
        steps(other, other_optimizer, optim, 2, start=3)
        moments = {key: value for entry in other_optimizer.state.values() for key, value in entry.items()}
        found.append({**moments, **dict(other.named_parameters())})
        assert hasattr(optimizer, "moments_on") == offload
    assert found[0].keys() == found[1].keys() >= {"exp_avg", "exp_avg_sq", "step"}
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_moments_wait_where_they_are_told():
    model = linear(torch.float32)
    optimizer = make_optimizer(model, Optim(lr=1e-2))
    keep_moments_on(optimizer, torch.device("meta"))  # memory that holds nothing shows where they went
    steps(model, optimizer, Optim(lr=1e-2), 1)
    for entry in optimizer.state.values():
        assert {key: value.device.type for key, value in entry.items()} == {
            "step": "cpu",
            "exp_avg": "meta",
            "exp_avg_sq": "meta",
        }
