"""How token losses become one number: as per-row weights, with normalisers counted on the global batch.

Shape letters: N packed response tokens, B sequences, K candidates.
"""

from typing import Literal

import torch
from torch import Tensor

from ipvrm_core.packing import check_cu_seqlens
from ipvrm_core.reference.segments import expand, segment_sum
from ipvrm_core.types import Normalizers

Aggregation = Literal["sequence_mean", "token_mean"]


def candidate_mass(candidate_ids_NK: Tensor, candidate_old_logprobs_NK: Tensor) -> Tensor:
    """sum_{v in C_t} pi_old(v | s_t), per row: [N, K] -> [N]."""
    mass_NK = candidate_old_logprobs_NK.exp()
    return torch.where(candidate_ids_NK >= 0, mass_NK, torch.zeros_like(mass_NK)).sum(-1)


def normalizers(cu_seqlens: Tensor, mask_N: Tensor, mass_N: Tensor) -> Normalizers:
    """Counts of one batch: mask_N bool, mass_N of `candidate_mass`. Over micro-batches or ranks the three add up.

    Waits for the device once; call it when the batch is made, not in the hot path.
    """
    check_cu_seqlens(cu_seqlens, len(mask_N))
    mask_N = mask_N.to(torch.float64)
    per_sequence_B = segment_sum(mask_N, cu_seqlens)
    numbers = [(per_sequence_B > 0).sum().double(), mask_N.sum(), (mask_N * mass_N.to(torch.float64)).sum()]
    return Normalizers(*torch.stack(numbers).tolist())


def branch_weights(
    cu_seqlens: Tensor, mask_N: Tensor, totals: Normalizers, aggregation: Aggregation, dtype=torch.float32
) -> tuple[Tensor, Tensor]:
    """(token_weights_N, candidate_weights_N) of a PolicyBatch; masked rows get 0.

    sequence_mean (paper): both 1 / (sequences * T_b), T_b the unmasked tokens of the row's sequence.
    token_mean (official): 1 / tokens for the sampled branch, 1 / candidate_mass for the candidate branch, i.e.
    sum(pi_old * loss) / sum(pi_old).
    The micro-batch must hold whole sequences; `totals` are those of the global batch.
    """
    check_cu_seqlens(cu_seqlens, len(mask_N))
    mask_N = mask_N.to(dtype)
    if aggregation == "sequence_mean":
        length_N = expand(segment_sum(mask_N, cu_seqlens), cu_seqlens, len(mask_N))
        weights_N = mask_N / (length_N.clamp(min=1) * max(totals.sequences, 1))
        return weights_N, weights_N
    if aggregation == "token_mean":
        floor = torch.finfo(dtype).tiny
        return mask_N / max(totals.tokens, 1), mask_N / max(totals.candidate_mass, floor)
    raise ValueError(f"aggregation must be 'sequence_mean' or 'token_mean'; got {aggregation!r}")
