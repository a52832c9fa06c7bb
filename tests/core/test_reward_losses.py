"""Reward-model losses by hand. Boundaries are logits of 3/4 and 1/4, so that they multiply an odds by 3 or 1/3:
softplus(x + ln 3) = ln(1 + 3 e^x). A wrong sign anywhere shows as the other odds."""

import math

import pytest
import torch

from ipvrm_core.sequences.reward_losses import (
    difficulty_boundary,
    dpo_reward_loss,
    dynamic_loss_weights,
    implicit_prm_loss,
    ipvrm_loss,
    qrm_loss,
    repirl_loss,
    repirl_weights,
)

LN3 = math.log(3)


def f64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def close(got, *expected, atol=1e-12):
    torch.testing.assert_close(got, torch.tensor(expected, dtype=got.dtype), rtol=0, atol=atol)


def ln1p_exp(x, odds=1.0):
    """ln(1 + odds e^x), written without the library's softplus."""
    return math.log(1 + odds * math.exp(x))


# beta 10, q = (.1, .3, -.1): V = (1, 4, 3), vbar = (1, 2, 1)
Q, CU = f64(0.1, 0.3, -0.1), torch.tensor([0, 3])
RIGHT, WRONG = f64(1), f64(0)


def test_ipvrm_right_answers_are_pushed_above_the_margin():
    # softplus(-(vbar - 5)) = softplus(4), softplus(3), softplus(4) = 4.018149928, 3.048587352, 4.018149928
    got = ipvrm_loss(Q, CU, RIGHT, beta=10.0, margin=5.0)
    close(got, (4.0181499279178094 + 3.0485873515737420 + 4.0181499279178094) / 3)


def test_ipvrm_wrong_answers_are_pushed_below_minus_the_margin():
    # softplus(vbar + 5) = softplus(6), softplus(7), softplus(6) = 6.002475685, 7.000911466, 6.002475685
    got = ipvrm_loss(Q, CU, WRONG, beta=10.0, margin=5.0)
    close(got, (6.0024756851377301 + 7.0009114664537740 + 6.0024756851377301) / 3)


def test_ipvrm_margin_zero_and_defaults():
    close(ipvrm_loss(Q, CU, RIGHT, margin=0.0), (2 * ln1p_exp(-1) + ln1p_exp(-2)) / 3)
    close(ipvrm_loss(Q, CU, WRONG, margin=0.0), (2 * ln1p_exp(1) + ln1p_exp(2)) / 3)
    assert ipvrm_loss(Q, CU, RIGHT).item() == ipvrm_loss(Q, CU, RIGHT, beta=10.0, margin=5.0).item()


def test_ipvrm_boundary_is_added_inside_both_softplus():
    easy, hard = f64(LN3), f64(-LN3)  # V(x) = logit(3/4), logit(1/4)
    # r = 1: softplus(-(vbar - m + V)) = softplus(m - vbar - V): an easy prompt makes a right answer cheap
    close(ipvrm_loss(Q, CU, RIGHT, boundary_B=easy), (2 * ln1p_exp(4, 1 / 3) + ln1p_exp(3, 1 / 3)) / 3)
    close(ipvrm_loss(Q, CU, RIGHT, boundary_B=hard), (2 * ln1p_exp(4, 3) + ln1p_exp(3, 3)) / 3)
    # r = 0: softplus(vbar + m + V): an easy prompt makes a wrong answer dear
    close(ipvrm_loss(Q, CU, WRONG, boundary_B=easy), (2 * ln1p_exp(6, 3) + ln1p_exp(7, 3)) / 3)
    close(ipvrm_loss(Q, CU, WRONG, boundary_B=hard), (2 * ln1p_exp(6, 1 / 3) + ln1p_exp(7, 1 / 3)) / 3)


def test_ipvrm_weightings():
    # late (1, 2, 3) / 6, early (2, 1, 0) / 3 over softplus(4), softplus(3), softplus(4)
    a, b = 4.0181499279178094, 3.0485873515737420
    close(ipvrm_loss(Q, CU, RIGHT, weighting="late"), (a + 2 * b + 3 * a) / 6)
    close(ipvrm_loss(Q, CU, RIGHT, weighting="early"), (2 * a + b) / 3)


def test_ipvrm_is_one_value_a_sequence_and_an_empty_one_is_zero():
    q, cu = f64(0.1, 0.3, -0.1, 0.2), torch.tensor([0, 3, 3, 4])
    got = ipvrm_loss(q, cu, f64(0, 1, 1), boundary_B=f64(LN3, LN3, -LN3))
    # the last: vbar = 10 * .2 / 1 = 2, softplus(5 - 2 + ln 3)
    close(got, (2 * ln1p_exp(6, 3) + ln1p_exp(7, 3)) / 3, 0.0, ln1p_exp(3, 3))


