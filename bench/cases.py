"""What is measured: one optimiser step's worth of head work, forward and backward, by different implementations.

`Setting` is a case of the GPU benchmark (bench/gpu.py; its inputs are made in bench/problems.py), `Case` and what
follows it the CPU benchmark (bench/cpu.py).

Shape letters: N rows (response tokens), D hidden size, V vocabulary, K candidate slots.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import ipvrm_core
from ipvrm_core import PolicyBatch
from ipvrm_core.bench import naive


@dataclass(frozen=True)
class Shape:
    N: int = 2048
    D: int = 256
    V: int = 151936  # Qwen3


HEADS = {
    "Qwen3-0.6B": Shape(8192, 1024, 151936),
    "Qwen3-8B": Shape(8192, 4096, 151936),
    "Llama-3.2-1B": Shape(8192, 2048, 128256),
    "Gemma-3-270M": Shape(8192, 640, 262144),
}
TOY_HEADS = {
    "Qwen3-0.6B": Shape(4, 16, 141),
    "Qwen3-8B": Shape(4, 32, 141),
    "Llama-3.2-1B": Shape(4, 24, 128),
    "Gemma-3-270M": Shape(4, 8, 200),
}
CANDIDATES = {"0": 0.0, "mean 1.33": 1.33, "10": 10.0}


@dataclass(frozen=True)
class Setting:
    """A head, and the loss on it. A frozen head: the hidden states require a gradient, the weight does not.

    loss: distrl (sampled token and candidates), ppo (sampled token alone). candidates: a key of CANDIDATES. masked: the
    share of rows of weight 0. peaked: rows as a language model has them (bench/problems.py); else almost uniform ones.
    """

    model: str
    shape: Shape
    frozen: bool = True
    loss: str = "distrl"
    candidates: str = "mean 1.33"
    masked: float = 0.0
    peaked: bool = True

    @property
    def products(self) -> int:
        """The fewest products of 2 N D V operations that give loss and gradients."""
        return 2 if self.frozen else 3

    @property
    def name(self) -> str:
        head = f"{self.model}, {'frozen' if self.frozen else 'trained'} head, {self.loss}"
        rows = f"candidates {self.candidates}, masked {self.masked:g}, {'peaked' if self.peaked else 'flat'}"
        return f"{head}, N {self.shape.N}, V {self.shape.V}, {rows}"


@dataclass(frozen=True)
class Inputs:
    hidden_ND: Tensor
    weight_VD: Tensor
    batch: PolicyBatch


@dataclass(frozen=True)
class Case:
    """`function` is distrl_loss or linear_logprobs; a frozen head needs no gradient of the weight."""

    function: str
    frozen: bool
    shape: Shape = Shape()

    @property
    def name(self) -> str:
        return f"{self.function}, {'frozen' if self.frozen else 'trained'} head"


IMPLEMENTATIONS = ("naive", "chunked")
LOGIT_STD = 8.0  # peaked rows as a trained model has them: about one candidate with p >= 0.1


def make_inputs(shape: Shape, seed: int = 0) -> Inputs:
    """float32 on CPU. The old policy is the current one up to noise of 0.2 nats, so some ratios are clipped."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=rng)

    hidden_ND, weight_VD = normal(shape.N, shape.D) * LOGIT_STD, normal(shape.V, shape.D) / shape.D**0.5
    sampled_N = torch.randint(shape.V, (shape.N,), generator=rng)
    old = ipvrm_core.select_candidates(hidden_ND, weight_VD, sampled_N, 0.1, keep_sampled=True)
    weights_N = torch.full((shape.N,), 1 / shape.N)
    batch = PolicyBatch(
        sampled_ids_N=sampled_N,
        old_logprobs_N=old.sampled_logprobs_N + 0.2 * normal(shape.N),
        advantages_N=normal(shape.N),
        token_weights_N=weights_N,
        candidate_ids_NK=old.ids_NK,
        candidate_old_logprobs_NK=old.logprobs_NK + 0.2 * normal(*old.ids_NK.shape),
        candidate_advantages_NK=normal(*old.ids_NK.shape),
        candidate_weights_N=weights_N,
    )
    return Inputs(hidden_ND, weight_VD, batch)


def step(case: Case, inputs: Inputs, implementation: str, **options) -> Callable[[], list[Tensor]]:
    """A callable that runs forward and backward once and returns the gradients. `options` go to chunked."""
    hidden_ND = inputs.hidden_ND.requires_grad_()
    weight_VD = inputs.weight_VD.requires_grad_(not case.frozen)
    wanted = [hidden_ND] if case.frozen else [hidden_ND, weight_VD]
    ids_NK = inputs.batch.ids_NK
    module = naive if implementation == "naive" else ipvrm_core
    options = options if implementation == "naive" else {"backend": implementation, **options}

    def run() -> list[Tensor]:
        if case.function == "distrl_loss":
            loss = module.distrl_loss(hidden_ND, weight_VD, inputs.batch, **options)[0]
        else:
            loss = module.linear_logprobs(hidden_ND, weight_VD, ids_NK, **options)[0].mean()
        return list(torch.autograd.grad(loss, wanted))

    return run


def check_agreement(case: Case, inputs: Inputs) -> None:
    """No number without this: both implementations give the same gradients, to 1e-4 of the largest entry."""
    for ours, theirs in zip(*(step(case, inputs, name)() for name in ("chunked", "naive")), strict=True):
        error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        if not error < 1e-4:
            raise AssertionError(f"{case.name}: gradients of chunked and naive differ by {error:.1e} of the largest")
