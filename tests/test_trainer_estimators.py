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
from ipvrm_core.trainer.reward import sampled_logprobs, scores
from ipvrm_core.trainer.rl.collect import Collected
from ipvrm_core.trainer.rl.credit import assign, old_policy
from ipvrm_core.trainer.rl.policy_update import make_policy_batch
from tests.batches import CU, LENGTHS, two_prompts, with_value_head

PAPER = METHODS["paper"]


@pytest.fixture
def batch() -> Collected:
    return two_prompts()


@pytest.fixture
def assigned(tiny_experiment, tiny_model, batch):
    """assigned(objective, **settings) -> (credit, delta of the sampled tokens by hand), reward model number 2."""
    experiment, model, reward_model = tiny_experiment(), tiny_model(1, 12.0), with_value_head(tiny_model(2, 12.0))

    def run(objective=None, ref_N=None, **settings):
        preset = replace(PAPER, **settings)
        old = old_policy(experiment, model, preset, batch)
        credit = assign(experiment, preset, batch, old, reward_model if objective else None, objective, ref_N)
        if objective is None:
            return credit, old.logprobs_N
        return credit, objective.beta * scores(experiment, reward_model, objective, batch.answers, old.logprobs_N)

    return run


def test_outcomes(assigned, batch):
    advantages = {name: assigned(outcome=name)[0].advantages_N for name in ("grpo", "rloo", "reinforce")}
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
    settings = {"estimator": estimator, "process_coef": 0.7, "process_normalize": normalize, "outcome": "rloo", **discount}
    credit, delta = assigned(Ipvrm(beta=3.0), **settings)
    x = delta.double().clone()
    if normalize == "group":
        for rows in (slice(0, CU[3]), slice(CU[3], CU[6])):
            x[rows] = (x[rows] - x[rows].mean()) / (x[rows].std(unbiased=False) + 1e-6)
    else:
        x = (x - x.mean()) / (credit.values_N.double().std(unbiased=False) + 1e-6)
    decay = {"td": 0.0, "mc": 0.9, "gae": 0.45, "none": 0.0}[estimator]
    process = torch.zeros_like(x)
    for a, b in pairwise(CU.tolist()):
        for t in range(a, b):
            process[t] = sum(decay ** (i - t) * x[i] for i in range(t, b))
    if normalize == "batch":
        process = (process - process.mean()) / (process.var() + 1e-8).sqrt()
    outcome = expand(rloo_advantages(batch.rewards_B, batch.groups_B), CU, len(x)).double()
    expected = outcome + (0.0 if estimator == "none" else 0.7 * process)
    torch.testing.assert_close(credit.advantages_N.double(), expected, rtol=1e-3, atol=1e-3)


def test_gae_with_its_defaults_is_mc_to_the_bit(assigned):
    assert torch.equal(assigned(Ipvrm())[0].advantages_N, assigned(Ipvrm(), estimator="mc")[0].advantages_N)


@pytest.mark.parametrize("skip", [False, True])
def test_prime(assigned, batch, skip):
    """The whole advantage, whitened. PRIME's code leaves out the last token's reward: method.skip_last_token."""
    credit, delta = assigned(Prime(), estimator="prime", outcome="rloo", process_coef=0.4, skip_last_token=skip)
    if skip:
        delta = delta.clone()
        delta[CU[1:] - 1] = 0.0
    expected = prime_advantages(delta, batch.rewards_B, CU, batch.groups_B, coef=0.4)
    torch.testing.assert_close(credit.advantages_N, expected, rtol=1e-4, atol=1e-4)
    assert credit.advantages_N.mean().abs() < 1e-5
    assert credit.advantages_N.std() == pytest.approx(1.0, abs=1e-4)


def test_masked_step_advantages_of_a_reward_model(assigned, batch):
    credit, delta = assigned(Ipvrm(), estimator="msa", process_coef=0.3)
    outcome = expand(outcome_advantages(batch.rewards_B, batch.groups_B), CU, len(delta))
    expected = outcome + 0.3 * masked_step_advantages(delta, CU, batch.groups_B)
    torch.testing.assert_close(credit.advantages_N, expected, rtol=1e-4, atol=1e-4)


def test_spro_takes_the_policy_against_the_start(assigned, batch):
    ref_N = -torch.rand(sum(LENGTHS))
    credit, own = assigned(None, ref_N, estimator="msa", process_coef=0.3)
    outcome = expand(outcome_advantages(batch.rewards_B, batch.groups_B), CU, len(own))
    expected = outcome + 0.3 * masked_step_advantages(own - ref_N, CU, batch.groups_B)
    torch.testing.assert_close(credit.advantages_N, expected, rtol=1e-5, atol=1e-5)
    assert credit.candidates is None


def test_credit_of_a_value_head(assigned, batch):
    """beta Z of the sampled tokens; nothing for the candidates, and a policy batch without them."""
    credit, delta = assigned(Qrm(beta=0.5), estimator="td", alpha=0.0, process_coef=2.0)
    x = delta.double().clone()
    for rows in (slice(0, CU[3]), slice(CU[3], CU[6])):
        x[rows] = (x[rows] - x[rows].mean()) / (x[rows].std(unbiased=False) + 1e-6)
    outcome = expand(outcome_advantages(batch.rewards_B, batch.groups_B), CU, len(x)).double()
    torch.testing.assert_close(credit.advantages_N.double(), outcome + 2 * x, rtol=1e-3, atol=1e-3)
    values = torch.cat([piece.cumsum(0) for piece in delta.split(LENGTHS)])
    torch.testing.assert_close(credit.values_N, values, rtol=1e-4, atol=1e-4)
    assert credit.delta_NK is None
    rows = torch.arange(sum(LENGTHS))
    assert (
        make_policy_batch(replace(PAPER, alpha=0.0), credit, batch.answers, rows, None).candidate_ids_NK.shape[1] == 0
    )


def test_credit_without_a_reference(assigned, batch, tiny_experiment, tiny_model):
    """EndoRM: delta(v) = log pi of its own, sampled tokens and candidates alike."""
    credit, delta = assigned(Endorm())
    own = sampled_logprobs(tiny_experiment(), tiny_model(2, 12.0), batch.answers)
    torch.testing.assert_close(delta, own)
    values = torch.cat([piece.cumsum(0) for piece in own.split(LENGTHS)])
    torch.testing.assert_close(credit.values_N, values, rtol=1e-4, atol=1e-3)
    targets = torch.tensor([token for answer in batch.answers for token in answer.response_ids])
    sampled = credit.candidates.ids_NK == targets[:, None]
    assert sampled.any()
    picked = credit.delta_NK[sampled]
    torch.testing.assert_close(picked, own[sampled.any(1)], rtol=1e-4, atol=1e-3)
