"""Training state as safetensors and JSON: whole or not at all, no pickle.

A checkpoint holds trainable weights, optimiser state, a small JSON dict, and a manifest with the digest of each file.
There is no random-number state: every step seeds itself from (seed, phase, step), so step 37 draws the same numbers
whether or not the run was interrupted.
"""

import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from ipvrm_core.trainer.files import read_json, read_tensors, remove_folder, write_folder, write_json
from ipvrm_core.trainer.identity import differing, file_digest

MANIFEST = "manifest.json"
Optimizers = dict[str, torch.optim.Optimizer]


class CheckpointError(ValueError):
    """A checkpoint that is not whole, or not of these models; the message names the file."""


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save(
    folder: Path, step: int, models: dict[str, nn.Module], optimizers: Optimizers, state: dict, *, keep: int = 2
) -> None:
    """Write folder/step-<n> and drop all but the last `keep`."""

    def fill(target: Path) -> None:
        for name, model in models.items():
            tensors = {key: value.detach().contiguous() for key, value in trainable(model).items()}
            save_file(tensors, target / f"{name}.safetensors")
        for name, optimizer in optimizers.items():
            tensors = {
                f"{index}.{key}": value.contiguous()
                for index, entry in optimizer.state_dict()["state"].items()
                for key, value in entry.items()
            }
            save_file(tensors, target / f"{name}.optimizer.safetensors")
        write_json(target / "state.json", {"step": step, **state})
        write_json(target / MANIFEST, _digests(target))

    write_folder(_path(folder, step), fill)
    for path in _found(folder)[:-keep]:
        remove_folder(path)


def load(folder: Path, models: dict[str, nn.Module], optimizers: Optimizers) -> dict | None:
    """Restore the newest whole checkpoint in place and return its state dict; None when there is none at all.

    Damaged ones are told and set aside as corrupt-step-<n>. CheckpointError, which names each, when no other is left:
    nobody should train for days again without having been asked.
    """
    refused: dict[Path, str] = {}
    for path in reversed(_found(folder)):
        try:
            state = _restore(path, models, optimizers)
        except (OSError, ValueError) as error:
            refused[path] = str(error)
            continue
        for bad, reason in refused.items():
            tqdm.write(f"{reason}; set aside as {_set_aside(bad).name}, going on from {path.name}")
        return state
    if refused:
        raise CheckpointError(
            f"{'; '.join(refused.values())}. No whole checkpoint is left: remove {folder} to begin anew"
        )
    return None


def newest(folder: Path) -> str:
    """Its name, for people."""
    found = _found(folder)
    return found[-1].name if found else "none"


def _restore(path: Path, models: dict[str, nn.Module], optimizers: Optimizers) -> dict:
    """All is read and checked before anything is changed."""
    wrong = differing(read_json(path / MANIFEST), _digests(path))
    if wrong:
        raise CheckpointError(f"{path}: {', '.join(wrong)} is not what was written (SHA-256)")
    state = read_json(path / "state.json")
    if not isinstance(state, dict) or path != _path(path.parent, state.get("step", -1)):
        raise CheckpointError(f"{path / 'state.json'} must hold the step of its folder; got {state!r}")
    weights = {name: _weights(path / f"{name}.safetensors", model) for name, model in models.items()}
    moments = {name: _moments(path / f"{name}.optimizer.safetensors", each) for name, each in optimizers.items()}
    with torch.no_grad():
        for name, model in models.items():
            for key, parameter in trainable(model).items():
                parameter.copy_(weights[name][key])
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments[name]})
    return state


def _weights(path: Path, model: nn.Module) -> dict[str, Tensor]:
    saved, own = read_tensors(path), trainable(model)
    if saved.keys() != own.keys():
        raise CheckpointError(f"{path}: the weights do not fit the model: {sorted(saved.keys() ^ own.keys())[:3]}")
    for key, parameter in own.items():
        _check_shape(f"{path}: {key}", saved[key], parameter)
    return saved


def _moments(path: Path, optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in read_tensors(path).items():
        index, field = key.split(".", 1)
        if int(index) >= len(parameters):
            raise CheckpointError(f"{path}: {key}: the optimiser has {len(parameters)} parameters")
        if value.dim():  # the number of steps is a scalar
            _check_shape(f"{path}: {key}", value, parameters[int(index)])
        entries.setdefault(int(index), {})[field] = value
    return entries


def _check_shape(name: str, saved: Tensor, own: Tensor) -> None:
    if saved.shape != own.shape:  # copy_ would spread a smaller one over the larger
        raise CheckpointError(f"{name} must have shape {tuple(own.shape)}; got {tuple(saved.shape)}")


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:07d}"


def _found(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and re.fullmatch(r"step-\d+", path.name))


def _set_aside(path: Path) -> Path:
    """Out of the way of the step's next checkpoint, and kept for whoever wants to know what happened to it."""
    target = path.with_name(f"corrupt-{path.name}")
    shutil.rmtree(target, ignore_errors=True)
    os.rename(path, target)
    return target
