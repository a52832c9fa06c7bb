"""Response tokens in verl's batches: jagged sequences of prompt and response, the fields of responses jagged as well.

Shape letters: B answers, J tokens of all sequences, R of all responses, N of them that the policy wrote, S slots.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ipvrm_core.packing import cu_seqlens_from_lengths


class Rows(NamedTuple):
    """offsets_B1 of the sequences; responses_B1 of the responses; index_R: the position that predicts each response
    token, in J; mask_R: the policy wrote it; tokens_N.
    """

    offsets_B1: Tensor
    responses_B1: Tensor
    index_R: Tensor
    mask_R: Tensor
    tokens_N: Tensor

    @classmethod
    def of(cls, input_ids: Tensor, response_mask: Tensor) -> "Rows":
        """Both nested (jagged), [B, j] and [B, r]; a response ends its sequence."""
        if not (input_ids.is_nested and response_mask.is_nested):
            raise ValueError("DistRL needs verl's batches without padding: input_ids and response_mask must be nested")
        ends_B, lengths_B = input_ids.offsets()[1:], response_mask.offsets().diff()
        responses_B1 = cu_seqlens_from_lengths(lengths_B)
        mask_R = response_mask.values().bool()
        place_R = torch.arange(len(mask_R), device=mask_R.device) - responses_B1[:-1].repeat_interleave(lengths_B)
        index_R = (ends_B - lengths_B - 1).repeat_interleave(lengths_B) + place_R
        return cls(input_ids.offsets(), responses_B1, index_R, mask_R, input_ids.values()[index_R + 1][mask_R])

    @property
    def cu_seqlens(self) -> Tensor:
        """Of the N tokens."""
        return cu_seqlens_from_lengths(self.mask_R.long())[self.responses_B1]

    def hidden(self, hidden_BLD: Tensor) -> Tensor:
        """[N, D] of [1, J + padding, D], or of [B, L, D] padded on the right."""
        if len(hidden_BLD) == 1 and hidden_BLD.shape[1] >= int(self.offsets_B1[-1]):
            flat_JD = hidden_BLD[0]
        else:
            positions = torch.arange(hidden_BLD.shape[1], device=hidden_BLD.device)
            flat_JD = hidden_BLD[positions < self.offsets_B1.diff()[:, None]]
        return flat_JD[self.index_R][self.mask_R]

    def nested(self, values_N: Tensor, fill: float = 0.0) -> Tensor:
        """[N, ...] back to the responses, jagged [B, r, ...]; `fill` where the policy did not write."""
        values_R = values_N.new_full((len(self.mask_R), *values_N.shape[1:]), fill)
        values_R[self.mask_R] = values_N
        return torch.nested.nested_tensor_from_jagged(values_R, self.responses_B1)

    def packed(self, nested: Tensor) -> Tensor:
        """[N, ...] of a jagged field of the responses."""
        return nested.values()[self.mask_R]
