"""F.linear_cross_entropy in chunks (torch >= 2.13): gradient made in the forward ("mean") or recomputed ("none")."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ipvrm_core.bench.peers.base import Peer, around_logprobs
from ipvrm_core.bench.problems import Problem


def unavailable(device: torch.device) -> str | None:
    present = hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")
    return None if present else f"needs torch >= 2.13; this is {torch.__version__}"


def _call(problem: Problem, reduction: str) -> Tensor:
    inputs = (problem.hidden_ND, problem.weight_VD, problem.targets_N())
    return F.linear_cross_entropy(*inputs, reduction=reduction, options=torch.nn.LinearCrossEntropyOptions())


def mean(problem: Problem) -> Tensor:
    return _call(problem, "mean")


def logprobs(problem: Problem) -> Tensor:
    return -_call(problem, "none").float()


CALL, NEEDS = "F.linear_cross_entropy(options=LinearCrossEntropyOptions(), reduction=", "torch >= 2.13"
PEERS = [
    Peer("torch linear CE", NEEDS, CALL + "'mean')", "NLL only, no PPO clip", unavailable, mean, kind="nll"),
    Peer(
        "torch linear CE, rows",
        NEEDS,
        CALL + "'none') + PPO in torch",
        "log-probs; recomputes the logits",
        unavailable,
        **around_logprobs(logprobs),
    ),
]
