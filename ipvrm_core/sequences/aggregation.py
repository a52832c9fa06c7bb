"""How token losses become one number: as per-row weights, with normalisers counted on the global batch.

Shape letters: N packed response tokens, B sequences, S slots (the sampled token, then candidates).
"""

from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from ipvrm_core.packing import check_cu_seqlens
from ipvrm_core.sequences.groups import all_reduced
from ipvrm_core.sequences.segments import expand, segment_sum

Aggregation = Literal["sequence_mean", "token_mean", "token_sum"]


class Normalizers(NamedTuple):
    """What the loss of one optimiser step divides by, counted over the GLOBAL batch (all micro-batches and ranks).

    0-d float64 tensors or numbers. They add up: sum them over micro-batches, all-reduce them over ranks.
    """

    sequences: Tensor | float  # sequences with at least one unmasked token
    tokens: Tensor | float  # unmasked tokens
    candidate_mass: Tensor | float  # sum of pi_old(v) over all candidates of unmasked tokens

    def __add__(self, other: Self) -> Self:  # type: ignore[override] # a tuple's own would join the two
        return type(self)(*(one + more for one, more in zip(self, other, strict=True)))

    def across(self, process_group) -> Self:
        """The sums over the processes of a torch.distributed group."""
        return type(self)(*all_reduced(torch.stack([torch.as_tensor(value) for value in self]), process_group).unbind())


def candidate_mass(ids_NS: Tensor, old_logprobs_NS: Tensor) -> Tensor:
    """sum_{v in C_t} pi_old(v | s_t), per row, slot 0 left out: [N, S] -> [N]."""
    return old_logprobs_NS.exp().masked_fill(ids_NS < 0, 0.0)[:, 1:].sum(-1)


def normalizers(cu_seqlens: Tensor, mask_N: Tensor, mass_N: Tensor) -> Normalizers:
    """Counts of one batch: mask_N bool, mass_N of `candidate_mass`. Tensors: nothing waits for the device."""
    check_cu_seqlens(cu_seqlens, len(mask_N))
    mask_N = mask_N.to(torch.float32)  # counts are exact, and the kernels take it
    sequences = (segment_sum(mask_N, cu_seqlens) > 0).sum()
    return Normalizers(sequences.double(), mask_N.double().sum(), (mask_N * mass_N.to(torch.float64)).sum())


def branch_weights(
    cu_seqlens: Tensor,
    mask_N: Tensor,
    totals: Normalizers,
    aggregation: Aggregation,
    *,
    constant: float | None = None,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """(token_weights_N, candidate_weights_N) of a PolicyBatch; masked rows get 0.

    sequence_mean (paper): both 1 / (sequences * T_b), T_b the unmasked tokens of the row's sequence.
    token_mean (official; DAPO): 1 / tokens for the sampled branch, 1 / candidate_mass for the candidate branch, i.e.
    sum(pi_old * loss) / sum(pi_old). With the totals of the micro-batch itself and scale = 1 / accumulation steps it is
    the mean per micro-batch (TRL's bnpo), which depends on how the batch is split.
    token_sum: both 1 / constant (Dr. GRPO: sequences times the longest allowed length).

    scale multiplies both: the number of ranks where a framework averages gradients over ranks and the totals are
    global. The micro-batch must hold whole sequences; `totals` are those of the global batch.
    """
    check_cu_seqlens(cu_seqlens, len(mask_N))
    if aggregation not in ("sequence_mean", "token_mean", "token_sum"):
        raise ValueError(f"aggregation must be 'sequence_mean', 'token_mean' or 'token_sum'; got {aggregation!r}")
    if (constant is not None) != (aggregation == "token_sum") or (constant is not None and not constant > 0):
        raise ValueError(f"constant must be > 0 for 'token_sum' and None else; got {constant} for {aggregation!r}")
    mask_N = mask_N.to(torch.float32)
    if aggregation == "sequence_mean":
        length_N = expand(segment_sum(mask_N, cu_seqlens), cu_seqlens, len(mask_N)).clamp(min=1)
        divisors = [length_N.double() * _at_least(totals.sequences, 1)] * 2
    elif aggregation == "token_mean":
        tiny = torch.finfo(dtype).tiny
        divisors = [_at_least(totals.tokens, 1), _at_least(totals.candidate_mass, tiny)]
    else:
        divisors = [constant, constant]
    token_N, candidate_N = ((mask_N.double() * scale / divisor).to(dtype) for divisor in divisors)
    return token_N, candidate_N


def _at_least(value: Tensor | float, floor: float) -> Tensor | float:
    return value.clamp(min=floor) if isinstance(value, Tensor) else max(value, floor)
