"""QuACK 0.6.5: chunked linear cross entropy with the gradient made in the forward, and its row kernel."""

from torch import Tensor

from ipvrm_core.bench.peers.base import Peer, needs
from ipvrm_core.bench.problems import Problem

INSTALL = "pip install quack-kernels==0.6.5"
AVAILABLE = needs("quack", "cutlass", gpu=True)


def chunked_ce(problem: Problem) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    inputs = (problem.hidden_ND, problem.weight_VD, problem.targets_N())
    return chunked_linear_cross_entropy(*inputs, chunk_size=4096, reduction="mean", tuned=False, use_scaled_exp=None)


def row_ce(problem: Problem) -> Tensor:
    from quack.cross_entropy import cross_entropy

    return cross_entropy(problem.logits_NV, problem.targets_N(), reduction="mean")


PEERS = [
    Peer(
        "QuACK chunked CE",
        INSTALL,
        "chunked_linear_cross_entropy(chunk_size=4096, tuned=False)",
        "NLL only, no PPO clip",
        AVAILABLE,
        chunked_ce,
        kind="nll",
        package="quack",
    ),
    Peer(
        "QuACK CE",
        INSTALL,
        "quack.cross_entropy.cross_entropy(logits, ids)",
        "NLL only, no PPO clip",
        AVAILABLE,
        row_ce,
        kind="nll",
        level="logits",
        package="quack",
    ),
]
