"""Checkpoints and saved models: exact, whole or not at all, and readable by everybody else's tools."""

import copy
import json
import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ipvrm_core.trainer import checkpoint, files
from ipvrm_core.trainer.config import Lora, Optim
from ipvrm_core.trainer.data.tasks import ChainTask
from ipvrm_core.trainer.models import add_lora, add_value_head, character_tokenizer, load_pretrained, save_model
from ipvrm_core.trainer.models.adapters import merged_weights
from ipvrm_core.trainer.optim import apply_step, learning_rate, make_optimizer

TOKENIZER = character_tokenizer(ChainTask.alphabet)
OPTIM = Optim(lr=1e-2, warmup=2, schedule="cosine", weight_decay=0.1)


def _step(model, optimizer, step: int) -> None:
    """One step on data that depends on the step alone."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(2, 19, (4, 7), generator=generator)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    apply_step(optimizer, OPTIM, step, 10)


def _weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _suffixes(folder) -> set[str]:
    return {path.suffix for path in folder.rglob("*") if path.is_file()}


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
        _step(model, optimizer, step)
    checkpoint.save(tmp_path, 3, {"policy": model}, {"policy": optimizer}, {"cursor": 96})
    at_three = _weights(model)
    for step in (4, 5):
        _step(model, optimizer, step)

    other, other_optimizer = fresh(1 if lora else 2)  # with adapters the frozen base is the phase's start anyway
    if lora:
        with torch.no_grad():
            for parameter in checkpoint.trainable(other).values():
                parameter.add_(0.3)
    state = checkpoint.load(tmp_path, {"policy": other}, {"policy": other_optimizer})
    assert state == {"step": 3, "cursor": 96}
    assert _equal(_weights(other), at_three)
    for step in (4, 5):
        _step(other, other_optimizer, step)
    assert _equal(_weights(other), _weights(model))
    assert not _equal(_weights(model), at_three)
    assert _suffixes(tmp_path) == {".json", ".safetensors"}


def test_a_fresh_optimizer_would_not_do(tiny_model, tmp_path):
    """The test above can fail: without AdamW's moments the next step is another one."""
    results = []
    for optimizers in ({}, {"policy": True}):
        folder = tmp_path / str(len(results))
        model = tiny_model(1)
        optimizer = make_optimizer(model, OPTIM)
        _step(model, optimizer, 1)
        checkpoint.save(folder, 1, {"policy": model}, {"policy": optimizer}, {})
        other = tiny_model(2)
        other_optimizer = make_optimizer(other, OPTIM)
        checkpoint.load(folder, {"policy": other}, {"policy": other_optimizer} if optimizers else {})
        _step(other, other_optimizer, 2)
        results.append(_weights(other))
    assert not _equal(*results)


def test_two_models_in_one_checkpoint(tiny_model, tmp_path):
    models = {"policy": tiny_model(1), "reward_model": tiny_model(2)}
    optimizers = {name: make_optimizer(model, OPTIM) for name, model in models.items()}
    for name in models:
        _step(models[name], optimizers[name], 1)
    checkpoint.save(tmp_path, 1, models, optimizers, {})
    others = {"policy": tiny_model(3), "reward_model": tiny_model(4)}
    checkpoint.load(tmp_path, others, {name: make_optimizer(model, OPTIM) for name, model in others.items()})
    for name in models:
        assert _equal(_weights(others[name]), _weights(models[name]))


def test_no_checkpoint_yet(tiny_model, tmp_path):
    model = tiny_model()
    before = _weights(model)
    assert checkpoint.load(tmp_path, {"policy": model}, {}) is None
    assert _equal(_weights(model), before)


def _names(folder, pattern: str = "*") -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


