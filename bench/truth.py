"""The reference in float64, a few rows at a time, and how far a result is from it.

Shape letters: N rows, V vocabulary, B sequences of T tokens.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

import ipvrm_core
from ipvrm_core import PolicyLossConfig
from ipvrm_core.bench.problems import Problem

CHUNK_BYTES = 512 << 20  # of one float64 [rows, V] tensor; the reference holds about ten


def step(loss: Tensor, problem: Problem) -> list[Tensor]:
    """[loss, gradient of every input that requires one]: what is timed, and what is compared."""
    return [loss.detach(), *torch.autograd.grad(loss, problem.wanted)]


def truth(problem: Problem, kind: str) -> list[Tensor]:
    """`step` of the reference in float64. kind: distrl, ppo (the sampled token alone) or nll."""
    given = problem.logits_NV is not None
    weight = None if given else problem.weight_VD.detach().double().requires_grad_(problem.weight_VD.requires_grad)
    rows_of = problem.logits_NV if given else problem.hidden_ND
    N, V = len(rows_of), rows_of.shape[1] if given else len(weight)
    total, rows_gradient = 0.0, torch.empty(rows_of.shape, dtype=torch.float64, device=rows_of.device)
    for rows in _slices(N, V):
        part = rows_of.detach()[rows].double().requires_grad_()
        loss = _loss(part, weight, problem, rows, kind)
        (rows_gradient[rows],) = torch.autograd.grad(loss, [part], retain_graph=True)
        if weight is not None and weight.requires_grad:
            loss.backward(inputs=[weight])  # adds up over the chunks
        total = total + loss.detach()
    trained = weight is not None and weight.requires_grad
    return [total, rows_gradient, *([weight.grad] if trained else [])]


def _loss(part: Tensor, weight: Tensor | None, problem: Problem, rows: slice, kind: str) -> Tensor:
    batch = problem.batch.rows(rows)
    if kind == "nll":
        ids = batch.ids_NS[:, :1]
        if weight is None:
            logp = ipvrm_core.logprobs_from_logits(part, ids, backend="reference").logprobs_NK
        else:
            logp = ipvrm_core.linear_logprobs(part, weight, ids, backend="reference").logprobs_NK
        return -(batch.token_weights_N * logp[:, 0]).sum()
    config = PolicyLossConfig() if kind == "distrl" else PolicyLossConfig(alpha=0.0)
    if weight is None:
        return ipvrm_core.distrl_loss_from_logits(part, batch, config, backend="reference").loss
    return ipvrm_core.distrl_loss(part, weight, batch, config, backend="reference").loss


def deviations(got: list[Tensor], exact: list[Tensor]) -> dict[str, float]:
    """|loss - exact|, and ||g - exact|| / ||exact|| of each gradient: "rows" (hidden states or logits), "weight"."""
    names = ("loss", "rows", "weight")
    result = {"loss": (got[0].double() - exact[0]).abs().item()}
    for name, gradient, true in zip(names[1:], got[1:], exact[1:], strict=False):
        # Liger's padded logits [B, T + 1, V]: the last position of a sequence is no row.
        gradient = gradient[:, :-1].flatten(0, 1) if gradient.dim() == 3 else gradient
        result[name] = _relative(gradient, true)
    return result


def _relative(gradient: Tensor, exact: Tensor) -> float:
    """In pieces: a float64 copy of a whole gradient would not fit beside it."""
    squares = torch.zeros(2, dtype=torch.float64, device=exact.device)
    for rows in _slices(*exact.shape):
        difference = gradient[rows].double() - exact[rows]
        squares += torch.stack([difference.square().sum(), exact[rows].square().sum()])
    return (squares[0] / squares[1].clamp(min=torch.finfo(torch.float64).tiny)).sqrt().item()


def _slices(N: int, V: int) -> Iterator[slice]:
    n = max(1, CHUNK_BYTES // (8 * V))
    return (slice(start, min(start + n, N)) for start in range(0, N, n))
