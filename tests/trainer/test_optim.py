"""The learning rate over steps, and clipping."""

import pytest
import torch

from ipvrm_core.trainer.config import Optim
from ipvrm_core.trainer.optim import apply_step, learning_rate, make_optimizer
from tests.trainer.tiny_steps import OPTIM


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.8535533905932737, 0.5, 0.14644660940672627]),
    ],
)
def test_learning_rate_by_hand(schedule, expected):
    optim = Optim(lr=1.0, warmup=2, schedule=schedule)
    assert [learning_rate(optim, step, 6) for step in range(1, 7)] == pytest.approx(expected)


def test_gradients_are_clipped_and_cleared(tiny_model):
    model = tiny_model()
    optimizer = make_optimizer(model, OPTIM)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    count = sum(parameter.numel() for parameter in model.parameters())
    norm = apply_step(optimizer, OPTIM, 1, 10)
    assert norm == pytest.approx(3 * count**0.5, rel=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-3)  # half way up the warm-up
    moment = next(iter(optimizer.state.values()))["exp_avg"].flatten()[0].item()
    assert moment == pytest.approx((1 - 0.9) * 1.0 / count**0.5, rel=1e-3)  # the clipped gradient
