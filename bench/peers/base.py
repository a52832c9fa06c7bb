"""What a peer is, and the parts that peers share: the eager loss around somebody else's log-probabilities.

Shape letters: N rows, D hidden size, V vocabulary, M candidates of all rows together.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from ipvrm_core import PolicyLossConfig
from ipvrm_core.bench import naive
from ipvrm_core.bench.problems import Problem

Loss = Callable[[Problem], Tensor]


@dataclass(frozen=True)
class Peer:
    """`like_for_like` is the loss of the sampled token: `kind` "ppo" is the clipped one, "nll" plain cross entropy.

    `distrl` is the full loss, by the peer itself or by its best emulation; None where its interface gives no way.
    """

    name: str
    install: str
    call: str
    computes: str
    unavailable: Callable[[torch.device], str | None]
    like_for_like: Loss
    distrl: Loss | None = None
    kind: str = "ppo"
    level: str = "linear"
    package: str = "torch"
    prepare: Callable[[Problem], Problem] = lambda problem: problem  # not part of what is timed
    compiles_long: bool = False  # only in the cases that ask for it


def needs(*modules: str, gpu: bool = False, triton: bool = False) -> Callable[[torch.device], str | None]:
    """A check: these modules can be imported, and kernels can run: a GPU, or for Triton kernels the interpreter."""

    def unavailable(device: torch.device) -> str | None:
        missing = [name for name in modules if find_spec(name) is None]
        if missing:
            return f"not installed: {', '.join(missing)}"
        interpreted = triton and os.environ.get("TRITON_INTERPRET") == "1"
        return None if device.type == "cuda" or interpreted or not (gpu or triton) else "its kernels need a GPU"

    return unavailable


def around_logprobs(logprobs: Callable[[Problem], Tensor]) -> dict[str, Loss]:
    """`like_for_like` and `distrl` of a peer that gives log pi of the sampled tokens [N] with a gradient."""

    def like_for_like(problem: Problem) -> Tensor:
        return naive.sampled_loss(logprobs(problem), problem.batch)

    def distrl(problem: Problem) -> Tensor:
        return emulated_distrl(logprobs(problem), problem)

    return {"like_for_like": like_for_like, "distrl": distrl}


def emulated_distrl(logp_N: Tensor, problem: Problem) -> Tensor:
    """The DistRL loss from log pi of the sampled tokens: LSE = z - log pi there, and z of the candidates by gathering.

    The dot products are in float32. Where the candidates are is known beforehand, as a collator knows it.
    """
    batch, config = problem.batch, PolicyLossConfig()
    slots_M = rows_M, _ = problem.candidates_M
    lse_N = _selected_logits(problem, slice(None), problem.sampled.ids_N) - logp_N
    logp_M = _selected_logits(problem, rows_M, batch.ids_NS[slots_M]) - lse_N[rows_M]
    old_M, advantages_M = batch.old_logprobs_NS[slots_M], batch.advantages_NS[slots_M]
    loss_M = naive.clipped(logp_M - old_M, advantages_M, config.candidate_clip_low, config.candidate_clip_high)
    mass_M = old_M.exp() * batch.candidate_weights_N[rows_M]
    return naive.sampled_loss(logp_N, batch) + config.alpha * (mass_M * loss_M).sum()


def _selected_logits(problem: Problem, rows: Tensor | slice, ids_M: Tensor) -> Tensor:
    """h[rows] . W[ids], or the given logits there: [M] float32."""
    if problem.logits_NV is not None:
        return problem.logits_NV[rows].gather(1, ids_M[:, None])[:, 0].float()
    return (problem.hidden_ND[rows].float() * problem.weight_VD[ids_M].float()).sum(-1)
