"""Apple's cut cross-entropy, from PyPI (25.1.1; its repository has newer code with other switches)."""

from torch import Tensor

from ipvrm_core.bench.peers.base import Peer, around_logprobs, needs
from ipvrm_core.bench.problems import Problem


def logprobs(problem: Problem) -> Tensor:
    """impl="cce" on a GPU; on a CPU (toy runs) the other one the package has, plain torch under torch.compile."""
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if problem.hidden_ND.is_cuda else "torch_compile"
    return -linear_cross_entropy(
        problem.hidden_ND, problem.weight_VD, problem.targets_N(), reduction="none", impl=impl
    ).float()


PEERS = [
    Peer(
        "Apple CCE",
        "pip install cut-cross-entropy==25.1.1",
        "linear_cross_entropy(reduction='none', impl='cce') + PPO in torch",
        "log-probs; gradient filtered below 2.4e-4 (its default)",
        needs("cut_cross_entropy"),
        package="cut_cross_entropy",
        **around_logprobs(logprobs),
    ),
]
