"""The output head of a language model, used where its weight is whole: inside the model's own forward.

FSDP2, ZeRO-3 and DDP gather weights and reduce gradients only for what happens inside the forward of the module that
they wrapped. So the fused functions are called there: `model(..., at_head=fn)` runs the backbone and returns
fn(hidden_BLD, head) instead of logits; `at_forward(model, fn)` lets a framework run its own forward and calls fn on the
hidden states that this forward made, without a second pass.

Shape letters: B sequences, L padded length, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ipvrm_core.types import PolicyLossConfig


class Head(NamedTuple):
    """logits = scale * (h W^T + b), then softcap * tanh(logits / softcap) where the model has a soft cap (Gemma 2).

    weight [V, D], bias [V] or None. scale is the logit multiplier of Cohere, Granite and Falcon-H1.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def options(self, temperature: float | Tensor = 1.0) -> dict[str, Any]:
        """The arguments of `linear_logprobs` and its like, besides the weight: scale l / T = l / (T / scale)."""
        return {"bias": self.bias, "softcap": self.softcap, "temperature": temperature / self.scale}

    def settle(self, config: PolicyLossConfig, temperature: float = 1.0) -> PolicyLossConfig:
        """The settings of the loss with this head's soft cap, and its scale in the temperature."""
        return replace(config, softcap=self.softcap, temperature=temperature / self.scale)


def with_lora(hidden: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """([h, scaling h A^T], [W, B]): the head h (W + scaling B A)^T as one product, exactly; for every fused function.

    hidden [N, D], weight [V, D], A [r, D], B [V, r] -> [N, D + r], [V, D + r]. Differentiable in all four. It copies
    the weight, and a trained B makes the gradient of the whole [V, D + r], of which autograd keeps a part: 3 products.
    """
    if A.shape != (B.shape[1], hidden.shape[1]) or B.shape[0] != weight.shape[0]:
        expected = f"[r, D = {hidden.shape[1]}] and [V = {weight.shape[0]}, r]"
        raise ValueError(f"A and B must be {expected}; got {tuple(A.shape)}, {tuple(B.shape)}")
    return torch.cat([hidden, scaling * (hidden @ A.t())], dim=1), torch.cat([weight, B.to(weight.dtype)], dim=1)


AtHead = Callable[[Tensor, Head], Any]  # (last hidden states [B, L, D] after the final norm, head) -> anything


def causal_lm(model: nn.Module) -> nn.Module:
    """Without the wrappers of DDP and PEFT; adapters stay active inside the layers."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_of(model: nn.Module) -> Head:
    """The output head of a causal language model of transformers. Sharded weights come out whole (a collective).

    ValueError for a head with adapters, which the fused functions would not see, or with both scale and soft cap.
    """
    model = causal_lm(model)
    output = model.get_output_embeddings()
    if any("lora_" in name for name, _ in output.named_parameters()):
        raise ValueError(
            "the output head has adapters, which would be ignored: leave it out of target_modules, or call the fused "
            "functions with ipvrm_core.with_lora"
        )
    config = model.config.get_text_config()
    softcap, scale = getattr(config, "final_logit_softcapping", None), _scale(config)
    if scale != 1 and softcap:
        raise ValueError(f"a head with a logit scale ({scale:g}) and a soft cap ({softcap:g}) is not supported")
    bias = getattr(output, "bias", None)
    return Head(_whole(output.weight), None if bias is None else _whole(bias), softcap, scale)


def _scale(config) -> float:
    """The architectures' names for one thing; Granite's is a divisor."""
    if getattr(config, "logits_scaling", None) is not None:
        return 1 / config.logits_scaling
    names = ("logit_scale", "output_multiplier", "lm_head_multiplier")
    return next((value for name in names if (value := getattr(config, name, None)) is not None), 1.0)


def _whole(weight: Tensor) -> Tensor:
    """A DTensor gathered, differentiably; without importing torch.distributed where nothing is distributed."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def attach(model: nn.Module) -> nn.Module:
    """Give the model's forward the argument `at_head`; once, before or after it is wrapped. Returns the model."""
    base = causal_lm(model)
    if not hasattr(base, "_own_forward"):
        base._own_forward, base._at_forward = base.forward, None
        base.forward = MethodType(wraps(type(base).forward)(_forward), base)  # generate() reads the signature
    return model


def _forward(self: nn.Module, *args, at_head: AtHead | None = None, **kwargs):
    if at_head is not None:
        return at_head(self.base_model(*args, use_cache=False, **kwargs).last_hidden_state, head_of(self))
    if self._at_forward is None:
        return self._own_forward(*args, **kwargs)
    function, results = self._at_forward
    seen = []
    with self.base_model.register_forward_hook(lambda _module, _args, output: seen.append(output.last_hidden_state)):
        output = self._own_forward(*args, **kwargs)
    results.append(function(seen[-1], head_of(self)))
    return output


@contextmanager
def at_forward(model: nn.Module, function: AtHead) -> Iterator[list]:
    """Inside, each forward of the model also appends function(hidden_BLD, head) to the list that is yielded."""
    base = causal_lm(attach(model))
    outer = base._at_forward
    results: list[Any] = []
    base._at_forward = function, results
    try:
        yield results
    finally:
        base._at_forward = outer
