"""Does sigma(vbar_t) say how often answers are right? Reliability bins and ECE at fixed places of the answers."""

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor

PLACES = (25, 50, 75, 100)  # percent of an answer's tokens, rounded up to whole ones
BINS = 10


def prefix_probabilities(score_N: Tensor, lengths: Sequence[int], beta: float, percent: int) -> Tensor:
    """sigma(vbar_t) with vbar_t = beta / t * sum_{u <= t} q_u, t = ceil(percent / 100 * T): [N] -> [B]."""
    places = [max(1, ceil(length * percent / 100)) for length in lengths]
    pieces = score_N.double().split(list(lengths))
    means = [piece[:t].mean() for piece, t in zip(pieces, places, strict=True)]
    return torch.sigmoid(beta * torch.stack(means))


def reliability(probabilities_B: Tensor, labels_B: Tensor, bins: int = BINS) -> list[dict]:
    """Bins of equal width over [0, 1], empty ones left out: {low, high, count, predicted, right}, the means in each."""
    probabilities_B, labels_B = probabilities_B.double(), labels_B.double()
    index_B = (probabilities_B * bins).long().clamp(0, bins - 1)
    found = []
    for index in range(bins):
        inside = index_B == index
        if inside.any():
            found.append(
                {
                    "low": index / bins,
                    "high": (index + 1) / bins,
                    "count": int(inside.sum()),
                    "predicted": probabilities_B[inside].mean().item(),
                    "right": labels_B[inside].mean().item(),
                }
            )
    return found


def expected_calibration_error(bins: Sequence[dict]) -> float:
    """sum_k n_k / n |share right_k - mean probability_k|."""
    total = sum(item["count"] for item in bins)
    return sum(item["count"] / total * abs(item["right"] - item["predicted"]) for item in bins)
