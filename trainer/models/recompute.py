"""Activation checkpointing: of a layer only its input is kept, the rest is made again in the backward pass."""

from torch import nn

from ipvrm_core.heads import causal_lm
from ipvrm_core.trainer.models.adapters import Role


def checkpoint_activations(model: nn.Module) -> nn.Module:
    """For every decoder layer, in training mode alone. ValueError for a model that does not support it.

    With roles on one base the layers are made again under the adapter and the mode of the forward pass, whatever role
    has been on in between.
    """
    base, settings = causal_lm(model), {"use_reentrant": False}
    if isinstance(model, Role):
        settings["context_fn"] = model.one.recomputation
    newer = hasattr(base, "activation_checkpointing_enable")  # transformers warns of the old name
    (base.activation_checkpointing_enable if newer else base.gradient_checkpointing_enable)(settings)
    base.disable_input_require_grads()  # which reentrant checkpoints alone need
    return model
