"""Normalisers and the two aggregations, by hand."""

import math

import pytest
import torch

from ipvrm_core.sequences.aggregation import Normalizers, branch_weights, candidate_mass, normalizers

# sequences of 2, 3 and 1 tokens; one token of the second and all of the third are masked
CU = torch.tensor([0, 2, 5, 6])
MASK = torch.tensor([True, True, True, False, True, False])
MASS = torch.tensor([0.5, 0.25, 1.0, 7.0, 0.75, 9.0], dtype=torch.float64)


def close(got, *expected):
    torch.testing.assert_close(got, torch.tensor(expected, dtype=got.dtype), rtol=0, atol=1e-12)


def test_candidate_mass_skips_padding_and_the_sampled_token():
    ids = torch.tensor([[3, 3, 5, -1], [0, -1, -1, -1], [2, 0, 1, 2]])
    probabilities = torch.tensor([[0.5, 0.5, 0.25, 1], [1, 1, 1, 1], [0.1, 0.5, 0.3, 0.1]], dtype=torch.float64)
    logp = torch.where(ids >= 0, probabilities.log(), 1e9)  # garbage in the padding
    close(candidate_mass(ids, logp), 0.75, 0.0, 0.9)


def test_normalizers_count_what_is_unmasked():
    # sequences with an unmasked token 2; tokens 4; mass .5 + .25 + 1 + .75
    assert normalizers(CU, MASK, MASS) == Normalizers(2.0, 4.0, 2.5)


def test_sequence_mean_weights():
    # two sequences, of 2 and 2 unmasked tokens: 1 / (2 * 2)
    tokens, candidates = branch_weights(CU, MASK, Normalizers(2.0, 4.0, 2.5), "sequence_mean", dtype=torch.float64)
    close(tokens, 0.25, 0.25, 0.25, 0.0, 0.25, 0.0)
    assert torch.equal(tokens, candidates)
    # of three global sequences, with all of the second unmasked: 1 / (3 * 2) and 1 / (3 * 3)
    mask = torch.tensor([1, 1, 1, 1, 1, 0])
    tokens, candidates = branch_weights(CU, mask, Normalizers(3.0, 9.0, 2.5), "sequence_mean", dtype=torch.float64)
    close(tokens, 1 / 6, 1 / 6, 1 / 9, 1 / 9, 1 / 9, 0.0)
    assert torch.equal(tokens, candidates)


def test_token_mean_weights():
    # 1 / tokens, and 1 / sum of pi_old: the loss is then sum(pi_old * l) / sum(pi_old)
    tokens, candidates = branch_weights(CU, MASK, Normalizers(2.0, 4.0, 2.5), "token_mean", dtype=torch.float64)
    close(tokens, 0.25, 0.25, 0.25, 0.0, 0.25, 0.0)
    close(candidates, 0.4, 0.4, 0.4, 0.0, 0.4, 0.0)


def test_the_means_of_the_two_aggregations():
    # losses *, 3 | 5, *, 9 | *: sequence means 3 and 7, their mean 5; token mean (3 + 5 + 9) / 3
    loss = torch.tensor([1.0, 3.0, 5.0, 1e3, 9.0, 1e3], dtype=torch.float64)
    mask = torch.tensor([0, 1, 1, 0, 1, 0])
    totals = normalizers(CU, mask, MASS)
    for aggregation, expected in (("sequence_mean", 5.0), ("token_mean", 17 / 3)):
        close((branch_weights(CU, mask, totals, aggregation, dtype=torch.float64)[0] * loss).sum()[None], expected)
    # pi_old-weighted candidate mean: (.25 * 3 + 1 * 5 + .75 * 9) / (.25 + 1 + .75)
    weights = branch_weights(CU, mask, totals, "token_mean", dtype=torch.float64)[1]
    close((weights * MASS * loss).sum()[None], 12.5 / 2)


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_a_batch_with_nothing_in_it_has_finite_zero_weights(aggregation):
    mask = torch.zeros(6)
    totals = normalizers(CU, mask, torch.zeros(6))
    assert totals == Normalizers(0.0, 0.0, 0.0)
    for weights in branch_weights(CU, mask, totals, aggregation):
        assert weights.tolist() == [0.0] * 6
    # tokens but no candidates: nothing to divide by, and nothing to weigh
    totals = normalizers(CU, MASK, torch.zeros(6))
    weights = branch_weights(CU, MASK, totals, aggregation)[1]
    assert (weights * torch.zeros(6)).tolist() == [0.0] * 6


def test_a_constant_divides_the_sum():
    totals = normalizers(CU, MASK, MASS)
    for weights in branch_weights(CU, MASK, totals, "token_sum", constant=8.0, dtype=torch.float64):
        close(weights, 0.125, 0.125, 0.125, 0.0, 0.125, 0.0)


def test_a_mean_per_micro_batch_and_the_mean_over_ranks():
    """bnpo over two micro-batches: the mean of their means. Averaged gradients of 3 ranks: 3 times the weights."""
    totals, mask = normalizers(CU, MASK, MASS), MASK.bool()
    per_part = branch_weights(CU, MASK, totals, "token_mean", scale=1 / 2, dtype=torch.float64)[0]
    close(per_part[mask], *[1 / 2 / 4] * 4)
    globally = branch_weights(CU, MASK, totals + totals + totals, "token_mean", scale=3.0, dtype=torch.float64)[0]
    close(globally[mask], *[1 / 4] * 4)


def test_weights_sum_to_one():
    totals = normalizers(CU, MASK, MASS)
    for aggregation in ("sequence_mean", "token_mean"):
        tokens, candidates = branch_weights(CU, MASK, totals, aggregation, dtype=torch.float64)
        assert math.isclose(tokens.sum(), 1.0)
        if aggregation == "token_mean":
            assert math.isclose((candidates * MASS).sum(), 1.0)


def test_user_errors_name_what_was_wrong():
    with pytest.raises(ValueError, match="aggregation must be"):
        branch_weights(CU, MASK, Normalizers(1.0, 1.0, 1.0), "mean")
    for aggregation, constant in (("token_mean", 8.0), ("token_sum", None), ("token_sum", 0.0)):
        with pytest.raises(ValueError, match=f"constant must be > 0 for 'token_sum' and None else; got {constant}"):
            branch_weights(CU, MASK, Normalizers(1.0, 1.0, 1.0), aggregation, constant=constant)
    with pytest.raises(ValueError, match="cu_seqlens must"):
        normalizers(torch.tensor([0, 5]), MASK, MASS)
