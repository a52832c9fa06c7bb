"""Training state as safetensors and JSON: whole or not at all, no pickle.

A checkpoint holds trainable weights, optimiser state and a small JSON dict. There is no random-number state: every step
seeds itself from (seed, phase, step), so step 37 draws the same numbers whether or not the run was interrupted.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ipvrm_core.trainer.files import remove_folder, write_folder, write_json


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save(
    folder: Path, step: int, models: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer], state: dict
) -> None:
    """Write folder/step-<n> and drop the older ones."""

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

    previous = _found(folder)
    write_folder(folder / f"step-{step:07d}", fill)
    for path in previous:
        remove_folder(path)


def load(folder: Path, models: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]) -> dict | None:
    """Restore the newest checkpoint in place and return its state dict; None when there is none."""
    found = _found(folder)
    if not found:
        return None
    newest = found[-1]
    for name, model in models.items():
        saved, own = load_file(newest / f"{name}.safetensors"), trainable(model)
        if saved.keys() != own.keys():
            raise ValueError(
                f"{newest}: weights of {name!r} do not fit the model: {sorted(saved.keys() ^ own.keys())[:3]}"
            )
        with torch.no_grad():
            for key, parameter in own.items():
                parameter.copy_(saved[key])
    for name, optimizer in optimizers.items():
        entries: dict[int, dict] = {}
        for key, value in load_file(newest / f"{name}.optimizer.safetensors").items():
            index, field = key.split(".", 1)
            entries.setdefault(int(index), {})[field] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": entries})
    return json.loads((newest / "state.json").read_text())


def _found(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())
