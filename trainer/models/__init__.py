"""Models and tokenizers: load or make them, heads and adapters on them, save them as Hugging Face folders."""

from ipvrm_core.trainer.models.adapters import add_lora
from ipvrm_core.trainer.models.head import add_value_head, check_head
from ipvrm_core.trainer.models.load import (
    build_scratch,
    character_tokenizer,
    load_pretrained,
    load_tokenizer,
    positions,
    start_model,
)
from ipvrm_core.trainer.models.save import save_model

__all__ = [
    "add_lora",
    "add_value_head",
    "build_scratch",
    "character_tokenizer",
    "check_head",
    "load_pretrained",
    "load_tokenizer",
    "positions",
    "save_model",
    "start_model",
]
