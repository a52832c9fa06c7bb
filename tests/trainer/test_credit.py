"""From a batch of answers to a policy gradient: candidates, advantages, micro-batches, the reward model's update."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from ipvrm_core import METHODS, outcome_advantages
from ipvrm_core.objectives.ipvrm import Ipvrm
from ipvrm_core.reference.candidates import select_candidates_from_logits
from ipvrm_core.reference.policy_loss import distrl_loss_from_logits
from ipvrm_core.trainer.config import Optim, RlRewardModel
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.optim import make_optimizer
from ipvrm_core.trainer.reward import backward_reward_loss
from ipvrm_core.trainer.rl import credit as crediting
from ipvrm_core.trainer.rl import reward_update
from ipvrm_core.trainer.rl.collect import Collected
from ipvrm_core.trainer.rl.credit import assign
from ipvrm_core.trainer.rl.old_policy import old_policy
from ipvrm_core.trainer.rl.policy_update import _backward, _minibatches, make_policy_batch
from ipvrm_core.trainer.rl.reward_update import update_reward_model
from tests.batches import full_logits, two_prompts, two_short_answers

PAPER, OFFICIAL = METHODS["paper"], METHODS["official"]


@pytest.fixture
def batch() -> Collected:
    return two_prompts()


def _targets(batch: Collected) -> torch.Tensor:
    return torch.tensor([token for answer in batch.answers for token in answer.response_ids])


def _lengths(batch: Collected) -> list[int]:
    return [len(answer.response_ids) for answer in batch.answers]


def _last(batch: Collected) -> torch.Tensor:
    return torch.tensor([t == len(a.response_ids) - 1 for a in batch.answers for t in range(len(a.response_ids))])


# ---- the old policy


@pytest.mark.parametrize("preset", [PAPER, OFFICIAL, replace(PAPER, p_min=0.05, keep_sampled=True)])
@pytest.mark.parametrize(("limit", "temperature"), [(24, 1.0), (10_000, 0.7)])
def test_old_policy_against_the_reference_on_full_logits(tiny_model, batch, preset, limit, temperature):
    model = LanguageModel(tiny_model(scale=12.0), temperature=temperature, max_tokens=limit)
    old = old_policy(model, preset, batch.answers)
    expected = select_candidates_from_logits(
        full_logits(model, batch.answers),
        _targets(batch),
        **preset.candidate_rule(),
        exclude_N=_last(batch) if preset.skip_last_token else None,
        temperature=temperature,
    )
    assert torch.equal(old.candidates.ids_NS, expected.ids_NS)
    assert torch.equal(old.candidates.counts_N, expected.counts_N)
    for name in ("logprobs_NS", "entropy_N"):
        torch.testing.assert_close(getattr(old.candidates, name), getattr(expected, name), rtol=0, atol=1e-4)
    torch.testing.assert_close(old.logprobs_N, expected.sampled_logprobs_N, rtol=0, atol=1e-4)
    assert old.cu_seqlens.tolist() == [0, 4, 11, 13, 18, 28, 31]
    inside = expected.ids_NS[:, 1:] >= 0
    mass = (expected.logprobs_NS[:, 1:].exp() * inside).sum(1).mean().item()
    assert old.numbers["candidate_mass"] == pytest.approx(mass, abs=1e-5)
    assert old.numbers["candidates"] == pytest.approx(expected.counts_N.float().mean().item())
    assert expected.counts_N.max() > 1


# ---- advantages


def test_without_a_reward_model_the_advantage_is_the_outcome(tiny_model, batch):
    """mu = 1/3: (1 - 1/3) / sqrt(2/9) = sqrt 2 and -sqrt(1/2); mu = 2/3 mirrors it; the same at every token."""
    old = old_policy(LanguageModel(tiny_model()), PAPER, batch.answers)
    made = assign(PAPER, batch, old, None, None)
    right, wrong = 2**0.5, -(0.5**0.5)
    expected = [right] * 4 + [wrong] * 7 + [wrong] * 2 + [-wrong] * 5 + [-wrong] * 10 + [-right] * 3
    torch.testing.assert_close(made.credit.credit_NS, torch.tensor(expected)[:, None], rtol=0, atol=1e-5)
    assert made.credit.values_N is None
    assert torch.equal(made.ids_NS, _targets(batch)[:, None])
    assert torch.equal(made.old_logprobs_NS, old.logprobs_N[:, None])
    assert made.numbers == old.numbers


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_td_errors_against_the_start(tiny_model, batch, temperature):
    """td_reference = "sft": beta (log pi_phi - log pi_start), of the sampled token and of every candidate."""
    model, reward_model, start = (
        LanguageModel(tiny_model(number, 12.0), temperature=temperature) for number in (1, 2, 3)
    )
    preset = replace(PAPER, td_reference="sft", estimator="td", process_normalize="batch")
    old = old_policy(model, preset, batch.answers)
    credit = assign(preset, batch, old, reward_model, Ipvrm(beta=3.0), None, start).credit
    logp_NV, start_NV = (
        (full_logits(each, batch.answers).double() / temperature).log_softmax(-1) for each in (reward_model, start)
    )
    delta_NV = 3.0 * (logp_NV - start_NV)
    ids_NK = old.candidates.ids_NS[:, 1:]
    expected_NK = delta_NV.gather(1, ids_NK.clamp(min=0)).masked_fill(ids_NK < 0, 0.0)
    torch.testing.assert_close(credit.credit_NS[:, 1:].double(), expected_NK, rtol=0, atol=1e-3)
    values = [piece.cumsum(0) for piece in delta_NV.gather(1, _targets(batch)[:, None])[:, 0].split(_lengths(batch))]
    torch.testing.assert_close(credit.values_N.double(), torch.cat(values), rtol=0, atol=1e-3)
    against_old = assign(replace(preset, td_reference="old"), batch, old, reward_model, Ipvrm(beta=3.0)).credit
    assert (against_old.credit_NS - credit.credit_NS)[:, 1:].abs().max() > 1


@pytest.mark.parametrize("preset", [PAPER, OFFICIAL], ids=["paper", "official"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_credit_by_the_written_formulas(tiny_model, batch, preset, temperature):
    """Prefix values, TD errors and GAE by loops over the answers, from full logits."""
    model, reward_model = (LanguageModel(tiny_model(number, 12.0), temperature=temperature) for number in (1, 2))
    beta, old = 3.0, old_policy(model, preset, batch.answers)
    credit = assign(preset, batch, old, reward_model, Ipvrm(beta=beta)).credit

    targets, last = _targets(batch), _last(batch)
    policy_NV = (full_logits(model, batch.answers).double() / temperature).log_softmax(-1)
    reward_NV = (full_logits(reward_model, batch.answers).double() / temperature).log_softmax(-1)
    delta_NV = beta * (reward_NV - policy_NV)
    own_N = delta_NV.gather(1, targets[:, None])[:, 0]
    bounds = old.cu_seqlens.tolist()
    spans = [slice(a, b) for a, b in pairwise(bounds)]
    if preset.skip_last_token:
        own_N = own_N.masked_fill(last, 0.0)
    values = torch.cat([own_N[span].cumsum(0) for span in spans])
    torch.testing.assert_close(credit.values_N.double(), values, rtol=0, atol=1e-3)

    ids = old.candidates.ids_NS[:, 1:]
    expected_NK = torch.where(ids >= 0, delta_NV.gather(1, ids.clamp(min=0)), 0.0)
    candidates_NK = credit.credit_NS[:, 1:].double().masked_fill(ids < 0, 0.0)
    torch.testing.assert_close(candidates_NK, expected_NK, rtol=0, atol=1e-3)
    if preset is PAPER:
        scaled = torch.zeros_like(own_N)
        for group in (slice(0, bounds[3]), slice(bounds[3], bounds[6])):
            scaled[group] = (own_N[group] - own_N[group].mean()) / (own_N[group].std(unbiased=False) + 1e-6)
    else:
        scaled = (own_N - own_N.mean()) / values.std(unbiased=False)
    process = torch.cat([scaled[span].flip(0).cumsum(0).flip(0) for span in spans])
    if preset is OFFICIAL:
        process = (process - process.mean()) / (process.var() + 1e-8).sqrt()
    outcome = outcome_advantages(batch.rewards_B, batch.groups_B).double()
    lengths = torch.tensor([span.stop - span.start for span in spans])
    expected = outcome.repeat_interleave(lengths) + preset.process_coef * process
    torch.testing.assert_close(credit.credit_NS[:, 0].double(), expected, rtol=1e-3, atol=1e-3)


def test_official_advantages_by_hand(monkeypatch):
    """Two answers of two tokens; the last TD errors, -7 and 9, are set to 0 before anything is made of the others.

    V = (2, 2 | -2, -2), so sigma_V = 2; with the last errors it would be (2, -5 | -2, 7) and 4.5. A_TD = delta / 2.
    GAE: delta / 2 = (1, 0 | -1, 0) has mean 0, is its own suffix sum, and is whitened by sqrt(2/3), the unbiased std;
    outcome +-1. The AUC is of the whole answers: the right one scores 2 - 7, the wrong one -2 + 9.
    """
    batch, old = two_short_answers()
    errors = torch.tensor([[2.0, 2.0, -3.0], [-7.0, 0.0, 0.0], [-2.0, -2.0, 1.0], [9.0, 0.0, 0.0]])
    monkeypatch.setattr(crediting, "td_errors", lambda *_: errors)
    credit = assign(OFFICIAL, batch, old, object(), Ipvrm())
    assert credit.numbers["sigma_v"] == 2.0
    assert (credit.numbers["rm_auc"], credit.numbers["rm_accuracy"]) == (0.0, 0.0)
    whitened = 0.05 * 1.5**0.5
    made = make_policy_batch(OFFICIAL, credit, [0, 1], None)
    sampled = torch.tensor([1 + whitened, 1.0, -1 - whitened, -1.0])
    candidates = torch.tensor([[1.0, -1.5], [0.0, 0.0], [-1.0, 0.5], [0.0, 0.0]])
    torch.testing.assert_close(made.advantages_NS, torch.cat([sampled[:, None], candidates], dim=1))


def test_skip_last_token_leaves_no_candidates_there(tiny_model, batch):
    model, reward_model = LanguageModel(tiny_model(1, 12.0)), LanguageModel(tiny_model(2, 12.0))
    last = _last(batch)
    preset = replace(PAPER, keep_sampled=True)
    for skip in (False, True):
        chosen = replace(preset, skip_last_token=skip)
        old = old_policy(model, chosen, batch.answers)
        assert (old.candidates.counts_N[~last] > 0).all()
        assert (old.candidates.counts_N[last] == 0).all() == skip
        assert (old.candidates.ids_NS[last, 1:] == -1).all() == skip
        credit = assign(chosen, batch, old, reward_model, Ipvrm())
        made = make_policy_batch(chosen, credit, range(6), None)
        logits = full_logits(model, batch.answers)[last]
        loss = distrl_loss_from_logits(logits, made.rows(last), chosen.loss_config()).metrics["loss_candidates"]
        assert (loss == 0) == skip


def test_a_batch_without_any_candidate(tiny_model, batch):
    """A flat policy has no token above P_min: no spread to report, no distribution loss, and all goes on."""
    model, preset = LanguageModel(tiny_model(1, 1.0)), replace(PAPER, p_min=0.9)
    old = old_policy(model, preset, batch.answers)
    credit = assign(preset, batch, old, LanguageModel(tiny_model(2, 1.0)), Ipvrm())
    assert old.numbers["candidates"] == 0
    assert "candidate_td_std" not in credit.numbers
    made = make_policy_batch(preset, credit, range(6), None)
    numbers = _backward(model, preset.loss_config(), batch.answers, made)
    assert numbers["loss_candidates"] == 0
    assert all(value == value for value in [*numbers.values(), *credit.numbers.values()])


@pytest.mark.parametrize("scope", ["minibatch", "batch"])
def test_scale_of_the_td_advantages(tiny_model, batch, scope):
    model, reward_model = LanguageModel(tiny_model(1, 12.0)), LanguageModel(tiny_model(2, 12.0))
    preset = replace(PAPER, sigma_scope=scope)
    old = old_policy(model, preset, batch.answers)
    credit = assign(preset, batch, old, reward_model, Ipvrm())
    rows = torch.arange(4, 13)  # the second and third answer
    made = make_policy_batch(preset, credit, [1, 2], old.logprobs_N - 1)
    credit_NS, values_N, _ = credit.credit
    values = values_N[rows] if scope == "minibatch" else values_N
    expected = credit_NS[rows, 1:] / (values.double().std(unbiased=False) + 1e-6).float()
    torch.testing.assert_close(made.advantages_NS[:, 1:], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(made.advantages_NS[:, 0], credit_NS[rows, 0])
    assert made.ids_NS[:, 0].tolist() == _targets(batch)[rows].tolist()
    assert torch.equal(made.ids_NS, old.candidates.ids_NS[rows])
    assert torch.equal(made.old_logprobs_NS, old.candidates.logprobs_NS[rows])
    assert torch.equal(made.ref_logprobs_N, old.logprobs_N[rows] - 1)


# ---- the policy gradient


@pytest.mark.parametrize("preset", [replace(PAPER, alpha=1.0), OFFICIAL], ids=["paper", "official"])
def test_gradient_does_not_depend_on_micro_batches(tiny_model, batch, preset):
    """One minibatch through the trainer's own path; also against the reference loss on full logits."""
    index = [4, 0, 5, 2]
    answers = [batch.answers[b] for b in index]
    reward_model = LanguageModel(tiny_model(2, 12.0))
    gradients, numbers = {}, {}
    for limit in (10_000, 40, 1):
        model = LanguageModel(tiny_model(1, 8.0), max_tokens=limit)
        old = old_policy(model, preset, batch.answers)
        credit = assign(preset, batch, old, reward_model, Ipvrm())
        with torch.no_grad():  # away from pi_old, so that ratios and clipping matter
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        config = preset.loss_config(kl_coef=0.1, entropy_coef=0.01)
        made = make_policy_batch(preset, credit, index, old.logprobs_N - 0.3)
        numbers[limit] = _backward(model, config, answers, made)
        gradients[limit] = {name: parameter.grad for name, parameter in model.named_parameters()}
        if limit == 10_000:
            model.zero_grad(set_to_none=True)
            reference = distrl_loss_from_logits(full_logits(model, answers), made, config)
            reference.loss.backward()
            truth = {name: parameter.grad for name, parameter in model.named_parameters()}
            assert numbers[limit]["loss"] == pytest.approx(reference.loss.item(), abs=1e-4)
            assert 0 < reference.metrics["clip_fraction"] < 1
            for name, grad in truth.items():
                torch.testing.assert_close(gradients[limit][name], grad, rtol=1e-3, atol=1e-5, msg=name)
    for limit in (40, 1):
        for name, grad in gradients[10_000].items():
            scale = grad.abs().max().item()
            assert scale > 0
            torch.testing.assert_close(gradients[limit][name], grad, rtol=0, atol=1e-6 * max(scale, 1.0), msg=name)
        assert numbers[limit] == pytest.approx(numbers[10_000], abs=1e-5)


