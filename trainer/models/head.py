"""What stands on a model's last hidden states: its output head, seen to be one that can be fused, or a value head."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ipvrm_core import attach, head_of, linear_logprobs
from ipvrm_core.heads import causal_lm

VALUE_HEAD = "value_head.safetensors"  # beside the weights of a model that has one


def make_value_head(model: nn.Module) -> nn.Linear:
    """A trainable scalar on the last hidden state, float32, zero at the start: an explicit score of each token."""
    weight = head_of(model).weight
    head = nn.Linear(weight.shape[1], 1, device=weight.device, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def add_value_head(model: nn.Module) -> nn.Linear:
    causal_lm(model).value_head = make_value_head(model)
    return causal_lm(model).value_head


def value_head_of(model: nn.Module) -> nn.Linear | None:
    """Its own, where it shares its base with others, or else that of the base."""
    own = model._modules.get("value_head")
    return own if own is not None else getattr(causal_lm(model), "value_head", None)


@contextmanager
def without_value_head(model: nn.Module) -> Iterator[nn.Linear | None]:
    """The model as its own class knows it; the head is back afterwards."""
    head = model._modules.pop("value_head", None)
    try:
        yield head
    finally:
        if head is not None:
            model.value_head = head


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """ValueError unless the logits are those of `head_of`: what else an architecture does to them would be lost."""
    ids = torch.arange(4, device=next(model.parameters()).device)[None]
    columns = torch.arange(8, device=ids.device).expand(4, 8)
    was_training = model.training
    attach(model).eval()
    expected = model(input_ids=ids).logits[0].float().log_softmax(-1)[:, :8]
    ours = model(
        input_ids=ids,
        at_head=lambda hidden_BLD, head: linear_logprobs(hidden_BLD[0], head.weight, columns, **head.options()),
    ).logprobs_NK
    model.train(was_training)
    tolerance = 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.1  # its own logits are rounded
    worst = (ours - expected).abs().max().item()
    if worst > tolerance:
        raise ValueError(
            f"{type(causal_lm(model)).__name__} does more in its head than hidden @ weight.T + bias, a scale and a "
            f"soft cap (log-probs differ by {worst:.3g})"
        )
