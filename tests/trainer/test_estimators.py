"""Outcomes and estimators: the advantage of the sampled token by loops over the answers."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from ipvrm_core import METHODS
from ipvrm_core.objectives.endorm import Endorm
from ipvrm_core.objectives.ipvrm import Ipvrm
from ipvrm_core.objectives.prime import Prime
from ipvrm_core.objectives.qrm import Qrm
from ipvrm_core.sequences.advantages import (
    masked_step_advantages,
    outcome_advantages,
    prime_advantages,
    rloo_advantages,
)
from ipvrm_core.sequences.segments import expand
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.reward import scores
from ipvrm_core.trainer.rl.collect import Collected
from ipvrm_core.trainer.rl.credit import BatchCredit, assign
from ipvrm_core.trainer.rl.old_policy import old_policy
from ipvrm_core.trainer.rl.policy_update import make_policy_batch
from tests.batches import CU, LENGTHS, two_prompts, with_value_head

PAPER = METHODS["paper"]


@pytest.fixture
def batch() -> Collected:
    return two_prompts()


@pytest.fixture
def assigned(tiny_model, batch):
    """assigned(objective, **settings) -> (BatchCredit, delta of the sampled tokens by hand), reward model number 2."""
    model, reward_model = LanguageModel(tiny_model(1, 12.0)), LanguageModel(with_value_head(tiny_model(2, 12.0)))

    def run(objective=None, ref_N=None, **settings):
        method = replace(PAPER, **settings)
        old = old_policy(model, method, batch.answers)
        made = assign(method, batch, old, reward_model if objective else None, objective, ref_N)
        if objective is None:
            return made, old.logprobs_N
        return made, objective.beta * scores(reward_model, objective, batch.answers, old.logprobs_N)

    return run


def sampled(made: BatchCredit) -> torch.Tensor:
    """A_t of the sampled tokens: [N]."""
    return made.credit.credit_NS[:, 0]


def test_outcomes(assigned, batch):
    advantages = {name: sampled(assigned(outcome=name)[0]) for name in ("grpo", "rloo", "reinforce")}
    total = sum(LENGTHS)
    for name, expected_B in (
        ("grpo", outcome_advantages(batch.rewards_B, batch.groups_B)),
        ("rloo", torch.tensor([1.0, -0.5, -0.5, 0.5, 0.5, -1.0])),
        ("reinforce", batch.rewards_B),
    ):
        assert torch.equal(advantages[name], expand(expected_B, CU, total))


@pytest.mark.parametrize("normalize", ["group", "batch"])
@pytest.mark.parametrize("estimator", ["td", "mc", "gae", "none"])
def test_td_mc_and_gae_by_loops(assigned, batch, estimator, normalize):
    """delta normalised over the prompt's tokens (or the batch, by sigma_V); then its sum from t on, discounted."""
    discount = {"mc": {"gamma": 0.9}, "gae": {"gamma": 0.9, "lam": 0.5}}.get(estimator, {})
    settings = {"estimator": estimator, "process_normalize": normalize, **discount}
    made, delta = assigned(Ipvrm(beta=3.0), process_coef=0.7, outcome="rloo", **settings)
    x = delta.double().clone()
    if normalize == "group":
        for rows in (slice(0, CU[3]), slice(CU[3], CU[6])):
            x[rows] = (x[rows] - x[rows].mean()) / (x[rows].std(unbiased=False) + 1e-6)
    else:
        x = (x - x.mean()) / (made.credit.values_N.double().std(unbiased=False) + 1e-6)
    decay = {"td": 0.0, "mc": 0.9, "gae": 0.45, "none": 0.0}[estimator]
    process = torch.zeros_like(x)
    for a, b in pairwise(CU.tolist()):
        for t in range(a, b):
            process[t] = sum(decay ** (i - t) * x[i] for i in range(t, b))
    if normalize == "batch":
        process = (process - process.mean()) / (process.var() + 1e-8).sqrt()
    outcome = expand(rloo_advantages(batch.rewards_B, batch.groups_B), CU, len(x)).double()
    expected = outcome + (0.0 if estimator == "none" else 0.7 * process)
    torch.testing.assert_close(sampled(made).double(), expected, rtol=1e-3, atol=1e-3)


