"""The candidate rule C_t = { v : pi_old(v) >= P_min } on distributions small enough to read."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipvrm_core.reference.candidates import candidate_slots, select_candidates, select_candidates_from_logits
from ipvrm_core.types import Candidates

ODDS = (1, 2, 3, 4)  # p = (.1, .2, .3, .4)


def select(odds=ODDS, p_min=0.25, sampled=0, dtype=torch.float64, **rule) -> Candidates:
    logits = torch.tensor([[math.log(x) for x in odds]], dtype=dtype)
    return select_candidates_from_logits(logits, torch.tensor([sampled]), p_min, **rule)


def test_members_ascending_padded_and_not_renormalised():
    got = select(odds=(4, 1, 3, 2), p_min=0.25)  # p = (.4, .1, .3, .2): ids 0 and 2; slots floor(1 / .25) = 4
    assert got.ids_NS[:, 1:].tolist() == [[0, 2, -1, -1]]
    assert got.counts_N.tolist() == [2]
    torch.testing.assert_close(got.logprobs_NS[:, 1:][0, :2].exp(), torch.tensor([0.4, 0.3], dtype=torch.float64))
    assert got.logprobs_NS[:, 1:][0, 2:].tolist() == [0.0, 0.0]
    torch.testing.assert_close(got.sampled_logprobs_N.exp(), torch.tensor([0.4], dtype=torch.float64))
    # the entropy does not depend on the order of (.1, .2, .3, .4)
    torch.testing.assert_close(got.entropy_N, torch.tensor([1.279854225833668], dtype=torch.float64))


def test_sampled_logprob_is_returned_also_outside_the_set():
    got = select(p_min=0.35, sampled=0)  # only p = .4 qualifies; the sampled token has .1
    assert got.ids_NS[:, 1:].tolist() == [[3, -1]]
    torch.testing.assert_close(got.sampled_logprobs_N.exp(), torch.tensor([0.1], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threshold_is_inclusive_unless_strict(dtype):
    # p = 1/4 exactly for all four, and P_min = 1/4
    assert select(odds=(1, 1, 1, 1), p_min=0.25, dtype=dtype).counts_N.tolist() == [4]
    strict = select(odds=(1, 1, 1, 1), p_min=0.25, dtype=dtype, strict=True)
    assert strict.counts_N.tolist() == [0]
    assert strict.ids_NS[:, 1:].tolist() == [[-1] * 4]


def test_top_k_caps_and_gives_ties_to_the_smaller_id():
    # p = (1, 3, 3, 1, 3) / 11 with P_min = .2: ids 1, 2, 4 all at 3/11 = .27; the cap of two keeps 1 and 2
    got = select(odds=(1, 3, 3, 1, 3), p_min=0.2, top_k=2)
    assert got.ids_NS[:, 1:].tolist() == [[1, 2]]
    assert got.counts_N.tolist() == [2]
    # the cap keeps the most probable, not the smallest ids: p = (.1, .2, .3, .4)
    assert select(p_min=0.2, top_k=1).ids_NS[:, 1:].tolist() == [[3]]
    # and never lets a token in that the threshold keeps out
    assert select(p_min=0.35, top_k=3).ids_NS[:, 1:].tolist() == [[3, -1]]
    assert select(p_min=0.35, top_k=0).ids_NS[:, 1:].shape == (1, 0)


def test_sampled_token_is_kept_beyond_threshold_and_cap():
    got = select(p_min=0.35, sampled=0, keep_sampled=True)  # slots floor(1 / .35) + 1 = 3
    assert got.ids_NS[:, 1:].tolist() == [[0, 3, -1]]
    assert got.counts_N.tolist() == [2]
    torch.testing.assert_close(got.logprobs_NS[:, 1:][0, :2].exp(), torch.tensor([0.1, 0.4], dtype=torch.float64))
    # beyond a full cap as well, and not twice when it already is a member
    assert select(p_min=0.2, top_k=1, sampled=1, keep_sampled=True).ids_NS[:, 1:].tolist() == [[1, 3]]
    assert select(p_min=0.2, top_k=1, sampled=3, keep_sampled=True).ids_NS[:, 1:].tolist() == [[3, -1]]


def test_excluded_rows_have_no_candidates_even_with_keep_sampled():
    logits = torch.tensor([ODDS, ODDS], dtype=torch.float64).log()
    got = select_candidates_from_logits(
        logits, torch.tensor([3, 3]), 0.35, keep_sampled=True, exclude_N=torch.tensor([False, True])
    )
    assert got.ids_NS[:, 1:].tolist() == [[3, -1, -1], [-1, -1, -1]]
    assert got.counts_N.tolist() == [1, 0]
    assert got.logprobs_NS[:, 1:][1].tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(got.sampled_logprobs_N.exp(), torch.tensor([0.4, 0.4], dtype=torch.float64))


def test_official_rule():
    # p = (10, 20, 12, 11, 13, 14, 15, 5) / 100 at P_min = .1: strict drops id 0 (p = .1, in float32 as the trainer
    # has it), leaving 1..6; the top five of them are 1, 6, 5, 4, 2; the sampled token 7 (p = .05) is kept all the same
    odds = (10, 20, 12, 11, 13, 14, 15, 5)
    official = {"strict": True, "top_k": 5, "keep_sampled": True}
    got = select(odds=odds, p_min=0.1, sampled=7, dtype=torch.float32, **official)
    assert got.ids_NS[:, 1:].tolist() == [[1, 2, 4, 5, 6, 7]]
    assert got.counts_N.tolist() == [6]


def test_probabilities_are_at_the_sampling_temperature():
    # T = 1/2: p = (1, 4, 9, 16) / 30 = (.03, .13, .3, .53)
    got = select(p_min=0.25, temperature=0.5)
    assert got.ids_NS[:, 1:].tolist() == [[2, 3, -1, -1]]
    torch.testing.assert_close(
        got.logprobs_NS[:, 1:][0, :2].exp(), torch.tensor([9 / 30, 16 / 30], dtype=torch.float64)
    )
    assert select(p_min=0.5, temperature=0.5).ids_NS[:, 1:].tolist() == [[3, -1]]
    assert select(p_min=0.5).counts_N.tolist() == [0]


def test_slots():
    assert candidate_slots(0.1) == 10
    assert candidate_slots(0.05) == 20
    assert candidate_slots(0.3) == 3  # 3.33
    assert candidate_slots(1 / 3) == 3
    assert candidate_slots(1.0) == 1
    assert candidate_slots(0.1, top_k=5) == 5
    assert candidate_slots(0.3, top_k=5) == 3
    assert candidate_slots(0.1, top_k=5, keep_sampled=True) == 6
    assert candidate_slots(0.1, keep_sampled=True) == 11
    assert [candidate_slots(1 / n) for n in range(1, 500)] == list(range(1, 500))


def test_slots_never_exceed_the_vocabulary():
    assert select(p_min=0.05).ids_NS[:, 1:].shape == (1, 4)


@pytest.mark.parametrize("bad", [{"p_min": 0.0}, {"p_min": 1.5}, {"p_min": -0.1}, {"p_min": 0.1, "top_k": -1}])
def test_bad_rules_are_refused(bad):
    with pytest.raises(ValueError, match="must be"):
        candidate_slots(**bad)


def test_slots_hold_every_set_near_the_threshold():
    """Ten tokens at .1: members, and with room for all, up to a P_min that is beyond .1 by the slack."""
    for hair in (-1e-4, -1.5e-5, -1e-9, 0.0, 1e-9, 0.9e-5, 1.1e-5, 1.5e-5, 2.5e-5, 1e-4):
        got = select(odds=(1,) * 10, p_min=0.1 * (1 + hair), dtype=torch.float32)
        assert got.counts_N.tolist() == ([10] if hair < 1e-5 else [0]), hair
        assert (got.ids_NS[:, 1:] >= 0).sum().item() == got.counts_N.item(), hair


def test_linear_form_is_the_rule_on_its_logits():
    hidden = torch.tensor([[1.0]], dtype=torch.float64)
    weight = torch.tensor([[math.log(x) - 1] for x in ODDS], dtype=torch.float64)
    got = select_candidates(hidden, weight, torch.tensor([0]), 0.25, bias_V=torch.ones(4, dtype=torch.float64))
    assert got.ids_NS[:, 1:].tolist() == [[2, 3, -1, -1]]


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    p_min=st.floats(0.02, 1.0),
    scale=st.floats(0.0, 8.0),
    vocabulary=st.integers(2, 40),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_set_is_bounded_and_is_the_set(seed, p_min, scale, vocabulary, dtype):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(6, vocabulary, generator=generator, dtype=dtype)
    got = select_candidates_from_logits(logits, torch.zeros(6, dtype=torch.int64), p_min)
    assert got.counts_N.max() <= math.floor(1 / p_min * (1 + 1e-12))
    mass = torch.where(got.ids_NS[:, 1:] >= 0, got.logprobs_NS[:, 1:].exp(), 0.0).sum(1)
    assert (mass <= 1 + 1e-5).all()
    probabilities = logits.softmax(-1)
    for row, ids, count in zip(probabilities, got.ids_NS[:, 1:], got.counts_N, strict=True):
        expected = [v for v, p in enumerate(row.tolist()) if p >= p_min]
        if all(abs(p / p_min - 1) > 1e-5 for p in row.tolist()):  # away from the threshold there is one right answer
            assert ids[ids >= 0].tolist() == expected
            assert count.item() == len(expected)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), shift=st.floats(-50.0, 50.0))
def test_a_constant_added_to_a_row_changes_nothing(seed, shift):
    logits = 3 * torch.randn(4, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sampled = torch.tensor([0, 3, 5, 11])
    plain = select_candidates_from_logits(logits, sampled, 0.05)
    moved = select_candidates_from_logits(logits + shift, sampled, 0.05)
    assert torch.equal(plain.ids_NS[:, 1:], moved.ids_NS[:, 1:])
    torch.testing.assert_close(plain.logprobs_NS[:, 1:], moved.logprobs_NS[:, 1:], rtol=0, atol=1e-12)


def test_p_min_one_leaves_only_the_sampled_branch():
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    got = select_candidates_from_logits(logits, torch.zeros(50, dtype=torch.int64), 1.0)
    assert got.ids_NS[:, 1:].tolist() == [[-1]] * 50
    assert got.counts_N.sum() == 0
    # a certain token is the one exception
    certain = torch.tensor([[0.0, -math.inf]])
    assert select_candidates_from_logits(certain, torch.tensor([0]), 1.0).ids_NS[:, 1:].tolist() == [[0]]
