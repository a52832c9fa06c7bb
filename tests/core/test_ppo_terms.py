"""l = -min(rho A, clip(rho) A), its dual clip and the k3 estimate: every sign and side of the clip."""

import math

import pytest
import torch

from ipvrm_core.reference.policy_loss import k3, ppo_terms


def close(got, expected, atol=1e-12):
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=got.dtype), rtol=0, atol=atol)


CASES = {
    # name: (rho, A, dual clip, loss, clipped, dl/dlog rho) with clip [1 - .2, 1 + .28] = [.8, 1.28]
    "good, inside": (1.1, 2.0, None, -2.2, False, -2.2),
    "good, above the old bound 1.2 and inside 1.28": (1.25, 2.0, None, -2.5, False, -2.5),
    "good, above: bounded at 1.28": (1.5, 2.0, None, -2.56, True, 0.0),
    "good, below: not bounded": (0.5, 2.0, None, -1.0, False, -1.0),
    "bad, inside": (0.9, -2.0, None, 1.8, False, 1.8),
    "bad, below: bounded at .8": (0.75, -2.0, None, 1.6, True, 0.0),
    "bad, above: not bounded": (1.5, -2.0, None, 3.0, False, 3.0),
    "bad, far above: not bounded": (5.0, -2.0, None, 10.0, False, 10.0),
    "bad, far above, dual: capped at 3 |A|": (5.0, -2.0, 3.0, 6.0, True, 0.0),
    "bad, above, dual: below the cap": (2.5, -2.0, 3.0, 5.0, False, 5.0),
    "bad, below, dual: still bounded at .8": (0.5, -2.0, 3.0, 1.6, True, 0.0),
    "good, far above, dual: no cap on good ones": (5.0, 2.0, 3.0, -2.56, True, 0.0),
    "good, below, dual: no cap on good ones": (0.1, 2.0, 3.0, -0.2, False, -0.2),
    "no advantage": (5.0, 0.0, 3.0, 0.0, False, 0.0),
    "same policy": (1.0, 3.0, 3.0, -3.0, False, -3.0),
}


@pytest.mark.parametrize("case", CASES)
def test_ppo_terms(case):
    rho, advantage, dual, loss, clipped, slope = CASES[case]
    log_ratio = torch.tensor([math.log(rho)], dtype=torch.float64, requires_grad=True)
    got, was_clipped = ppo_terms(log_ratio, torch.tensor([advantage], dtype=torch.float64), 0.2, 0.28, dual)
    close(got.detach(), [loss])
    assert was_clipped.tolist() == [clipped]
    (gradient,) = torch.autograd.grad(got.sum(), log_ratio)
    close(gradient, [slope])  # d rho / d log rho = rho


def test_ppo_terms_elementwise():
    rho = torch.tensor([[1.5, 0.5], [1.5, 0.5]], dtype=torch.float64)
    advantage = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    got, clipped = ppo_terms(rho.log(), advantage, 0.2, 0.28)
    close(got, [[-1.28, -0.5], [1.5, 0.8]])
    assert clipped.tolist() == [[True, False], [False, True]]


def test_k3():
    # x = ln 2: 2 - 1 - ln 2;  x = -ln 2: 1/2 - 1 + ln 2;  0 at 0
    x = torch.tensor([math.log(2), -math.log(2), 0.0], dtype=torch.float64)
    close(k3(x), [0.3068528194400547, 0.1931471805599453, 0.0])


def test_k3_is_unbiased_for_kl():
    # p = (.5, .25, .25), q = (.25, .25, .5): sum p k3(log q - log p) = sum p log(p / q) = .5 ln 2 - .25 ln 2
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    q = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)
    close((p * k3(q.log() - p.log())).sum(), 0.25 * math.log(2))
