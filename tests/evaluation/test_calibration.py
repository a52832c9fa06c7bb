"""Reliability of sigma(vbar_t), by hand."""

import math

import pytest
import torch

from ipvrm_core.trainer.evaluation.reward_model.calibration import (
    expected_calibration_error,
    prefix_probabilities,
    reliability,
)


def test_probabilities_at_places_of_an_answer():
    """q = 1, 3, -1, 5 | 2: vbar at 25% is q_1, at 50% the mean of two, at 75% of three, at 100% of all."""
    q = torch.tensor([1.0, 3.0, -1.0, 5.0, 2.0])

    def sigma(x):
        return 1 / (1 + math.exp(-0.5 * x))

    for percent, means in {25: (1, 2), 50: (2, 2), 75: (1, 2), 100: (2, 2), 30: (2, 2), 1: (1, 2)}.items():
        found = prefix_probabilities(q, [4, 1], 0.5, percent).tolist()
        assert found == pytest.approx([sigma(mean) for mean in means])


def test_bins_and_ece():
    """Two answers at 0.92 and 0.94, one right; one at 1.0, right; one at 0.12, wrong.

    Bin [0.9, 1.0]: 3 answers, mean 2.86 / 3 = 0.95333, right 2/3. Bin [0.1, 0.2): 1 answer, 0.12, right 0.
    ECE = 3/4 * 0.28667 + 1/4 * 0.12 = 0.245.
    """
    bins = reliability(torch.tensor([0.92, 0.94, 1.0, 0.12]), torch.tensor([True, False, True, False]))
    assert [(item["low"], item["high"], item["count"]) for item in bins] == [(0.1, 0.2, 1), (0.9, 1.0, 3)]
    assert [item["predicted"] for item in bins] == pytest.approx([0.12, 2.86 / 3])
    assert [item["right"] for item in bins] == pytest.approx([0, 2 / 3])
    assert expected_calibration_error(bins) == pytest.approx(0.245)


def test_a_calibrated_predictor_has_no_error():
    probabilities = torch.tensor([0.25] * 4 + [0.75] * 4)
    labels = torch.tensor([1, 0, 0, 0, 1, 1, 1, 0])
    assert expected_calibration_error(reliability(probabilities, labels)) == 0
