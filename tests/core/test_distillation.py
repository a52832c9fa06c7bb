"""What the candidate branch is to first order: a step of on-policy distillation towards the reward model.

docs/method.md derives it: at pi = pi_old, with C_t the whole vocabulary, the gradient of L_dist is beta / sigma_V times
that of KL(pi || pi_phi); cut to C_t there is a term of the mass pi(C_t), which the candidates' mean takes away.
"""

import pytest
import torch

from ipvrm_core import Method, PolicyBatch, PolicyLossConfig, distrl_advantages
from ipvrm_core.reference.candidates import select_candidates_from_logits
from ipvrm_core.reference.policy_loss import distrl_loss_from_logits

N, V, BETA = 4, 6, 2.0  # 1 / N, a weight in float32, is exact
CU = torch.tensor([0, N])
CONFIG = PolicyLossConfig(alpha=1.0)


def logits(seed: int) -> torch.Tensor:
    return torch.randn(N, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def candidate_gradient(policy_NV, reward_NV, p_min: float, method: Method) -> tuple[torch.Tensor, torch.Tensor]:
    """dL_dist / dz at pi = pi_old by the reference loss, and the members of C_t, both [N, V]."""
    z_NV = policy_NV.clone().requires_grad_()
    found = select_candidates_from_logits(policy_NV, torch.zeros(N, dtype=torch.int64), p_min)
    at = found.ids_NS.clamp(min=0)
    delta_NS = BETA * (reward_NV.log_softmax(-1).gather(1, at) - found.logprobs_NS)
    delta_NS = torch.where(found.ids_NS >= 0, delta_NS, 0.0)
    rest = torch.ones(1), CU, torch.zeros(1, dtype=torch.int64)
    advantages_NS = distrl_advantages(delta_NS, found.ids_NS, found.logprobs_NS, *rest, method, beta=BETA)
    advantages_NS[:, 0] = 0  # the candidates alone
    batch = PolicyBatch.of(found.ids_NS, found.logprobs_NS, advantages_NS, CU)
    distrl_loss_from_logits(z_NV, batch, CONFIG).loss.backward()
    member_NV = policy_NV.log_softmax(-1).exp() >= p_min
    return z_NV.grad, member_NV


def gradient_of(function, policy_NV) -> torch.Tensor:
    z_NV = policy_NV.clone().requires_grad_()
    function(z_NV.log_softmax(-1)).backward()
    return z_NV.grad


def kl(logp_NV, logq_NV, member_NV) -> torch.Tensor:
    """The mean over positions of sum_{v in C} pi log(pi / pi_phi)."""
    return torch.where(member_NV, logp_NV.exp() * (logp_NV - logq_NV), 0.0).sum(-1).mean()


SIGMA = {"sigma_min": 0.5, "sigma_max": 0.5}


def test_over_the_whole_vocabulary_it_is_the_gradient_of_the_divergence():
    policy, reward = logits(0), logits(1)
    got, member = candidate_gradient(policy, reward, 1e-6, Method(p_min=1e-6, **SIGMA))
    assert member.all()
    expected = BETA / 0.5 * gradient_of(lambda logp: kl(logp, reward.log_softmax(-1), member), policy)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_cut_to_the_candidates_it_also_moves_their_mass():
    """grad sum_C pi log(pi / pi_phi) - grad pi(C): 1 + log pi is the derivative of pi log pi, and the 1 stays."""
    policy, reward = 2 * logits(0), logits(1)
    got, member = candidate_gradient(policy, reward, 0.1, Method(**SIGMA))
    assert 0 < member.float().mean() < 1

    def cut(logp):
        return kl(logp, reward.log_softmax(-1), member) - torch.where(member, logp.exp(), 0.0).sum(-1).mean()

    torch.testing.assert_close(got, BETA / 0.5 * gradient_of(cut, policy), rtol=0, atol=1e-10)


def test_with_the_mean_as_baseline_the_mass_of_the_candidates_stays():
    """Then it is pi(C) times the divergence of the distributions given C; a position with one candidate is still."""
    policy, reward = 2 * logits(0), logits(1)
    got, member = candidate_gradient(policy, reward, 0.1, Method(candidate_baseline="mean", **SIGMA))
    mass = torch.where(member, policy.softmax(-1), 0.0).sum(-1)

    def within(logp):
        own, other = (x.masked_fill(~member, -1e4).log_softmax(-1) for x in (logp, reward))
        return (mass * torch.where(member, own.exp() * (own - other), 0.0).sum(-1)).mean()

    torch.testing.assert_close(got, BETA / 0.5 * gradient_of(within, policy), rtol=0, atol=1e-10)
    sums = torch.where(member, got, 0.0).sum(-1)
    torch.testing.assert_close(sums, torch.zeros(N, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (member.sum(-1) == 1).any()
    assert (got[member.sum(-1) == 1] == 0).all()


def test_the_fixed_point_is_the_reward_model_and_not_its_argmax():
    """Small steps on every position's logits end at pi_phi; there the gradient is 0."""
    policy, reward = logits(0), logits(1)
    method = Method(p_min=1e-6, **SIGMA)
    for _ in range(300):
        policy = policy - 4.0 * candidate_gradient(policy, reward, 1e-6, method)[0]
    torch.testing.assert_close(policy.softmax(-1), reward.softmax(-1), rtol=0, atol=1e-6)
    assert candidate_gradient(reward, reward, 1e-6, method)[0].abs().max() < 1e-12


def test_agreement_climbs_the_probability_of_choosing_the_same_token():
    """The gradient of -2 sum_v pi(v) pi_phi(v) over the whole vocabulary, as sum_v grad pi(v) = 0; it ends at the
    reward model's most likely token."""
    policy, reward = logits(0), 2 * logits(10)
    method = Method(p_min=1e-6, candidate_form="agreement")
    got, _ = candidate_gradient(policy, reward, 1e-6, method)

    def same(logp):
        return -2 * (logp.exp() * reward.softmax(-1)).sum(-1).mean()

    torch.testing.assert_close(got, gradient_of(same, policy), rtol=0, atol=1e-12)
    for _ in range(300):
        policy = policy - 20.0 * candidate_gradient(policy, reward, 1e-6, method)[0]
    assert torch.equal(policy.argmax(-1), reward.argmax(-1))
    assert policy.softmax(-1).amax(-1).min() > 0.99 > reward.softmax(-1).amax()


@pytest.mark.parametrize(("bounds", "shrinks"), [({}, False), (SIGMA, True)], ids=["sigma_V", "fixed"])
def test_dividing_by_the_spread_of_values_keeps_the_step_as_the_signal_goes(bounds, shrinks):
    """A policy a tenth as far from pi_phi has a tenth of the TD errors and of sigma_V: the same advantages, unless it
    is fixed. Whatever noise of the reward model does not shrink is then enlarged tenfold."""
    reward, direction = logits(1), logits(2)
    far, near = (
        candidate_gradient(reward + size * direction, reward, 1e-6, Method(p_min=1e-6, **bounds))[0].norm()
        for size in (1e-3, 1e-4)
    )
    assert near / far == pytest.approx(0.1 if shrinks else 1.0, rel=0.02)