@pytest.mark.parametrize("label", [0.0, 1.0])
@pytest.mark.parametrize("weighting", ["uniform", "late", "early"])
def test_ipvrm_gradient_is_a_reverse_cumulative_sum(label, weighting):
    # dL/dlog pi_phi(y_u) = beta * sum_{t >= u} (dL/dvbar_t) / t, with dL/dvbar_t = -s w_t sigmoid(m - s (vbar_t + V))
    w = {"uniform": (1 / 3, 1 / 3, 1 / 3), "late": (1 / 6, 2 / 6, 3 / 6), "early": (2 / 3, 1 / 3, 0.0)}[weighting]
    sign, V, vbar = 2 * label - 1, 0.5, (1.0, 2.0, 1.0)
    dvbar = [-sign * w[t] / (1 + math.exp(-(5 - sign * (vbar[t] + V)))) for t in range(3)]
    third = 10 * dvbar[2] / 3
    second = third + 10 * dvbar[1] / 2
    first = second + 10 * dvbar[0] / 1
    q = Q.clone().requires_grad_()
    ipvrm_loss(q, CU, f64(label), weighting=weighting, boundary_B=f64(V)).sum().backward()
    close(q.grad, first, second, third)


def test_ipvrm_stays_finite_far_from_the_margin():
    q = f64(1e6, -1e6).requires_grad_()
    loss = ipvrm_loss(q, torch.tensor([0, 1, 2]), f64(0, 1))
    close(loss, 1e7 + 5, 1e7 + 5)  # softplus(x) = x there
    loss.sum().backward()
    close(q.grad, 10.0, -10.0)


def test_difficulty_boundary_is_the_logit():
    close(difficulty_boundary(f64(0.75, 0.25, 0.5, 0.9)), LN3, -LN3, 0.0, math.log(9))
    # infinite at the ends; such groups have no loss, and nothing infinite may come near it
    close(difficulty_boundary(f64(0, 1)), 0.0, 0.0)


def test_dynamic_loss_weights_raw():
    # mu = 3/4: right 1 - mu = .25, wrong mu = .75;  mu = 1/4 the other way round
    got = dynamic_loss_weights(f64(1, 0, 1, 0), f64(0.75, 0.75, 0.25, 0.25))
    close(got, 0.25, 0.75, 0.75, 0.25)


def test_dynamic_loss_weights_group():
    # mu = 3/4, n = 4: right 1 / (2 * .75) = 2/3 three times, wrong 1 / (2 * .25) = 2: together n = 4
    got = dynamic_loss_weights(f64(1, 1, 0, 1), f64(0.75, 0.75, 0.75, 0.75), scale="group")
    close(got, 2 / 3, 2 / 3, 2.0, 2 / 3)
    assert math.isclose(got.sum(), 4.0)


@pytest.mark.parametrize("scale", ["raw", "group"])
def test_unmixed_groups_have_no_loss_and_a_zero_gradient(scale):
    mu, labels = f64(0, 1), f64(0, 1)
    weights = dynamic_loss_weights(labels, mu, scale=scale)
    assert weights.tolist() == [0.0, 0.0]
    q = f64(0.5, -0.5).requires_grad_()
    loss = weights * ipvrm_loss(q, torch.tensor([0, 1, 2]), labels, boundary_B=difficulty_boundary(mu))
    assert loss.tolist() == [0.0, 0.0]
    loss.sum().backward()
    assert q.grad.tolist() == [0.0, 0.0]


def test_implicit_prm():
    # beta .05, sum q = 20 ln 3: logit ln 3, probability 3/4.  BCE: r = 1 -> ln(4/3), r = 0 -> ln 4
    q, cu = f64(15 * LN3, 5 * LN3, 20 * LN3), torch.tensor([0, 2, 3])
    close(implicit_prm_loss(q, cu, f64(1, 0)), math.log(4 / 3), math.log(4))
    close(implicit_prm_loss(q / 2, cu, f64(1, 0), beta=0.1), math.log(4 / 3), math.log(4))


def test_dpo_reward():
    # Q = (30 ln 3, 10 ln 3): beta (Q_0 - Q_1) = .05 * 20 ln 3 = ln 3.  Winner 0: ln(4/3); winner 1: ln 4; itself: ln 2
    q, cu = f64(15 * LN3, 15 * LN3, 10 * LN3), torch.tensor([0, 2, 3])
    pairs = torch.tensor([[0, 1], [1, 0], [1, 1]])
    close(dpo_reward_loss(q, cu, pairs), math.log(4 / 3), math.log(4), math.log(2))
    close(dpo_reward_loss(q / 2, cu, pairs[:1], beta=0.1), math.log(4 / 3))


def test_qrm_compares_mean_scores_with_a_margin():
    # Zbar = (15, 5): beta (Zbar_0 - Zbar_1) = .2 * 10 = 2, minus the margin 2: ln 2.  Winner 1: softplus(4)
    z, cu = f64(10, 20, 5), torch.tensor([0, 2, 3])
    pairs = torch.tensor([[0, 1], [1, 0], [1, 1]])
    close(qrm_loss(z, cu, pairs), math.log(2), ln1p_exp(4), ln1p_exp(2))
    close(qrm_loss(z, cu, pairs[:1], margin=0.0), ln1p_exp(-2))
    close(qrm_loss(z, cu, pairs[:1], beta=0.1, margin=0.0), ln1p_exp(-1))


