"""bench/peers/verl_kernels.py against the truth, where verl is installed. Its Triton kernels need a GPU."""

import torch

from ipvrm_core.bench import problems, truth
from ipvrm_core.bench.cases import Setting, Shape
from ipvrm_core.bench.peers.verl_kernels import PEERS


def test_the_chunked_head_agrees_with_the_reference():
    cpu = torch.device("cpu")
    available = [peer for peer in PEERS if not peer.unavailable(cpu)]
    assert [peer.name for peer in available] == ["verl chunked log-prob"]
    for kind in ("ppo", "distrl"):
        setting = Setting("toy", Shape(8, 16, 141), frozen=False, loss=kind, masked=0.3)
        problem = problems.make_problem(setting, cpu, torch.float32)
        loss = available[0].like_for_like if kind == "ppo" else available[0].distrl
        exact = truth.truth(problem, kind)
        deviation = truth.deviations(truth.step(loss(problem), problem), exact)
        assert max(deviation.values()) < 1e-5, (kind, deviation)
