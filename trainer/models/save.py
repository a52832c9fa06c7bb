"""A model on disk."""

from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from ipvrm_core.heads import causal_lm
from ipvrm_core.trainer.files import write_folder
from ipvrm_core.trainer.models.adapters import merged_weights
from ipvrm_core.trainer.models.head import VALUE_HEAD, value_head_of, without_value_head


def save_model(model: nn.Module, tokenizer, path: Path) -> None:
    """A normal Hugging Face folder, whole or not at all. Adapters are merged into what is saved, never in place."""
    base, value_head = causal_lm(model), value_head_of(model)

    def fill(target: Path) -> None:
        with without_value_head(base):
            weights = {"state_dict": merged_weights(model)} if base is not model else {}
            base.save_pretrained(target, **weights)
        if value_head is not None:
            save_file(value_head.state_dict(), target / VALUE_HEAD)
        tokenizer.save_pretrained(target)

    write_folder(path, fill)
