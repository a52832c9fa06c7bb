"""The whole policy loss on one row, worked out by hand, term by term and down to the gradient of the logits."""

import math
from dataclasses import replace

import pytest
import torch

from ipvrm_core.reference.policy_loss import distrl_loss, distrl_loss_from_logits
from ipvrm_core.types import METRICS, PolicyLossConfig
from tests.slots import change, from_branches

LN2 = math.log(2)


def f64(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def close(got, expected, atol=1e-12):
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=got.dtype), rtol=0, atol=atol)


# p = (1/2, 1/4, 1/4).  The sampled token is 0: pi_old .4, so rho = 1.25; A = 2.
# Candidates 0 and 1, one slot padded: pi_old (.4, .25), so rho = (1.25, 1); A_TD = (-1, 4).
LOGITS = f64([[2.0, 1.0, 1.0]]).log()
BATCH = from_branches(
    sampled_ids_N=torch.tensor([0]),
    old_logprobs_N=f64([0.4]).log(),
    advantages_N=f64([2.0]),
    token_weights_N=f64([1.0]),
    candidate_ids_NK=torch.tensor([[0, 1, -1]]),
    candidate_old_logprobs_NK=f64([[0.4, 0.25, 1.0]]).log(),
    candidate_advantages_NK=f64([[-1.0, 4.0, 50.0]]),
    candidate_weights_N=f64([1.0]),
    ref_logprobs_N=f64([0.25]).log(),
)


def run(config=None, **fields):
    logits = LOGITS.clone().requires_grad_()
    out = distrl_loss_from_logits(logits, change(BATCH, **fields), config)
    out.loss.backward()
    return out, logits.grad


def test_loss_of_both_branches():
    # sampled: -1.25 * 2 = -2.5 (inside 1.28).  candidates: .4 * (1.25 * 1) + .25 * (-1 * 4) = .5 - 1 = -.5
    out, _ = run()
    close(out.loss.detach(), -2.55)  # -2.5 + .1 * (-.5)
    close(out.metrics["loss_sampled"], -2.5)
    close(out.metrics["loss_candidates"], -0.5)


def test_gradient_of_the_row_adds_the_coefficients_of_equal_ids():
    # c = dL/dlog p: sampled id 0: -2.5; candidate id 0: .1 * .4 * 1.25 = .05; candidate id 1: .1 * .25 * (-4) = -.1
    # c_0 = -2.45, c_1 = -.1, S = -2.55;  dL/dz_v = c_v - S p_v
    _, gradient = run()
    close(gradient, [[-2.45 + 2.55 * 0.5, -0.1 + 2.55 * 0.25, 2.55 * 0.25]])


def test_the_same_candidate_twice_counts_twice():
    # .4 * 1.25 + .4 * 1.25 - 1 = 0;  c_0 = -2.5 + .05 + .05, c_1 = -.1, S = -2.5
    out, gradient = run(
        candidate_ids_NK=torch.tensor([[0, 1, 0]]),
        candidate_old_logprobs_NK=f64([[0.4, 0.25, 0.4]]).log(),
        candidate_advantages_NK=f64([[-1.0, 4.0, -1.0]]),
    )
    close(out.loss.detach(), -2.5)
    close(gradient, [[-2.4 + 1.25, -0.1 + 0.625, 0.625]])


def test_weights_scale_the_branches_separately():
    out, _ = run(token_weights_N=f64([0.5]), candidate_weights_N=f64([3.0]))
    close(out.loss.detach(), -2.5 * 0.5 + 0.1 * (-0.5 * 3))


def test_clipped_branches():
    # sampled pi_old .25: rho = 2, bounded at 1.28: -2.56.  candidates pi_old (.4, .125): rho = (1.25, 2):
    # .4 * 1.25 + .125 * (-1.28 * 4) = .5 - .64 = -.14
    old = f64([[0.4, 0.125, 1.0]]).log()
    out, gradient = run(old_logprobs_N=f64([0.25]).log(), candidate_old_logprobs_NK=old)
    close(out.loss.detach(), -2.56 + 0.1 * -0.14)
    close(out.metrics["clip_fraction"], 1.0)
    close(out.metrics["candidate_clip_fraction"], 0.125)  # weighted by pi_old
    # only candidate 0 still pulls: c_0 = S = .05
    close(gradient, [[0.05 - 0.05 * 0.5, -0.05 * 0.25, -0.05 * 0.25]])