def test_minibatches_cover_every_epoch(tiny_config):
    rl = tiny_config(rl={"x": {"epochs": 2, "minibatch": 4}}).rl["x"]
    torch.manual_seed(0)
    made = list(_minibatches(10, rl))
    assert [len(part) for part in made] == [4, 4, 2, 4, 4, 2]
    for epoch in (made[:3], made[3:]):
        assert sorted(i for part in epoch for i in part) == list(range(10))
    assert made[:3] != made[3:]


# ---- the reward model


@pytest.mark.parametrize("limit", [1, 40])
def test_reward_gradient_does_not_depend_on_micro_batches(tiny_model, batch, limit):
    results = []
    for tokens in (10_000, limit):
        model, reference = (LanguageModel(tiny_model(number), max_tokens=tokens) for number in (1, 2))
        weights, boundary = torch.linspace(0.1, 0.6, 6), torch.linspace(-1, 1, 6)
        given = reference.logprobs(batch.answers), batch.rewards_B, weights, boundary
        loss = backward_reward_loss(model, Ipvrm(), batch.answers, *given)
        results.append((loss, [parameter.grad for parameter in model.parameters()]))
    (loss, grads), (other_loss, other_grads) = results
    assert other_loss == pytest.approx(loss, rel=1e-5)
    for grad, other in zip(grads, other_grads, strict=True):
        torch.testing.assert_close(other, grad, rtol=0, atol=1e-5 * grad.abs().max().item())


