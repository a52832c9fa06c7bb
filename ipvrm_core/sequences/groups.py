"""The answers to one prompt: groups named by anything, on one process or several.

Shape letters: B answers of this process, A answers of all processes, N packed response tokens.
"""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Groups: TypeAlias = Tensor | Sequence[Hashable]  # one a sequence: integers [B], or uids of any kind


def group_index(groups: Groups, count: int, device: torch.device) -> Tensor:
    """Integers [B], equal where the groups are. ValueError unless there is one group a sequence."""
    if isinstance(groups, Tensor):
        if groups.shape != (count,) or groups.is_floating_point():
            raise ValueError(
                f"groups must be integers [B] = ({count},); got {groups.dtype}, shape {tuple(groups.shape)}"
            )
        return groups
    if len(groups) != count:
        raise ValueError(f"groups must be one a sequence, {count}; got {len(groups)}")
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(uid, len(numbers)) for uid in groups], dtype=torch.int64, device=device)


class Gathered(NamedTuple):
    """values [A, ...] and groups [A] of all processes, and which of them are of this one."""

    values: Tensor
    groups: Tensor
    own: slice


def gather(values: Tensor, groups: Groups, process_group) -> Gathered:
    """values [B, ...] of every process of a torch.distributed group, which must all call this; B may differ.

    Without a group this process alone. Integer groups mean the same prompt on every process, as uids do.
    """
    if process_group is None:
        return Gathered(values, group_index(groups, len(values), values.device), slice(0, len(values)))
    from torch import distributed

    uids = groups.tolist() if isinstance(groups, Tensor) else list(groups)
    if len(uids) != len(values):
        raise ValueError(f"groups must be one a sequence, {len(values)}; got {len(uids)}")
    parts: list[Any] = [None] * distributed.get_world_size(process_group)
    distributed.all_gather_object(parts, (values.detach().cpu(), uids), group=process_group)
    rank = distributed.get_rank(process_group)
    start = sum(len(part[1]) for part in parts[:rank])
    everyone = torch.cat([part[0] for part in parts]).to(values.device)
    index = group_index([uid for part in parts for uid in part[1]], len(everyone), values.device)
    return Gathered(everyone, index, slice(start, start + len(values)))


def all_reduced(tensor: Tensor, process_group) -> Tensor:
    """The sum over the processes of the group; the tensor itself without one."""
    if process_group is None:
        return tensor
    from torch import distributed

    total = tensor.clone()
    distributed.all_reduce(total, group=process_group)
    return total


def largest_across(x_N: Tensor, process_group) -> Tensor:
    """The largest of all elements of all processes, 0-d; 0 where there are none, which takes x >= 0."""
    largest = x_N.amax() if x_N.numel() else x_N.new_zeros(())
    if process_group is None:
        return largest
    from torch import distributed

    largest = largest.clone()
    distributed.all_reduce(largest, op=distributed.ReduceOp.MAX, group=process_group)
    return largest
