"""Checkpoints: exact, whole or not at all."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from ipvrm_core.trainer import checkpoint, files
from ipvrm_core.trainer.config import Lora
from ipvrm_core.trainer.models import add_lora
from ipvrm_core.trainer.optim import make_optimizer
from tests.trainer.tiny_steps import OPTIM, same, suffixes_in, train_step, weights_of


@pytest.mark.parametrize("lora", [None, Lora(rank=3, alpha=6.0)], ids=["full", "lora"])
def test_a_step_after_restoring_equals_a_step_without_interruption(tiny_model, tmp_path, lora):
    def fresh(number: int):
        model = tiny_model(number)
        if lora:
            torch.manual_seed(number)
            model = add_lora(model, lora)
        return model, make_optimizer(model, OPTIM)

    model, optimizer = fresh(1)
    for step in (1, 2, 3):
        train_step(model, optimizer, step)
    checkpoint.save(tmp_path, 3, {"policy": model}, {"policy": optimizer}, {"cursor": 96})
    at_three = weights_of(model)
    for step in (4, 5):
        train_step(model, optimizer, step)

    other, other_optimizer = fresh(1 if lora else 2)  # with adapters the frozen base is the phase's start anyway
    if lora:
        with torch.no_grad():
            for parameter in checkpoint.trainable(other).values():
                parameter.add_(0.3)
    state = checkpoint.load(tmp_path, {"policy": other}, {"policy": other_optimizer})
    assert state == {"step": 3, "cursor": 96}
    assert same(weights_of(other), at_three)
    for step in (4, 5):
        train_step(other, other_optimizer, step)
    assert same(weights_of(other), weights_of(model))
    assert not same(weights_of(model), at_three)
    assert suffixes_in(tmp_path) == {".json", ".safetensors"}


def test_a_fresh_optimizer_would_not_do(tiny_model, tmp_path):
    """The test above can fail: without AdamW's moments the next step is another one."""
    results = []
    for optimizers in ({}, {"policy": True}):
        folder = tmp_path / str(len(results))
        model = tiny_model(1)
        optimizer = make_optimizer(model, OPTIM)
        train_step(model, optimizer, 1)
        checkpoint.save(folder, 1, {"policy": model}, {"policy": optimizer}, {})
        other = tiny_model(2)
        other_optimizer = make_optimizer(other, OPTIM)
        checkpoint.load(folder, {"policy": other}, {"policy": other_optimizer} if optimizers else {})
        train_step(other, other_optimizer, 2)
        results.append(weights_of(other))
    assert not same(*results)


def test_two_models_in_one_checkpoint(tiny_model, tmp_path):
    models = {"policy": tiny_model(1), "reward_model": tiny_model(2)}
    optimizers = {name: make_optimizer(model, OPTIM) for name, model in models.items()}
    for name in models:
        train_step(models[name], optimizers[name], 1)
    checkpoint.save(tmp_path, 1, models, optimizers, {})
    others = {"policy": tiny_model(3), "reward_model": tiny_model(4)}
    checkpoint.load(tmp_path, others, {name: make_optimizer(model, OPTIM) for name, model in others.items()})
    for name in models:
        assert same(weights_of(others[name]), weights_of(models[name]))


def test_no_checkpoint_yet(tiny_model, tmp_path):
    model = tiny_model()
    before = weights_of(model)
    assert checkpoint.load(tmp_path, {"policy": model}, {}) is None
    assert same(weights_of(model), before)


def _names(folder, pattern: str = "*") -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


def test_only_the_newest_are_kept(tiny_model, tmp_path):
    model = tiny_model()
    optimizer = make_optimizer(model, OPTIM)
    for step in (8, 9, 10, 100):
        train_step(model, optimizer, step)
        checkpoint.save(tmp_path, step, {"policy": model}, {"policy": optimizer}, {}, keep=3)
    assert _names(tmp_path) == ["step-0000009", "step-0000010", "step-0000100"]
    checkpoint.save(tmp_path, 101, {"policy": model}, {"policy": optimizer}, {})
    assert _names(tmp_path) == ["step-0000100", "step-0000101"]
    checkpoint.save(tmp_path, 102, {"policy": model}, {"policy": optimizer}, {}, keep=1)
    assert _names(tmp_path) == ["step-0000102"]
    assert checkpoint.load(tmp_path, {"policy": model}, {"policy": optimizer})["step"] == 102


@pytest.mark.parametrize("where", ["write_json", "rename", "fsync"])
def test_a_crash_before_the_rename_leaves_the_old_checkpoint(tiny_model, tmp_path, monkeypatch, where):
    model = tiny_model(1)
    optimizer = make_optimizer(model, OPTIM)
    train_step(model, optimizer, 1)
    checkpoint.save(tmp_path, 1, {"policy": model}, {"policy": optimizer}, {})
    good = weights_of(model)
    train_step(model, optimizer, 2)

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            *{"write_json": (checkpoint, "write_json"), "rename": (os, "rename"), "fsync": (os, "fsync")}[where], crash
        )
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, 2, {"policy": model}, {"policy": optimizer}, {})
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-0000001"]
    other = tiny_model(2)
    assert checkpoint.load(tmp_path, {"policy": other}, {"policy": make_optimizer(other, OPTIM)})["step"] == 1
    assert same(weights_of(other), good)

    checkpoint.save(tmp_path, 2, {"policy": model}, {"policy": optimizer}, {})  # over what the crash left behind
    assert _names(tmp_path) == ["step-0000001", "step-0000002"]
    assert checkpoint.load(tmp_path, {"policy": other}, {})["step"] == 2
    assert same(weights_of(other), weights_of(model))