def test_only_the_newest_are_kept(tiny_model, tmp_path):
    model = tiny_model()
    optimizer = make_optimizer(model, OPTIM)
    for step in (8, 9, 10, 100):
        _step(model, optimizer, step)
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
    _step(model, optimizer, 1)
    checkpoint.save(tmp_path, 1, {"policy": model}, {"policy": optimizer}, {})
    good = _weights(model)
    _step(model, optimizer, 2)

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
    assert _equal(_weights(other), good)

    checkpoint.save(tmp_path, 2, {"policy": model}, {"policy": optimizer}, {})  # over what the crash left behind
    assert _names(tmp_path) == ["step-0000001", "step-0000002"]
    assert checkpoint.load(tmp_path, {"policy": other}, {})["step"] == 2
    assert _equal(_weights(other), _weights(model))


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
        _step(model, optimizer, step)
        checkpoint.save(tmp_path, step, {"policy": model}, {"policy": optimizer}, {})
        if step == 1:
            good = _weights(model)
    damage(tmp_path / "step-0000002")
    other = tiny_model(2)
    restored = checkpoint.load(tmp_path, {"policy": other}, {"policy": make_optimizer(other, OPTIM)})
    assert restored == {"step": 1}
    assert _equal(_weights(other), good)
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
    before = _weights(other)
    with pytest.raises(checkpoint.CheckpointError, match=r"step-0000002: policy.*step-0000001: policy.*remove"):
        checkpoint.load(tmp_path, {"policy": other}, {})
    assert _equal(_weights(other), before)


def test_what_kills_left_is_swept(tmp_path):
    for name in (".step-0000003.old", ".step-0000004.tmp", ".model.tmp", "step-0000002"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}")
    for name in (".best.safetensors.1.tmp", ".lock", "metrics.jsonl"):
        (tmp_path / name).write_text("")
    files.sweep(tmp_path)
    assert _names(tmp_path) == [".lock", "metrics.jsonl", "step-0000002"]


# ---- finished models