def test_the_two_branches_have_their_own_clips():
    fields = {"old_logprobs_N": f64([0.25]).log(), "candidate_old_logprobs_NK": f64([[0.4, 0.125, 1.0]]).log()}
    # sampled rho 2 bounded at 1.5: -3.  candidate rho 2 bounded at 1.1, rho 1.25 with A = -1 is not bounded:
    # .5 - .125 * 1.1 * 4 = -.05
    out, _ = run(PolicyLossConfig(clip_high=0.5, candidate_clip_high=0.1), **fields)
    close(out.metrics["loss_sampled"], -3.0)
    close(out.metrics["loss_candidates"], -0.05)
    # the dual clips: A = -2 at rho 2, capped at 1.5 * 2 = 3; candidate 0 at rho 1.25, capped at 1.2 * 1: .48
    fields["advantages_N"] = f64([-2.0])
    out, _ = run(PolicyLossConfig(dual_clip=1.5), **fields)
    close(out.metrics["loss_sampled"], 3.0)
    close(out.metrics["loss_candidates"], 0.4 * 1.25 - 0.125 * 1.28 * 4)
    out, _ = run(PolicyLossConfig(candidate_dual_clip=1.2), **fields)
    close(out.metrics["loss_sampled"], 4.0)
    close(out.metrics["loss_candidates"], 0.4 * 1.2 - 0.125 * 1.28 * 4)
    # and the lower bounds: pi_old (1, .5), rho 1/2 with A = -2 bounded at .6; candidate id 1 rho .5, A = -1, at .9
    out, _ = run(
        PolicyLossConfig(clip_low=0.4, candidate_clip_low=0.1),
        old_logprobs_N=f64([0.0]),
        advantages_N=f64([-2.0]),
        candidate_ids_NK=torch.tensor([[-1, 1, -1]]),
        candidate_old_logprobs_NK=f64([[1.0, 0.5, 1.0]]).log(),
        candidate_advantages_NK=f64([[1.0, -1.0, 1.0]]),
    )
    close(out.metrics["loss_sampled"], 1.2)
    close(out.metrics["loss_candidates"], 0.45)


def test_kl_and_entropy_terms():
    # k3 with log ref - log p = ln(.25 / .5) = -ln 2: .5 - 1 + ln 2 = .1931;  H = .5 ln 2 + .5 ln 4 = 1.5 ln 2
    out, _ = run(PolicyLossConfig(kl_coef=0.5, entropy_coef=0.2))
    close(out.loss.detach(), -2.55 + 0.5 * (LN2 - 0.5) - 0.2 * 1.5 * LN2)
    close(out.metrics["kl_ref"], LN2 - 0.5)
    close(out.metrics["entropy"], 1.5 * LN2)


def test_metrics():
    out, _ = run()
    assert tuple(out.metrics) == METRICS
    assert all(value.shape == () and not value.requires_grad for value in out.metrics.values())
    close(out.metrics["ratio"], 1.25)
    close(out.metrics["kl_old"], 1.25 - 1 - math.log(1.25))
    close(out.metrics["kl_ref"], LN2 - 0.5)
    close(out.metrics["clip_fraction"], 0.0)
    close(out.metrics["candidate_clip_fraction"], 0.0)
    out, _ = run(token_weights_N=f64([0.25]), ref_logprobs_N=None)
    close(out.metrics["ratio"], 1.25 / 4)  # weighted, so that micro-batches add up
    close(out.metrics["entropy"], 1.5 * LN2 / 4)
    close(out.metrics["kl_ref"], 0.0)


def test_alpha():
    close(run(PolicyLossConfig(alpha=0.0))[0].loss.detach(), -2.5)
    close(run(PolicyLossConfig(alpha=2.0))[0].loss.detach(), -3.5)


def test_no_candidate_slots_at_all():
    none = f64([[]])
    out, gradient = run(
        candidate_ids_NK=torch.zeros(1, 0, dtype=torch.int64),
        candidate_old_logprobs_NK=none,
        candidate_advantages_NK=none,
    )
    close(out.loss.detach(), -2.5)
    close(gradient, [[-2.5 + 1.25, 0.625, 0.625]])


def test_temperature_divides_the_logits():
    logits = (2 * LOGITS).requires_grad_()
    out = distrl_loss_from_logits(logits, BATCH, PolicyLossConfig(temperature=2.0))
    close(out.loss.detach(), -2.55)
    (gradient,) = torch.autograd.grad(out.loss, logits)
    close(gradient, [[-1.175 / 2, 0.5375 / 2, 0.6375 / 2]])  # that of T = 1, halved


def test_linear_head_with_bias():
    # z = h W^T + b = (ln 2, 0, 0), the same row up to a constant
    hidden, bias = f64([[2.0]]), f64([-1.0, -2.0, -4.0])
    weight = f64([[(LN2 + 1) / 2], [1.0], [2.0]])
    out = distrl_loss(hidden, weight, BATCH, bias_V=bias)
    close(out.loss, -2.55)


def test_kl_needs_a_reference():
    with pytest.raises(ValueError, match=r"needs batch\.ref_logprobs_N"):
        run(PolicyLossConfig(kl_coef=0.1), ref_logprobs_N=None)


def test_user_errors_name_what_was_wrong():
    with pytest.raises(ValueError, match=r"token_weights_N must be \[N\] = \(1,\); got shape \(2,\)"):
        replace(BATCH, token_weights_N=f64([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"old_logprobs_NS must be \[N, S\] = \(1, 4\)"):
        replace(BATCH, old_logprobs_NS=f64([[1.0, 2.0]]))
    with pytest.raises(ValueError, match="ids_NS must be int64"):
        replace(BATCH, ids_NS=BATCH.ids_NS.int())
    with pytest.raises(ValueError, match=r"ids_NS must be \[N, 1 \+ K\], the sampled id first; got shape \(1,\)"):
        replace(BATCH, ids_NS=torch.tensor([0]))
    for bad in (
        {"clip_low": 1.5},
        {"candidate_clip_low": -0.1},
        {"clip_high": -0.1},
        {"alpha": -1.0},
        {"dual_clip": 1.0},
        {"candidate_dual_clip": 0.5},
        {"temperature": 0.0},
        {"kl_coef": -0.1},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
            PolicyLossConfig(**bad)
