"""LoRA adapters: put on, and merged into a copy of the weights they change."""

import torch
from torch import Tensor, nn

from ipvrm_core.trainer.config import Lora
from ipvrm_core.trainer.models.head import without_value_head


def add_lora(model: nn.Module, lora: Lora) -> nn.Module:
    """Adapters on all but the head: the fused loss reads the head's weight, so an adapter there would be lost."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    with without_value_head(model):  # PEFT would freeze it, and put adapters on it
        wrapped = get_peft_model(model, config)
    if any("lora_" in name for name, _ in wrapped.get_output_embeddings().named_parameters()):
        raise ValueError(f"lora.target_modules must not reach the output head; got {lora.target_modules!r}")
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped


@torch.no_grad()
def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """The base model's weights by their own names, with the adapters in them; the model stays as it is."""
    base = model.get_base_model()
    layers = {name: module for name, module in base.named_modules() if hasattr(module, "get_delta_weight")}
    merged = {}
    for name, weight in base.state_dict().items():
        layer, _, leaf = name.rpartition(".base_layer.")
        if layer not in layers:
            if ".lora_" not in name:
                merged[name] = weight
            continue
        if leaf == "weight":
            for adapter in layers[layer].active_adapters:
                weight = (weight.float() + layers[layer].get_delta_weight(adapter).float()).to(weight.dtype)
        merged[f"{layer}.{leaf}"] = weight
    return merged