# answers: failed (2 tokens), right (1), failed (1).  r - log pi = (ln 3, ln 3), ., 0: means ln 3, 0, sums 2 ln 3, 0
R, LOGP = f64(0.5, 1.5, 7, -1), f64(0.5 - LN3, 1.5 - LN3, -2, -1)
CU3, FAILED, THIRD = torch.tensor([0, 2, 3, 4]), f64(0, 1, 0), f64(1 / 3, 1 / 3, 1 / 3)


def test_repirl_lifts_experts_and_lowers_failed_rollouts_by_the_mean_reward():
    close(repirl_loss(R, CU3, FAILED), 1.0, -7.0, -1.0)
    close(repirl_loss(R, torch.tensor([0, 2, 2, 4]), f64(1, 0, 0)), -1.0, 0.0, 3.0)  # an empty answer in the middle


def test_repirl_weights():
    # per token: 3 : 1; as written, with sums: 9 : 1. The expert keeps 1/3, or has all of the experts' share
    close(repirl_weights(R, LOGP, CU3, FAILED, THIRD), 3 / 4, 1 / 3, 1 / 4)
    close(repirl_weights(R, LOGP, CU3, FAILED, THIRD, length="sum"), 9 / 10, 1 / 3, 1 / 10)
    close(repirl_weights(R, LOGP, CU3, FAILED, THIRD, expert_share="experts"), 3 / 4, 1.0, 1 / 4)
    assert not repirl_weights(R.clone().requires_grad_(), LOGP, CU3, FAILED, THIRD).requires_grad


def test_repirl_weights_stay_finite():
    # log-weights 2000 and 1000 ln 2 below it: exp of either overflows
    log = f64(2000, 0, 2000 - math.log(2))
    close(repirl_weights(log, 0 * log, torch.tensor([0, 1, 2, 3]), f64(0, 1, 0), THIRD), 2 / 3, 1 / 3, 1 / 3)


def test_repirl_without_failures_or_without_experts():
    all_right, all_wrong = f64(1, 1, 1), f64(0, 0, 0)
    close(repirl_weights(R, LOGP, CU3, all_right, THIRD), 1 / 3, 1 / 3, 1 / 3)  # no policy term
    got = repirl_weights(R, LOGP, CU3, all_wrong, THIRD, expert_share="experts")
    assert math.isclose(got.sum(), 1.0)  # no expert term
    # log-weights ln 3, 9, 0
    close(got, *(w / (3 + math.exp(9) + 1) for w in (3, math.exp(9), 1)))


def test_repirl_gradient_is_that_of_the_log_partition_function():
    """With length = "mean" and no experts: d/dr log sum_i exp(rbar_i) / pi_i, what maximum-entropy inverse RL takes."""
    wrong = f64(0, 0, 0)
    reward = R.clone().requires_grad_()
    weights = repirl_weights(reward, LOGP, CU3, wrong, THIRD)
    (ours,) = torch.autograd.grad((weights * repirl_loss(reward, CU3, wrong)).sum(), reward)
    means = torch.stack([reward[:2].mean(), reward[2], reward[3]])
    constants = torch.stack([LOGP[:2].mean(), LOGP[2], LOGP[3]])
    (truth,) = torch.autograd.grad((means - constants).logsumexp(0), reward)
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-12)


def test_errors_of_qrm_and_repirl():
    with pytest.raises(ValueError, match=r"pairs must be \[P, 2\]"):
        qrm_loss(Q, CU, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="labels must be 0 or 1"):
        repirl_loss(R, CU3, f64(0, 0.5, 1))
    with pytest.raises(ValueError, match=r"labels must be \[B\]"):
        repirl_weights(R, LOGP, CU3, f64(0, 1), THIRD)
    with pytest.raises(ValueError, match=r"policy_logprobs must be \[N\] = \(4,\)"):
        repirl_weights(R, LOGP[:3], CU3, FAILED, THIRD)
    with pytest.raises(ValueError, match="length must be 'mean' or 'sum'; got 'max'"):
        repirl_weights(R, LOGP, CU3, FAILED, THIRD, length="max")
    with pytest.raises(ValueError, match="expert_share must be 'batch' or 'experts'; got 'all'"):
        repirl_weights(R, LOGP, CU3, FAILED, THIRD, expert_share="all")


def test_user_errors_name_what_was_wrong():
    with pytest.raises(ValueError, match=r"labels must be \[B\]"):
        ipvrm_loss(Q, CU, f64(1, 0))
    with pytest.raises(ValueError, match="labels must be 0 or 1"):
        ipvrm_loss(Q, CU, f64(-1))
    with pytest.raises(ValueError, match="labels must be 0 or 1"):
        implicit_prm_loss(Q, CU, f64(0.5))
    with pytest.raises(ValueError, match=r"pairs must be \[P, 2\]"):
        dpo_reward_loss(Q, CU, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="scale must be"):
        dynamic_loss_weights(RIGHT, f64(0.5), scale="mean")
    with pytest.raises(ValueError, match="cu_seqlens must"):
        ipvrm_loss(Q, torch.tensor([0, 2]), RIGHT)
