"""TRL 1.16.0: chunked log-probs of a linear head, and log-probs with entropy of given logits."""

import sys
from contextlib import nullcontext
from importlib.util import find_spec
from types import SimpleNamespace

from torch import Tensor

from ipvrm_core.bench.peers.base import Peer, around_logprobs, needs
from ipvrm_core.bench.problems import Problem

INSTALL = "pip install trl==1.16.0"
VOCABULARY_CHUNK = 32768


def _without_datasets() -> None:
    """Its backward imports trl.trainer.utils (so datasets and pandas) for one helper, a null context outside ZeRO-3.

    Where datasets is not installed that helper alone stands in for the module; the kernels are TRL's own.
    """
    if any(find_spec(name) is None for name in ("datasets", "pandas", "accelerate")):
        stand_in = SimpleNamespace(maybe_gather_lm_head_ctx=lambda *_: nullcontext())
        sys.modules.setdefault("trl.trainer.utils", stand_in)


def chunked_logprobs(problem: Problem) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    _without_datasets()
    hidden, ids, mask_N = problem.hidden_ND, problem.sampled.ids_N, problem.sampled.mask_N
    settings = (1.0, VOCABULARY_CHUNK, None, 1.0, ())
    if not problem.setting.masked:
        return ChunkedLogProbFunction.apply(hidden, problem.weight_VD, None, ids, *settings)[0]
    # As its trainer does: only the unmasked rows are scored.
    logp_M = ChunkedLogProbFunction.apply(hidden[mask_N], problem.weight_VD, None, ids[mask_N], *settings)[0]
    return logp_M.new_zeros(mask_N.shape).masked_scatter(mask_N, logp_M)


def logits_logprobs(problem: Problem) -> Tensor:
    from trl.kernels import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy(problem.logits_NV, problem.sampled.ids_N)[0]


PEERS = [
    Peer(
        "TRL chunked log-prob",
        INSTALL,
        f"ChunkedLogProbFunction.apply(..., chunk_size={VOCABULARY_CHUNK}, outputs=()) + PPO in torch",
        "log-probs; recomputes the logits",
        needs("trl", "transformers"),
        package="trl",
        **around_logprobs(chunked_logprobs),
    ),
    Peer(
        "TRL log-prob",
        INSTALL,
        "selective_log_softmax_and_entropy(logits, ids) + PPO in torch",
        "log-probs and entropy",
        needs("trl", "transformers", triton=True),
        level="logits",
        package="trl",
        **around_logprobs(logits_logprobs),
    ),
]
