"""Prefix values of the implicit reward model.

q_t = log pi_phi(y_t | s_t) - log pi_ref(y_t | s_t); response tokens only, EOS included, prompt tokens never counted.
"""

from torch import Tensor

from ipvrm_core.packing import check_cu_seqlens, positions
from ipvrm_core.sequences import segments


def prefix_values(log_ratio_N: Tensor, cu_seqlens: Tensor, beta: float) -> Tensor:
    """V_t = beta * sum_{u <= t} q_u, the value after token t = 1..T: [N] -> [N] (nats times beta)."""
    check_cu_seqlens(cu_seqlens, len(log_ratio_N))
    return beta * segments.segment_cumsum(log_ratio_N, cu_seqlens)


def mean_prefix_values(log_ratio_N: Tensor, cu_seqlens: Tensor, beta: float) -> Tensor:
    """vbar_t = V_t / t; sigma(vbar_t) reads as the probability of eventual correctness: [N] -> [N]."""
    values_N = prefix_values(log_ratio_N, cu_seqlens, beta)
    return values_N / positions(cu_seqlens, len(log_ratio_N))