@pytest.mark.parametrize("scale", ["raw", "group"])
def test_online_gradient_is_that_of_the_written_loss(tiny_model, batch, monkeypatch, scale):
    """The answers are shuffled inside: everything must move with them. Weights 1 - mu and mu, boundary logit mu."""
    model, preset = LanguageModel(tiny_model(1)), replace(PAPER, dlw_scale=scale)
    old = old_policy(LanguageModel(tiny_model(2)), preset, batch.answers)
    monkeypatch.setattr(reward_update, "apply_step", lambda *_: 0.0)  # leaves the gradient
    torch.manual_seed(3)
    settings = RlRewardModel(name="x", batch=64)
    numbers = update_reward_model(model, None, Ipvrm(), settings, preset, batch, old, old.logprobs_N, 1, 1)
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    mu, right = batch.group_mean_B, batch.rewards_B > 0
    weights = torch.where(right, 1 - mu, mu) if scale == "raw" else torch.where(right, 0.5 / mu, 0.5 / (1 - mu))
    boundary = torch.log(mu / (1 - mu))
    given = old.logprobs_N, batch.rewards_B, weights / 6, boundary
    expected = backward_reward_loss(model, Ipvrm(), batch.answers, *given)
    assert numbers["rm_loss"] == pytest.approx(expected, rel=1e-5)
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        limit = 1e-5 * parameter.grad.abs().max().item()
        torch.testing.assert_close(gradient, parameter.grad, rtol=0, atol=limit)


