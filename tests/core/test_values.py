"""Prefix values and weights over t, by hand, and the promise that a sequence does not see its neighbours."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipvrm_core.packing import cu_seqlens_from_lengths
from ipvrm_core.sequences.reward_losses import prefix_weights
from ipvrm_core.sequences.segments import (
    expand,
    segment_cumsum,
    segment_mean,
    segment_reverse_scan,
    segment_sum,
)
from ipvrm_core.sequences.values import mean_prefix_values, prefix_values


def f64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def close(got, *expected, atol=1e-12):
    torch.testing.assert_close(got, torch.tensor(expected, dtype=got.dtype), rtol=0, atol=atol)


CU = torch.tensor([0, 3, 3, 5])  # three tokens, none, two tokens
Q = f64(0.1, 0.3, -0.1, -0.2, 0.6)


def test_values_are_running_sums_with_the_last_token_counted():
    # beta 10: (.1, .1 + .3, .1 + .3 - .1) -> (1, 4, 3);  (-.2, -.2 + .6) -> (-2, 4)
    close(prefix_values(Q, CU, beta=10.0), 1.0, 4.0, 3.0, -2.0, 4.0)


def test_mean_values_divide_by_t_from_one():
    close(mean_prefix_values(Q, CU, beta=10.0), 1 / 1, 4 / 2, 3 / 3, -2 / 1, 4 / 2)


def test_segment_operations():
    x = f64(1, 2, 3, 10, 20)
    close(segment_sum(x, CU), 6.0, 0.0, 30.0)
    close(segment_mean(x, CU), 2.0, 0.0, 15.0)
    close(segment_cumsum(x, CU), 1.0, 3.0, 6.0, 10.0, 30.0)
    close(segment_reverse_scan(x, CU), 6.0, 5.0, 3.0, 30.0, 20.0)
    # decay 1/2: 1 + (2 + 3/2)/2 = 2.75, 2 + 3/2 = 3.5, 3;  10 + 20/2 = 20, 20
    close(segment_reverse_scan(x, CU, decay=0.5), 2.75, 3.5, 3.0, 20.0, 20.0)
    close(expand(f64(7, 8, 9), CU, 5), 7.0, 7.0, 7.0, 9.0, 9.0)


def test_nothing_at_all():
    empty, cu = f64(), torch.tensor([0, 0])
    assert segment_cumsum(empty, cu).shape == (0,)
    assert segment_reverse_scan(empty, cu).shape == (0,)
    assert segment_sum(empty, cu).tolist() == [0.0]
    assert segment_sum(empty, torch.tensor([0])).shape == (0,)


def weights(weighting, *lengths):
    cu = cu_seqlens_from_lengths(torch.tensor(lengths))
    return prefix_weights(cu, sum(lengths), weighting, dtype=torch.float64)


def test_weights_uniform():
    close(weights("uniform", 4, 1, 2), 0.25, 0.25, 0.25, 0.25, 1.0, 0.5, 0.5)


def test_weights_late():
    # t/T = (1/4, 2/4, 3/4, 4/4), sum 10/4 -> (.1, .2, .3, .4);  T = 2: (1/2, 1), sum 3/2 -> (1/3, 2/3)
    close(weights("late", 4, 1, 2), 0.1, 0.2, 0.3, 0.4, 1.0, 1 / 3, 2 / 3)


def test_weights_early():
    # 1 - t/T = (3/4, 2/4, 1/4, 0), sum 6/4 -> (1/2, 1/3, 1/6, 0);  T = 2: (1/2, 0) -> (1, 0);  T = 1 is 0/0: uniform
    close(weights("early", 4, 1, 2), 1 / 2, 1 / 3, 1 / 6, 0.0, 1.0, 1.0, 0.0)


@pytest.mark.parametrize("weighting", ["uniform", "early", "late"])
def test_weights_sum_to_one_in_every_sequence(weighting):
    lengths = list(range(1, 40))
    cu = cu_seqlens_from_lengths(torch.tensor(lengths))
    close(segment_sum(weights(weighting, *lengths), cu), *[1.0] * len(lengths))


def test_unknown_weighting_is_refused():
    with pytest.raises(ValueError, match="weighting must be"):
        prefix_weights(CU, 5, "middle")


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), lengths=st.lists(st.integers(0, 60), min_size=1, max_size=6))
def test_scans_of_a_sequence_are_bit_identical_whatever_else_is_in_the_batch(seed, lengths):
    cu = cu_seqlens_from_lengths(torch.tensor(lengths))
    x = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(seed))  # float32: rounding would show
    scans = (segment_cumsum, segment_reverse_scan, lambda x, cu: segment_reverse_scan(x, cu, 0.95))
    for scan in (*scans, lambda x, cu: mean_prefix_values(x, cu, 10.0)):
        whole = scan(x, cu)
        for start, stop in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
            alone = scan(x[start:stop], torch.tensor([0, stop - start]))
            assert torch.equal(alone, whole[start:stop])