def test_a_saved_model_opens_with_the_auto_classes(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = TOKENIZER, tiny_model(3)
    tmp_path = tmp_path / "models"
    save_model(model, tokenizer, tmp_path / "model")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert _equal(_weights(opened), _weights(model))
    again = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert again("5*5?")["input_ids"] == tokenizer("5*5?")["input_ids"]
    assert again.decode(again("5*5=5;#5")["input_ids"]) == "5*5=5;#5"
    assert (again.eos_token_id, again.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert opened.generation_config.eos_token_id == tokenizer.eos_token_id
    assert _suffixes(tmp_path) == {".json", ".safetensors"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_lora_is_saved_merged(tiny_model, tmp_path):
    """The saved model needs no peft and gives the logits of the model with its adapters."""
    ids = torch.randint(2, 19, (3, 9), generator=torch.Generator().manual_seed(0))
    plain = tiny_model(3)
    with torch.no_grad():
        before = plain(input_ids=ids).logits.clone()
        wrapped = add_lora(plain, Lora(rank=4, alpha=8.0)).eval()
        torch.testing.assert_close(wrapped(input_ids=ids).logits, before)  # adapters start as nothing
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
        expected = wrapped(input_ids=ids).logits.clone()
        assert (expected - before).abs().max() > 0.1
        save_model(wrapped, TOKENIZER, tmp_path / "model")
        saved = load_pretrained(tmp_path / "model").eval()
        torch.testing.assert_close(saved(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-4)
    assert not any("lora" in name for name, _ in saved.named_parameters())
    assert not list((tmp_path / "model").glob("adapter*"))
    assert "architectures" in json.loads((tmp_path / "model" / "config.json").read_text())


def test_merged_weights_are_those_of_peft_biases_too():
    """By the names of the model without adapters; the adapted layers have biases, as Qwen2's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    wrapped = add_lora(LlamaForCausalLM(LlamaConfig(vocab_size=19, attention_bias=True, **sizes)), Lora(rank=2))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    expected = copy.deepcopy(wrapped).merge_and_unload().state_dict()
    assert sum(name.endswith("_proj.bias") for name in expected) == 4
    torch.testing.assert_close(merged_weights(wrapped), dict(expected))


@pytest.mark.parametrize("value_head", [False, True])
def test_saving_in_the_middle_of_training_changes_nothing(tiny_model, tmp_path, value_head):
    """Adapters are merged into what is saved, not in place: the model goes on as one that was never saved."""
    runs = []
    for saves in (False, True):
        torch.manual_seed(0)
        model = add_lora(tiny_model(3), Lora(rank=4, alpha=8.0))
        if value_head:
            with torch.no_grad():
                add_value_head(model).weight.normal_(generator=torch.Generator().manual_seed(4))
        optimizer = make_optimizer(model, OPTIM)
        for step in (1, 2):
            _step(model, optimizer, step)
        if saves:
            before, names = _weights(model), [name for name, _ in model.named_modules()]
            save_model(model, TOKENIZER, tmp_path / "model")
            assert _equal(_weights(model), before)
            assert [name for name, _ in model.named_modules()] == names
            expected = copy.deepcopy(model).merge_and_unload()
        for step in (3, 4):
            _step(model, optimizer, step)
        runs.append(_weights(model))
    assert _equal(*runs)
    assert not _equal(runs[1], before)
    saved, expected = _weights(load_pretrained(tmp_path / "model")), _weights(expected)
    assert sorted(saved) == sorted(expected)
    assert ("value_head.weight" in saved) == value_head
    for name, weight in expected.items():
        torch.testing.assert_close(saved[name], weight, rtol=0, atol=1e-6)


def test_only_adapters_are_trainable_and_in_the_checkpoint(tiny_model, tmp_path):
    wrapped = add_lora(tiny_model(), Lora(rank=2))
    names = checkpoint.trainable(wrapped).keys()
    assert names
    assert all("lora_" in name for name in names)
    assert not any("lm_head" in name or "embed" in name for name in names)
    assert all(parameter.dtype == torch.float32 for parameter in checkpoint.trainable(wrapped).values())


def test_a_crash_while_saving_the_model_leaves_none(tiny_model, tmp_path, monkeypatch):
    def crash(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(TOKENIZER), "save_pretrained", crash)
        with pytest.raises(KeyboardInterrupt):
            save_model(tiny_model(), TOKENIZER, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    save_model(tiny_model(), TOKENIZER, tmp_path / "model")
    assert load_pretrained(tmp_path / "model") is not None


# ---- files and the learning rate


def test_write_text_is_whole_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"x": 1})

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            files.write_json(path, {"x": 2})
    assert json.loads(path.read_text()) == {"x": 1}
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, {"x": float("nan")})
    assert json.loads(path.read_text()) == {"x": 1}


def test_a_lock_is_exclusive_and_ends_with_its_block(tmp_path):
    with files.locked(tmp_path), pytest.raises(RuntimeError, match="in use"), files.locked(tmp_path):
        raise AssertionError("locked twice")
    with files.locked(tmp_path):
        pass


def test_a_lock_that_is_a_link_is_refused(tmp_path):
    """Opening it would empty, or make, the file that it leads to."""
    (tmp_path / "precious").write_text("text")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    with (
        pytest.raises(OSError, match=r"run/\.lock must be a file; got a symbolic link"),
        files.locked(tmp_path / "run"),
    ):
        pass
    assert (tmp_path / "precious").read_text() == "text"


@pytest.mark.parametrize(
    "failure",
    [
        OSError(28, "No space left on device"),
        SafetensorError("I/O error: No space left on device"),
        Exception("No space left on device"),  # as tokenizers has it
    ],
    ids=lambda failure: type(failure).__name__,
)
@pytest.mark.parametrize("write", [files.write_file, files.write_folder])
def test_a_full_disk_is_told_with_the_path_and_leaves_nothing(tmp_path, write, failure):
    def fill(target):
        (target / "part" if target.is_dir() else target).write_text("half")
        raise failure

    with pytest.raises(OSError, match=r"/result could not be written: .*No space left on device"):
        write(tmp_path / "result", fill)
    assert not list(tmp_path.iterdir())


def test_a_mistake_in_the_program_is_no_full_disk(tmp_path):
    with pytest.raises(TypeError):
        files.write_file(tmp_path / "result", lambda _: len(3))


@pytest.mark.parametrize(("read", "name"), [(files.read_json, "a.json"), (files.read_tensors, "a.safetensors")])
@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe\x00"])
def test_a_damaged_file_is_named(tmp_path, read, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path / name}: not"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.8535533905932737, 0.5, 0.14644660940672627]),
    ],
)
def test_learning_rate_by_hand(schedule, expected):
    optim = Optim(lr=1.0, warmup=2, schedule=schedule)
    assert [learning_rate(optim, step, 6) for step in range(1, 7)] == pytest.approx(expected)


def test_gradients_are_clipped_and_cleared(tiny_model):
    model = tiny_model()
    optimizer = make_optimizer(model, OPTIM)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    count = sum(parameter.numel() for parameter in model.parameters())
    norm = apply_step(optimizer, OPTIM, 1, 10)
    assert norm == pytest.approx(3 * count**0.5, rel=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-3)  # half way up the warm-up
    moment = next(iter(optimizer.state.values()))["exp_avg"].flatten()[0].item()
    assert moment == pytest.approx((1 - 0.9) * 1.0 / count**0.5, rel=1e-3)  # the clipped gradient
