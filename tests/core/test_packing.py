"""Packed batches: the bookkeeping by hand, and pack(unpack(x)) = x."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipvrm_core.packing import (
    check_cu_seqlens,
    cu_seqlens_from_lengths,
    lengths_of,
    pack,
    positions,
    sequence_ids,
    unpack,
)

CU = torch.tensor([0, 2, 2, 5])


def test_cu_seqlens():
    cu = cu_seqlens_from_lengths(torch.tensor([2, 0, 3], dtype=torch.int32))
    assert cu.tolist() == [0, 2, 2, 5]
    assert cu.dtype == torch.int64
    assert lengths_of(cu).tolist() == [2, 0, 3]
    assert cu_seqlens_from_lengths(torch.tensor([], dtype=torch.int64)).tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_sequence_ids_and_positions(dtype):
    assert sequence_ids(CU.to(dtype), 5).tolist() == [0, 0, 2, 2, 2]
    assert positions(CU.to(dtype), 5).tolist() == [1, 2, 1, 2, 3]  # t counts from one


def test_pack_takes_the_prefixes():
    padded = torch.tensor([[1, 2, 9], [9, 9, 9], [3, 4, 5]])
    packed, cu = pack(padded, torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]]))
    assert packed.tolist() == [1, 2, 3, 4, 5]
    assert cu.tolist() == [0, 2, 2, 5]


def test_unpack_pads_on_the_right_with_fill():
    padded = unpack(torch.tensor([1, 2, 3, 4, 5]), CU, fill=-1)
    assert padded.tolist() == [[1, 2, -1], [-1, -1, -1], [3, 4, 5]]
    assert padded.dtype == torch.int64
    assert unpack(torch.zeros(0, 7), torch.tensor([0])).shape == (0, 0, 7)
    assert unpack(torch.zeros(0), torch.tensor([0, 0])).shape == (1, 0)


def test_unpack_keeps_trailing_dimensions_and_the_gradient():
    packed = torch.arange(10.0).reshape(5, 2).requires_grad_()
    padded = unpack(packed, CU, fill=7.0)
    assert padded[0].tolist() == [[0.0, 1.0], [2.0, 3.0], [7.0, 7.0]]
    (padded * torch.arange(18.0).reshape(3, 3, 2)).sum().backward()
    assert packed.grad.tolist() == [[0.0, 1.0], [2.0, 3.0], [12.0, 13.0], [14.0, 15.0], [16.0, 17.0]]


def test_a_mask_with_holes_and_back():
    """A tool's output between a policy's own tokens: the rest counts on as if it were not there."""
    padded, mask = torch.tensor([[1, 9, 2, 9], [9, 3, 4, 5]]), torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1]])
    packed, cu = pack(padded, mask)
    assert packed.tolist() == [1, 2, 3, 4, 5]
    assert cu.tolist() == [0, 2, 5]
    assert positions(cu, 5).tolist() == [1, 2, 1, 2, 3]
    assert unpack(packed, cu, fill=9, mask=mask).tolist() == padded.tolist()
    with pytest.raises(ValueError, match=r"mask must have the tokens of cu_seqlens; got \[1, 3\], \[2, 3\]"):
        unpack(packed, cu, mask=torch.tensor([[1, 0, 0, 0], [0, 1, 1, 1]]))
    with pytest.raises(ValueError, match=r"mask must be \[B, T\] with B = 2; got shape \(1, 4\)"):
        unpack(packed, cu, mask=mask[:1])


@pytest.mark.parametrize(
    "bad",
    [
        torch.tensor([1, 5]),  # does not start with 0
        torch.tensor([0, 4]),  # does not end with N
        torch.tensor([0, 6, 5]),  # falls
        torch.tensor([0.0, 5.0]),  # not integers
        torch.tensor([[0, 5]]),  # not 1-d
        torch.tensor([], dtype=torch.int64),
    ],
)
def test_bad_cu_seqlens_are_refused(bad):
    with pytest.raises(ValueError, match="cu_seqlens must"):
        check_cu_seqlens(bad, 5)


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    extra=st.integers(0, 3),
    garbage=st.floats(-1e30, 1e30),
)
def test_round_trip_with_more_padding_and_garbage_in_it(lengths, extra, garbage):
    cu = cu_seqlens_from_lengths(torch.tensor(lengths))
    x = torch.arange(float(sum(lengths)))
    padded = torch.cat([unpack(x, cu, fill=garbage), torch.full((len(lengths), extra), garbage)], dim=1)
    mask = torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None]
    again, cu_again = pack(padded, mask)
    assert torch.equal(again, x)
    assert torch.equal(cu_again, cu)
