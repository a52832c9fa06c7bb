"""A policy's weights as an engine takes them, and which of them an engine has otherwise."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ipvrm_core.heads import causal_lm
from ipvrm_core.trainer.models.adapters import merged_weights


def weights_of(model: nn.Module, *, adapted: bool) -> Iterator[tuple[str, Tensor]]:
    """By Hugging Face names, a tied head once: those of the base where the adapter goes apart, else merged copies."""
    base, seen = causal_lm(model), set()
    weights = merged_weights(model) if base is not model and not adapted else dict(base.named_parameters())
    for name, weight in weights.items():
        if ".lora_" in name or name.startswith("value_head.") or weight.data_ptr() in seen:
            continue
        seen.add(weight.data_ptr())
        yield name.replace(".base_layer.", "."), weight.detach()


def differing_weights(
    theirs: dict[str, Tensor], fused: dict[str, list[str]], ours: dict[str, Tensor]
) -> tuple[list[str], list[str]]:
    """(names of the engine's weights that are not ours, names that we have nothing for).

    fused: {name of a layer: its parts}; such a weight is those of its parts, one below the other. Rows that the engine
    pads are left out.
    """
    wrong, unknown = [], []
    for name, weight in theirs.items():
        name = name.replace(".base_layer.", ".")
        path, _, leaf = name.rpartition(".")
        prefix, _, layer = path.rpartition(".")
        parts = [name] if name in ours else [f"{prefix}.{part}.{leaf}" for part in fused.get(layer, [])]
        if not parts or not all(part in ours for part in parts):
            unknown.append(name)
            continue
        whole = torch.cat([ours[part] for part in parts])
        rows = weight[: len(whole)]
        if rows.shape != whole.shape:
            unknown.append(name)
        elif not torch.equal(rows, whole.to(rows)):
            wrong.append(name)
    return wrong, unknown