def test_online_update_raises_right_and_lowers_wrong_answers(tiny_model, batch):
    settings = RlRewardModel(name="x", optim=Optim(lr=3e-3), batch=64)
    policy, model = (LanguageModel(tiny_model(1)) for _ in range(2))
    old = old_policy(policy, PAPER, batch.answers)
    optimizer = make_optimizer(model, settings.optim)
    losses = []
    for step in range(1, 21):
        torch.manual_seed(step)
        given = batch, old, old.logprobs_N, step, 20
        numbers = update_reward_model(model, optimizer, Ipvrm(), settings, PAPER, *given)
        losses.append(numbers["rm_loss"])
    assert losses[-1] < 0.5 * losses[0]
    gain_N = model.eval().logprobs(batch.answers) - old.logprobs_N
    gain_B = torch.stack([part.mean() for part in gain_N.split(_lengths(batch))])
    assert gain_B[batch.rewards_B > 0].min() > gain_B[batch.rewards_B == 0].max()


@pytest.mark.parametrize("scale", ["raw", "group"])
def test_unmixed_groups_give_the_reward_model_no_gradient(tiny_model, batch, scale):
    model = LanguageModel(tiny_model(1))
    settings = RlRewardModel(name="x", optim=Optim(lr=1e-2), batch=64)
    old = old_policy(model, PAPER, batch.answers)
    same = replace(
        batch, rewards_B=torch.tensor([1.0] * 3 + [0.0] * 3), group_mean_B=torch.tensor([1.0] * 3 + [0.0] * 3)
    )
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = make_optimizer(model, settings.optim)
    preset = replace(PAPER, dlw_scale=scale)
    numbers = update_reward_model(model, optimizer, Ipvrm(), settings, preset, same, old, old.logprobs_N, 1, 1)
    assert numbers == {"rm_loss": 0.0, "rm_grad_norm": 0.0}
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