def test_gae_with_its_defaults_is_mc_to_the_bit(assigned):
    gae, mc = (assigned(Ipvrm(), estimator=name)[0] for name in ("gae", "mc"))
    assert torch.equal(gae.credit.credit_NS, mc.credit.credit_NS)


@pytest.mark.parametrize("skip", [False, True])
def test_prime(assigned, batch, skip):
    """The whole advantage, whitened. PRIME's code leaves out the last token's reward: method.skip_last_token."""
    made, delta = assigned(Prime(), estimator="prime", outcome="rloo", process_coef=0.4, skip_last_token=skip)
    if skip:
        delta = delta.clone()
        delta[CU[1:] - 1] = 0.0
    expected = prime_advantages(delta, batch.rewards_B, CU, batch.groups_B, coef=0.4)
    torch.testing.assert_close(sampled(made), expected, rtol=1e-4, atol=1e-4)
    assert sampled(made).mean().abs() < 1e-5
    assert sampled(made).std() == pytest.approx(1.0, abs=1e-4)


def test_masked_step_advantages_of_a_reward_model(assigned, batch):
    made, delta = assigned(Ipvrm(), estimator="msa", process_coef=0.3)
    outcome = expand(outcome_advantages(batch.rewards_B, batch.groups_B), CU, len(delta))
    expected = outcome + 0.3 * masked_step_advantages(delta, CU, batch.groups_B)
    torch.testing.assert_close(sampled(made), expected, rtol=1e-4, atol=1e-4)


def test_spro_takes_the_policy_against_the_start(assigned, batch):
    ref_N = -torch.rand(sum(LENGTHS))
    made, own = assigned(None, ref_N, estimator="msa", process_coef=0.3)
    outcome = expand(outcome_advantages(batch.rewards_B, batch.groups_B), CU, len(own))
    expected = outcome + 0.3 * masked_step_advantages(own - ref_N, CU, batch.groups_B)
    torch.testing.assert_close(sampled(made), expected, rtol=1e-5, atol=1e-5)
    assert made.ids_NS.shape == made.credit.credit_NS.shape == (len(own), 1)


def test_credit_of_a_value_head(assigned, batch):
    """beta Z of the sampled tokens; nothing for the candidates, and a policy batch without them."""
    made, delta = assigned(Qrm(beta=0.5), estimator="td", alpha=0.0, process_coef=2.0)
    x = delta.double().clone()
    for rows in (slice(0, CU[3]), slice(CU[3], CU[6])):
        x[rows] = (x[rows] - x[rows].mean()) / (x[rows].std(unbiased=False) + 1e-6)
    outcome = expand(outcome_advantages(batch.rewards_B, batch.groups_B), CU, len(x)).double()
    torch.testing.assert_close(sampled(made).double(), outcome + 2 * x, rtol=1e-3, atol=1e-3)
    values = torch.cat([piece.cumsum(0) for piece in delta.split(LENGTHS)])
    torch.testing.assert_close(made.credit.values_N, values, rtol=1e-4, atol=1e-4)
    assert make_policy_batch(replace(PAPER, alpha=0.0), made, range(6), None).ids_NS.shape == (sum(LENGTHS), 1)


def test_credit_without_a_reference(assigned, batch, tiny_model):
    """EndoRM: delta(v) = log pi of its own, sampled tokens and candidates alike."""
    made, delta = assigned(Endorm())
    own = LanguageModel(tiny_model(2, 12.0)).logprobs(batch.answers)
    torch.testing.assert_close(delta, own)
    values = torch.cat([piece.cumsum(0) for piece in own.split(LENGTHS)])
    torch.testing.assert_close(made.credit.values_N, values, rtol=1e-4, atol=1e-3)
    members_NK = made.ids_NS[:, 1:] == made.ids_NS[:, :1]  # where the sampled token is a candidate too
    assert members_NK.any()
    picked = made.credit.credit_NS[:, 1:][members_NK]
    torch.testing.assert_close(picked, own[members_NK.any(1)], rtol=1e-4, atol=1e-3)
