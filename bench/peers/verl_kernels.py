"""verl 0.9.1: log-probs and entropy of a linear head, by its Triton kernels and by chunks of rows in torch."""

import sys
from importlib.util import find_spec
from types import ModuleType

from torch import Tensor

from ipvrm_core.bench.peers.base import Peer, around_logprobs, needs
from ipvrm_core.bench.problems import Problem

INSTALL = "pip install verl==0.9.1"
ROWS = 512  # its default


def _without_ray() -> None:
    """`import verl` brings Ray. Where that is not installed, packages that import nothing stand in for those above.

    The kernels are verl's own.
    """
    if find_spec("ray") is not None or "verl" in sys.modules:
        return
    (root,) = find_spec("verl").submodule_search_locations
    for folder in ("", "/utils", "/utils/experimental"):
        package = ModuleType("verl" + folder.replace("/", "."))
        package.__path__ = [root + folder]
        sys.modules[package.__name__] = package


def triton_logprobs(problem: Problem) -> Tensor:
    _without_ray()
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(problem.hidden_ND, problem.weight_VD, problem.sampled.ids_N, 1.0, "none")[0]


def chunked_logprobs(problem: Problem) -> Tensor:
    _without_ray()
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    return FusedLinearForPPO(ROWS)(problem.hidden_ND, problem.weight_VD, problem.sampled.ids_N)[0]


PEERS = [
    Peer(
        "verl Triton log-prob",
        INSTALL,
        "linear_cross_entropy(hidden, weight, ids, 1.0, 'none') + PPO in torch",
        "log-probs and entropy; recomputes the logits",
        needs("verl", gpu=True),
        package="verl",
        **around_logprobs(triton_logprobs),
    ),
    Peer(
        "verl chunked log-prob",
        INSTALL,
        f"FusedLinearForPPO({ROWS}) + PPO in torch",
        "log-probs and entropy; recomputes the logits",
        needs("verl"),
        package="verl",
        **around_logprobs(chunked_logprobs),
    ),
]
