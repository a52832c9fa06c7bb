"""The hand-written derivative of the clipped loss against autograd of the reference's loss."""

import pytest
import torch

from ipvrm_core.fused.policy_terms import clipped_surrogate
from ipvrm_core.reference.policy_loss import ppo_terms

LOW, HIGH = 0.2, 0.28


def bounds(dual_clip):
    return [torch.tensor(value, dtype=torch.float64) for value in (1 - LOW, 1 + HIGH, dual_clip or torch.inf)]


RATIOS = (0.05, 0.5, 0.79, 0.81, 1.0, 1.27, 1.29, 2.9, 3.1, 40.0)


@pytest.mark.parametrize("dual_clip", [None, 3.0, 1.1, float("inf")])
@pytest.mark.parametrize("advantage", [-2.0, -0.3, 0.0, 0.7, 5.0])
def test_against_autograd(advantage, dual_clip):
    log_ratio = torch.tensor(RATIOS, dtype=torch.float64).log().requires_grad_()
    advantages = torch.full_like(log_ratio, advantage).detach()
    want, want_clipped = ppo_terms(log_ratio, advantages, LOW, HIGH, dual_clip)
    (want_slope,) = torch.autograd.grad(want.sum(), log_ratio)
    got, slope, clipped = clipped_surrogate(log_ratio.detach(), advantages, *bounds(dual_clip))
    torch.testing.assert_close(got, want.detach(), rtol=1e-14, atol=0)
    torch.testing.assert_close(slope, want_slope, rtol=1e-14, atol=0)
    assert torch.equal(clipped, want_clipped)


def test_by_hand():
    """A > 0 is clipped above, A < 0 below; the dual clip cuts large ratios of A < 0."""
    ratio = torch.tensor([2.0, 0.5, 2.0, 0.5, 5.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    loss, slope, clipped = clipped_surrogate(ratio.log(), advantages, *bounds(3.0))
    torch.testing.assert_close(loss, torch.tensor([-1.28, -0.5, 2.0, 0.8, 3.0], dtype=torch.float64))
    torch.testing.assert_close(slope, torch.tensor([0.0, -0.5, 2.0, 0.0, 0.0], dtype=torch.float64))
    assert clipped.tolist() == [True, False, False, True, True]
