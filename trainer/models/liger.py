"""Liger's layers in place of transformers' own: rotary embedding, norms and the gated MLP. Its losses stay out."""

from importlib.util import find_spec

from torch import nn

from ipvrm_core.heads import causal_lm


def liger_layers(model: nn.Module, **parts: bool) -> nn.Module:
    """The same model with them. parts: Liger's own switches, to leave some out, e.g. rms_norm=False.

    ValueError for a kind of model that Liger does not know, which it would pass over in silence. Its rotary embedding
    replaces the one of transformers' module, for this process and every model of the kind.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance

    base = causal_lm(model)
    kind = base.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        known = ", ".join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))
        raise ValueError(f"model.liger: Liger has no layers for models of the kind {kind!r}; it has some for {known}")
    # The hidden states go to the loss of this library: a forward that computes Liger's is never called.
    _apply_liger_kernel_to_instance(base, cross_entropy=False, fused_linear_cross_entropy=False, **parts)
    return model


def why_not_liger(on_gpu: bool) -> str | None:
    """What is missing for Liger's layers; None if nothing is."""
    if find_spec("liger_kernel") is None:
        return "the package liger-kernel, which is not installed: pip install 'ipvrm-core[liger]'"
    return None if on_gpu else "a GPU: its layers are Triton kernels"
