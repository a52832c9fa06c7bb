"""The eager functions under torch.compile: whole, and a chunk of rows at a time with the chunk recomputed."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ipvrm_core.bench import naive
from ipvrm_core.bench.peers.base import Peer, needs
from ipvrm_core.bench.problems import Problem

CHUNK = 2048


def _compiled(function, problem: Problem):
    """Inductor on a GPU. On a CPU (toy runs) only the tracing: generating C++ takes half a minute a function."""
    on_gpu = problem.batch.ids_NS.is_cuda
    return torch.compile(function, fullgraph=True, dynamic=False, backend="inductor" if on_gpu else "aot_eager")


def whole(problem: Problem) -> Tensor:
    return _compiled(naive.distrl_loss, problem)(problem.hidden_ND, problem.weight_VD, problem.batch)[0]


def chunks(problem: Problem) -> Tensor:
    function, total = _compiled(naive.distrl_loss, problem), 0.0
    for start in range(0, len(problem.hidden_ND), CHUNK):
        rows = slice(start, start + CHUNK)
        inputs = (problem.hidden_ND[rows], problem.weight_VD, problem.batch.rows(rows))
        total = total + checkpoint(function, *inputs, use_reentrant=False)[0]
    return total


def logits(problem: Problem) -> Tensor:
    return _compiled(naive.distrl_loss_from_logits, problem)(problem.logits_NV, problem.batch)[0]


def _peer(name: str, call: str, loss, level: str = "linear") -> Peer:
    return Peer(name, "-", call, "the same loss", needs(), loss, loss, level=level, compiles_long=True)


PEERS = [
    _peer("torch.compile", "torch.compile(eager)", whole),
    _peer("torch.compile, chunks", f"checkpoint(torch.compile(eager)) of {CHUNK} rows", chunks),
    _peer("torch.compile", "torch.compile(eager)", logits, level="logits"),
]
