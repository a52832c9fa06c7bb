"""AdamW and a learning rate that is a pure function of the step, so that resuming needs no scheduler state."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from ipvrm_core.trainer.config import Optim


def make_optimizer(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)


def learning_rate(optim: Optim, step: int, total: int) -> float:
    """lr at step 1..total: linear warm-up over `warmup` steps, then the schedule, which would reach 0 at total + 1."""
    if step <= optim.warmup:
        return optim.lr * step / optim.warmup
    progress = (step - optim.warmup - 1) / max(total - optim.warmup, 1)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return optim.lr * factor[optim.schedule]


def apply_step(optimizer: torch.optim.Optimizer, optim: Optim, step: int, total: int) -> float:
    """Clip, step, clear; returns the gradient norm before clipping."""
    parameters: Iterable[nn.Parameter] = optimizer.param_groups[0]["params"]
    limit = optim.grad_clip if optim.grad_clip is not None else math.inf
    norm = nn.utils.clip_grad_norm_(parameters, limit, error_if_nonfinite=True)
    optimizer.param_groups[0]["lr"] = learning_rate(optim, step, total)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()
