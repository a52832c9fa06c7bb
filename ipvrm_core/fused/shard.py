"""A head whose vocabulary is split over the ranks of a process group, each with some columns of every row.

Rank r has sum_v exp(l_v - a) = e^{u_r} over its columns, a being one number a row that all ranks know (the logit of the
first id), and the entropy H_r of its own softmax. Then

    log s = log sum_r e^{u_r}    P_r = e^{u_r - log s}    log p_k = l_k - a - log s    H = sum_r P_r (H_r - log P_r)

so a chunk of rows exchanges its K logits (one rank has each) and two numbers a row and rank, before any gradient. The
gradient by the logits is local: p_v = P_r times the rank's own softmax. That by the hidden states is a sum over ranks.

Shape letters: n rows of a chunk, K ids a row, R ranks.
"""

from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class Combined(NamedTuple):
    """Of all columns together; log P_r of this rank."""

    log_sum_n: Tensor
    log_share_n: Tensor
    entropy_n: Tensor


class VocabularyShard(NamedTuple):
    """Columns `first` to `first + V_r` of a vocabulary are here; the others are on the ranks of the group.

    `widest` is the largest V_r: all ranks take equally many rows at a time.
    """

    group_name: str
    first: int
    vocabulary: int
    widest: int

    @classmethod
    def of(cls, weight: Tensor, group: dist.ProcessGroup | None = None) -> Self:
        """Of this rank's rows of the head [V_r, D], which follow those of the ranks before it. Collective; waits.

        group: None is that of a DTensor's mesh, or the default one. RuntimeError where torch.distributed is not
        initialised.
        """
        if hasattr(weight, "to_local"):
            group, weight = group or weight.device_mesh.get_group(), weight.to_local()
        group = group or dist.group.WORLD
        if group is None:
            raise RuntimeError("a vocabulary shard needs torch.distributed.init_process_group; it was not called")
        counts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(counts, len(weight), group=group)
        rank = dist.get_rank(group)
        return cls(group.group_name, sum(counts[:rank]), sum(counts), max(counts))

    @property
    def group(self) -> dist.ProcessGroup:
        return dist.distributed_c10d._resolve_process_group(self.group_name)

    @property
    def ranks(self) -> int:
        return dist.get_world_size(self.group)

    def packed(self) -> str:
        """For an operator; `unpacked` is the way back."""
        return "|".join(map(str, self))

    def local_ids(self, ids_nK: Tensor, columns: int) -> Tensor:
        """Ids as this rank counts them, -1 where another rank has them."""
        local_nK = ids_nK - self.first
        return local_nK.masked_fill((ids_nK < 0) | (local_nK < 0) | (local_nK >= columns), -1)

    def reference(self, y_nK: Tensor) -> Tensor:
        """[n], what all ranks subtract: the first id's logit; 0 where there is none, or none that is finite."""
        first_n = y_nK[:, 0] if y_nK.shape[1] else y_nK.new_zeros(len(y_nK))
        return first_n.masked_fill(~first_n.isfinite(), 0.0)

    def sum(self, x: Tensor) -> Tensor:
        """In place, over the ranks."""
        dist.all_reduce(x, group=self.group)
        return x

    def gathered(self, x: Tensor) -> Tensor:
        """[R, ...]."""
        parts = [torch.empty_like(x) for _ in range(self.ranks)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.stack(parts)

    def combined(self, u_n: Tensor, entropy_n: Tensor) -> Combined:
        """The sums of this rank (u_r, H_r) with those of all others."""
        u_Rn, entropy_Rn = self.gathered(torch.stack([u_n, entropy_n])).unbind(1)
        log_sum_n = u_Rn.logsumexp(0)
        log_share_Rn = u_Rn - log_sum_n
        share_Rn = log_share_Rn.exp()
        terms_Rn = (share_Rn * (entropy_Rn - log_share_Rn)).masked_fill(share_Rn == 0, 0.0)
        return Combined(log_sum_n, u_n - log_sum_n, terms_Rn.sum(0))

    def merged(self, ids_nk: Tensor, logp_nk: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """[n, R k]: the candidates of all ranks, at most k of each, ids as the whole head counts them."""
        ids_nk = torch.where(ids_nk < 0, -1, ids_nk + self.first)
        room = (0, k - ids_nk.shape[1])
        ids_nk, logp_nk = F.pad(ids_nk, room, value=-1), F.pad(logp_nk, room)
        return tuple(self.gathered(x).movedim(0, 1).flatten(1) for x in (ids_nk, logp_nk))


def unpacked(packed: str) -> VocabularyShard | None:
    """None of an empty string: the head is whole."""
    if not packed:
        return None
    name, *numbers = packed.rsplit("|", 3)
    return VocabularyShard(name, *map(int, numbers))


def elsewhere(ids_nK: Tensor, local_nK: Tensor, c_nK: Tensor, grad_lse_n: Tensor | None) -> Tensor:
    """dL/dLSE less the coefficients of ids that other ranks have: as p_v is concerned, they are no different."""
    gone_n = c_nK.masked_fill((ids_nK < 0) | (local_nK >= 0), 0.0).sum(-1)
    return -gone_n if grad_lse_n is None else grad_lse_n - gone_n
