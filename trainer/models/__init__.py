"""Models and tokenizers: load or make them, heads and adapters on them, save them as Hugging Face folders."""

from ipvrm_core.trainer.models.adapters import OneBase, Role, add_lora, has_adapter, save_adapter
from ipvrm_core.trainer.models.head import add_value_head, check_head
from ipvrm_core.trainer.models.liger import liger_layers, why_not_liger
from ipvrm_core.trainer.models.load import (
    build_scratch,
    character_tokenizer,
    load_pretrained,
    load_tokenizer,
    positions,
    start_model,
)
from ipvrm_core.trainer.models.packing import can_pack
from ipvrm_core.trainer.models.recompute import checkpoint_activations
from ipvrm_core.trainer.models.save import save_model

__all__ = [
    "OneBase",
    "Role",
    "add_lora",
    "add_value_head",
    "build_scratch",
    "can_pack",
    "character_tokenizer",
    "check_head",
    "checkpoint_activations",
    "has_adapter",
    "liger_layers",
    "load_pretrained",
    "load_tokenizer",
    "positions",
    "save_adapter",
    "save_model",
    "start_model",
    "why_not_liger",
]
