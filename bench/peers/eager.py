"""PyTorch as one writes it: every log-probability of the vocabulary, then autograd (bench/naive.py)."""

from torch import Tensor

from ipvrm_core.bench import naive
from ipvrm_core.bench.peers.base import Peer, needs
from ipvrm_core.bench.problems import Problem

CALL = "F.linear -> float -> log_softmax -> gather, PPO in torch"


def linear(problem: Problem) -> Tensor:
    return naive.distrl_loss(problem.hidden_ND, problem.weight_VD, problem.batch)[0]


def logits(problem: Problem) -> Tensor:
    return naive.distrl_loss_from_logits(problem.logits_NV, problem.batch)[0]


PEERS = [
    Peer("eager", "-", CALL, "the same loss", needs(), linear, linear),
    Peer("eager", "-", CALL, "the same loss", needs(), logits, logits, level="logits"),
]