def test_a_crash_between_rename_and_removal_leaves_two_and_the_newer_counts(tiny_model, tmp_path, monkeypatch):
    model = tiny_model(1)
    checkpoint.save(tmp_path, 1, {"policy": model}, {}, {})

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "remove_folder", crash)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, 2, {"policy": model}, {}, {}, keep=1)
    assert len(list(tmp_path.glob("step-*"))) == 2
    assert checkpoint.load(tmp_path, {"policy": model}, {})["step"] == 2
    checkpoint.save(tmp_path, 3, {"policy": model}, {}, {}, keep=1)
    assert _names(tmp_path, "step-*") == ["step-0000003"]


def test_a_half_deleted_checkpoint_does_not_count(tiny_model, tmp_path, monkeypatch):
    model = tiny_model(1)
    checkpoint.save(tmp_path, 1, {"policy": model}, {}, {})
    monkeypatch.setattr(files.shutil, "rmtree", lambda path, **_: None)  # killed right after its rename
    files.remove_folder(tmp_path / "step-0000001")
    assert checkpoint.load(tmp_path, {"policy": model}, {}) is None


def test_weights_that_do_not_fit_are_refused(tiny_model, tmp_path):
    checkpoint.save(tmp_path, 1, {"policy": tiny_model()}, {}, {})
    with pytest.raises(ValueError, match="policy"):
        checkpoint.load(tmp_path, {"policy": add_lora(tiny_model(), Lora(rank=2))}, {})


def _flip_a_bit(path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 16
    path.write_bytes(data)


def _replace(name: str, value):
    """Put a tensor of the same name but of another shape in, and a manifest that knows nothing else."""

    def damage(folder) -> None:
        path = folder / "policy.safetensors"
        tensors = load_file(path)
        save_file({**tensors, name: value(tensors[name])}, path)
        (folder / "manifest.json").write_text(json.dumps(checkpoint._digests(folder)))

    return damage


NORM = "model.norm.weight"
DAMAGES = {
    "a flipped bit in the weights": (lambda folder: _flip_a_bit(folder / "policy.safetensors"), "policy.safetensors"),
    "a flipped bit in the moments": (
        lambda folder: _flip_a_bit(folder / "policy.optimizer.safetensors"),
        "policy.optimizer.safetensors",
    ),
    "an empty state": (lambda folder: (folder / "state.json").write_text("{}"), "state.json"),
    "a missing file": (lambda folder: (folder / "policy.safetensors").unlink(), "policy.safetensors"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json"),
    "half a manifest": (lambda folder: (folder / "manifest.json").write_text('{"poli'), "manifest.json"),
    "a shape that would broadcast": (_replace(NORM, lambda weight: weight[:1].clone()), "shape (32,); got (1,)"),
}


@pytest.mark.parametrize(("damage", "named"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_restored(tiny_model, tmp_path, capsys, damage, named):
    model = tiny_model(1)
    optimizer = make_optimizer(model, OPTIM)
    for step in (1, 2):
        train_step(model, optimizer, step)
        checkpoint.save(tmp_path, step, {"policy": model}, {"policy": optimizer}, {})
        if step == 1:
            good = weights_of(model)
    damage(tmp_path / "step-0000002")
    other = tiny_model(2)
    restored = checkpoint.load(tmp_path, {"policy": other}, {"policy": make_optimizer(other, OPTIM)})
    assert restored == {"step": 1}
    assert same(weights_of(other), good)
    told = capsys.readouterr().out
    assert str(tmp_path / "step-0000002") in told
    assert named in told
    assert "going on from step-0000001" in told
    checkpoint.save(tmp_path, 2, {"policy": model}, {"policy": optimizer}, {})  # in its old place
    assert _names(tmp_path) == ["corrupt-step-0000002", "step-0000001", "step-0000002"]


def test_without_a_whole_checkpoint_nothing_begins_anew_unasked(tiny_model, tmp_path):
    model = tiny_model(1)
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"policy": model}, {}, {})
        _flip_a_bit(tmp_path / f"step-000000{step}" / "policy.safetensors")
    other = tiny_model(2)
    before = weights_of(other)
    with pytest.raises(checkpoint.CheckpointError, match=r"step-0000002: policy.*step-0000001: policy.*remove"):
        checkpoint.load(tmp_path, {"policy": other}, {})
    assert same(weights_of(other), before)


def test_what_kills_left_is_swept(tmp_path):
    for name in (".step-0000003.old", ".step-0000004.tmp", ".model.tmp", "step-0000002"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}")
    for name in (".best.safetensors.1.tmp", ".lock", "metrics.jsonl"):
        (tmp_path / name).write_text("")
    files.sweep(tmp_path)
    assert _names(tmp_path) == [".lock", "metrics.jsonl", "step-0000002"]
