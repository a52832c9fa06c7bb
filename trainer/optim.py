"""AdamW and a learning rate that is a pure function of the step, so that resuming needs no scheduler state."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ipvrm_core.trainer.config import Optim


class MasterAdamW(torch.optim.AdamW):
    """AdamW on float32 copies of the parameters, which are rounded to the parameters' own dtype after each step.

    bfloat16 keeps 8 bits: the neighbour of the weight 0.02 is 0.0201, so that a step of 5e-7 leaves it where it was,
    however often it is made. The copies add such steps up. Gradients are added up in float32 too: each parameter's
    goes to its copy as soon as it is there. Parameters that are float32 already are their own copies.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], **settings):
        self.pairs = [(parameter, _master(parameter)) for parameter in parameters]
        for parameter, master in self.pairs:
            if master is not parameter:
                parameter.register_post_accumulate_grad_hook(_hand_over(master))
        super().__init__([master for _, master in self.pairs], **settings)

    @torch.no_grad()
    def step(self, closure=None):
        result = super().step(closure)
        self._round()
        return result

    def _round(self) -> None:
        for parameter, master in self.pairs:
            if master is not parameter:
                parameter.copy_(master)

    def state_dict(self) -> dict:
        """The state of AdamW, and the copies as "master"."""
        found = super().state_dict()
        for index, (parameter, master) in enumerate(self.pairs):
            if master is not parameter:
                found["state"][index] = {**found["state"].get(index, {}), "master": master.detach()}
        return found

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        state = {index: dict(entry) for index, entry in state_dict["state"].items()}
        for index, (parameter, master) in enumerate(self.pairs):
            if master is not parameter:
                master.copy_(state[index].pop("master"))
        super().load_state_dict({**state_dict, "state": {index: entry for index, entry in state.items() if entry}})
        self._round()


def _master(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype == torch.float32:
        return parameter
    return nn.Parameter(parameter.detach().float())


def _hand_over(master: nn.Parameter):
    """A hook that adds a parameter's new gradient to its copy's."""

    def hook(parameter: nn.Parameter) -> None:
        grad = parameter.grad.float()
        master.grad = grad if master.grad is None else master.grad.add_(grad)
        parameter.grad = None

    return hook


def make_optimizer(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """AdamW, with float32 copies where a trainable weight has fewer bits."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kind = torch.optim.AdamW if all(p.dtype == torch.float32 for p in parameters) else MasterAdamW
    optimizer = kind(parameters, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay)
    if optim.offload:
        keep_moments_on(optimizer, torch.device("cpu"))
    return optimizer


def keep_moments_on(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """The moments are with their weights during a step alone, and else on `device`: a copy each way, exact."""

    def move(place: Callable[[Tensor], torch.device]) -> None:
        for parameter, entry in optimizer.state.items():
            moved = {key: value.to(place(parameter)) for key, value in entry.items() if value.dim()}
            entry.update(moved)  # the number of steps is a scalar, and stays where torch has it

    optimizer.moments_on = device
    optimizer.register_step_pre_hook(lambda *_: move(lambda parameter: parameter.device))
    optimizer.register_step_post_hook(lambda *_: move(lambda _: device))


def trained_weights(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The trainable weights by name, in full precision where the optimiser keeps copies."""
    masters = {id(parameter): master for parameter, master in getattr(optimizer, "pairs", [])}
    return {
        name: masters.get(id(parameter), parameter).detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def set_weights(model: nn.Module, optimizer: torch.optim.Optimizer, weights: dict[str, Tensor]) -> None:
    """Put `trained_weights` back into model and optimiser."""
    for name, master in trained_weights(model, optimizer).items():
        master.copy_(weights[name])
    for parameter, master in getattr(optimizer, "pairs", []):
        if master is not parameter:
            parameter.copy_(master)


def install(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put `trained_weights` into the model in their own precision: what is saved then has every step in it."""
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.data = weights[name].detach().to(parameter.device)


def vanishing_steps(model: nn.Module, optim: Optim, total: int) -> str | None:
    """What to tell a user whose bfloat16 model could not show the training at all; None where it can.

    AdamW moves a weight by about lr a step. bfloat16 rounds to 1 part in 2^8: while the sum of all steps is below half
    of that for the median weight, the float32 copies learn, but the model that computes losses stays where it was.
    """
    low = [p.detach() for p in model.parameters() if p.requires_grad and p.dtype == torch.bfloat16]
    if not low:
        return None
    median = torch.stack([p.float().abs().median() for p in low]).median().item()
    reach, needed = optim.lr * total, median / 2**9
    if reach >= needed:
        return None
    return (
        f"lr x steps = {reach:.1e} is less than half a bfloat16 rounding step of the median weight ({needed:.1e}): the "
        "float32 copies are trained, but most weights the loss is computed with never change. "
        "Use dtype = 'float32' (with precision = 'bf16' for speed), or LoRA"
    )


def learning_rate(optim: Optim, step: int, total: int) -> float:
    """lr at step 1..total: linear warm-up over `warmup` steps, then the schedule, which would reach 0 at total + 1."""
    if step <= optim.warmup:
        return optim.lr * step / optim.warmup
    progress = (step - optim.warmup - 1) / max(total - optim.warmup, 1)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return optim.lr * factor[optim.schedule]


def apply_step(optimizer: torch.optim.Optimizer, optim: Optim, step: int, total: int) -> float:
    """Clip, step, clear; returns the gradient norm before clipping. FloatingPointError, and no step, if it is none."""
    parameters: Iterable[nn.Parameter] = optimizer.param_groups[0]["params"]
    limit = optim.grad_clip if optim.grad_clip is not None else math.inf
    norm = nn.utils.clip_grad_norm_(parameters, limit).item()
    if not math.isfinite(norm):
        raise FloatingPointError(f"the norm of the gradient is {norm}")
    optimizer.param_groups[0]["lr"] = learning_rate(optim, step, total)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
