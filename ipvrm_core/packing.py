"""Packed variable-length batches: one vector [N] for all sequences, cut by cu_seqlens.

Shape letters: N packed tokens, B sequences, T the longest length. cu_seqlens [B+1] int64 starts with 0 and ends with N;
sequence b owns rows cu_seqlens[b] : cu_seqlens[b+1]. Empty sequences are allowed.
"""

import torch
from torch import Tensor


def cu_seqlens_from_lengths(lengths: Tensor) -> Tensor:
    """cu[b] = sum of lengths before b: [B] int -> [B+1] int64."""
    return torch.cat([lengths.new_zeros(1, dtype=torch.int64), lengths.to(torch.int64).cumsum(0)])


def lengths_of(cu_seqlens: Tensor) -> Tensor:
    """[B+1] -> [B], T_b."""
    return cu_seqlens[1:] - cu_seqlens[:-1]


def sequence_ids(cu_seqlens: Tensor, total: int) -> Tensor:
    """[N] int64: the sequence each row belongs to. `total` = N is passed so that nothing waits for the device."""
    index_B = torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device)
    return torch.repeat_interleave(index_B, lengths_of(cu_seqlens), output_size=total)


def positions(cu_seqlens: Tensor, total: int) -> Tensor:
    """[N] int64: t = 1..T_b within its sequence (the paper counts from 1)."""
    starts_N = cu_seqlens[:-1][sequence_ids(cu_seqlens, total)]
    return torch.arange(1, total + 1, device=cu_seqlens.device) - starts_N


def pack(padded: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """[B, T, ...] and a mask [B, T] -> (packed [N, ...], cu_seqlens [B+1]).

    The mask may have holes, as where a tool's output stands between a policy's own tokens: a sequence is then its
    remaining tokens, one behind the other, and t counts those alone.
    """
    if mask.shape != padded.shape[:2]:
        raise ValueError(f"mask must be [B, T] = {tuple(padded.shape[:2])}; got shape {tuple(mask.shape)}")
    mask = mask.bool()
    return padded[mask], cu_seqlens_from_lengths(mask.sum(1))


def unpack(packed: Tensor, cu_seqlens: Tensor, fill: float = 0.0, *, mask: Tensor | None = None) -> Tensor:
    """Packed [N, ...] -> [B, T, ...], the rest filled with `fill`: the inverse of `pack` with its mask [B, T].

    Without a mask right-padded, T the longest sequence.
    """
    check_cu_seqlens(cu_seqlens, len(packed))
    lengths_B = lengths_of(cu_seqlens)
    if mask is None:
        T = int(lengths_B.max()) if len(lengths_B) else 0
        mask = torch.arange(T, device=packed.device) < lengths_B[:, None]
    elif mask.dim() != 2 or len(mask) != len(lengths_B):
        raise ValueError(f"mask must be [B, T] with B = {len(lengths_B)}; got shape {tuple(mask.shape)}")
    elif mask.device.type == "cpu" and mask.sum(1).tolist() != lengths_B.tolist():
        raise ValueError(f"mask must have the tokens of cu_seqlens; got {mask.sum(1).tolist()}, {lengths_B.tolist()}")
    padded = packed.new_full((*mask.shape, *packed.shape[1:]), fill)
    return padded.masked_scatter(mask.bool().view(*mask.shape, *[1] * (packed.dim() - 1)), packed)


def check_cu_seqlens(cu_seqlens: Tensor, total: int) -> None:
    """Shape and dtype always; the values only on CPU, where looking waits for no device, and not under compile."""
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens must be a 1-d integer tensor [B+1]; got shape {tuple(cu_seqlens.shape)}, {cu_seqlens.dtype}"
        )
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != total or (lengths_of(cu_seqlens) < 0).any():
        raise ValueError(f"cu_seqlens must rise from 0 to N = {total}; got {cu_seqlens.tolist()}")
