"""Randomness as a pure function of where it is used, so that a resumed run draws what an uninterrupted one would."""

import zlib

import torch


def stable_seed(*names) -> int:
    """A 32-bit seed from its arguments, the same in every process."""
    return zlib.crc32(repr(names).encode())


def epoch_slice(size: int, start: int, count: int, seed: int) -> list[int]:
    """Items start .. start + count of an endless sequence of shuffled epochs over range(size)."""
    chosen: list[int] = []
    for position in range(start, start + count):
        epoch, place = divmod(position, size)
        if not chosen or place == 0:
            order = torch.randperm(size, generator=torch.Generator().manual_seed(stable_seed(seed, epoch))).tolist()
        chosen.append(order[place])
    return chosen
