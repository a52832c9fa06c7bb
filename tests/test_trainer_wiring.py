"""Every setting, mode and property of a model arrives at the function that acts on it: the pieces of a step alone."""

from dataclasses import replace

import pytest
import torch

from ipvrm_core import METHODS
from ipvrm_core.objectives.dpo import Dpo
from ipvrm_core.objectives.ipvrm import Ipvrm
from ipvrm_core.reference.policy_loss import distrl_loss_from_logits
from ipvrm_core.trainer import credit as crediting
from ipvrm_core.trainer import policy_update, reward
from ipvrm_core.trainer.config import RlRewardModel
from ipvrm_core.trainer.credit import Credit, assign, old_policy, update_reward_model
from ipvrm_core.trainer.models import OutputHead, head_of
from ipvrm_core.trainer.policy_update import make_policy_batch, update_policy
from ipvrm_core.trainer.reward import backward_reward_loss, sampled_logprobs
from tests.batches import CU, full_logits, two_prompts, two_short_answers

PAPER = PRESETS["paper"]
TARGETS = torch.tensor([token for answer in two_prompts().answers for token in answer.response_ids])


def test_the_candidate_baseline(monkeypatch):
    """p = (.6, .2), delta = (3, -1): the mean over the candidates is (1.8 - .2) / .8 = 2."""
    batch, old = two_short_answers()
    errors_NK = torch.tensor([[3.0, -1.0], [0.0, 0.0], [-1.0, 3.0], [0.0, 0.0]])
    monkeypatch.setattr(crediting, "_td_errors", lambda *_: (torch.tensor([3.0, 0.0, -1.0, 0.0]), errors_NK))
    plain, centred = (
        assign(None, replace(PAPER, candidate_baseline=name), batch, old, torch.nn.Identity(), Ipvrm()).delta_NK
        for name in ("none", "mean")
    )
    assert torch.equal(plain, errors_NK)
    torch.testing.assert_close(centred, torch.tensor([[1.0, -3.0], [0.0, 0.0], [-1.0, 3.0], [0.0, 0.0]]))


@pytest.mark.parametrize(("form", "expected"), [("std_plus_eps", 2.0), ("floored_std", 4.0)])
def test_the_form_of_sigma(form, expected):
    """Values of std 1e-6, as large as eps: 4e-6 is divided by their sum, or by the larger of them."""
    batch, old = two_short_answers()
    values_N = 1e-6 * torch.tensor([1.0, -1.0, 1.0, -1.0])
    credit = Credit(
        old.cu_seqlens, old.logprobs_N, torch.zeros(4), old.candidates, torch.full((4, 2), 4e-6), values_N, {}
    )
    made = make_policy_batch(replace(PAPER, sigma_form=form), credit, batch.answers, torch.arange(4), None)
    torch.testing.assert_close(made.candidate_advantages_NK, torch.full((4, 2), expected))


@pytest.fixture
def head(tiny_model, monkeypatch):
    """A policy whose head has a bias and a soft cap, as far as all of the trainer can see."""
    model = tiny_model(1, 12.0)
    weight = model.get_output_embeddings().weight
    made = OutputHead(weight, torch.linspace(-1, 1, len(weight)), 4.0)
    for module in (crediting, policy_update, reward):
        monkeypatch.setattr(module, "head_of", lambda asked: made if asked is model else head_of(asked))
    return model, made


@pytest.fixture
def updated(tiny_experiment, tiny_model, head, monkeypatch):
    """updated(**settings of the run) -> (numbers of one step on all answers, what the reference says, the policy)."""
    model, options = head
    batch, reward_model = two_prompts(), tiny_model(2, 12.0)
    monkeypatch.setattr(policy_update, "apply_step", lambda *_: 0.0)

    def run(**settings):
        experiment = tiny_experiment(rl={"x": {"minibatch": 6, "method": {"alpha": 2.0}, **settings}})
        rl = experiment.config.rl["x"]
        preset = rl.resolved()
        old = old_policy(experiment, model, preset, batch)
        credit = assign(experiment, preset, batch, old, reward_model, Ipvrm())
        credit = replace(credit, old_logprobs_N=credit.old_logprobs_N + 0.1)  # as if the policy had moved
        ref_N = old.logprobs_N - 0.3
        torch.manual_seed(0)
        numbers = update_policy(experiment, rl, preset, model, None, batch, credit, ref_N, 1)
        made = make_policy_batch(preset, credit, batch.answers, torch.arange(len(TARGETS)), ref_N)
        config = preset.loss_config(softcap=options.softcap, kl_coef=rl.kl_coef, entropy_coef=rl.entropy_coef)
        expected = distrl_loss_from_logits(full_logits(model, batch.answers) + options.bias, made, config)
        return numbers, expected, model

    return run


@pytest.mark.parametrize("settings", [{}, {"kl_coef": 0.5}, {"entropy_coef": 0.5}], ids=str)
def test_what_the_policy_loss_is_told(updated, settings):
    """Bias and soft cap of the head, and the coefficients of the run."""
    numbers, expected, model = updated(**settings)
    assert numbers["loss"] == pytest.approx(expected.loss.item(), abs=1e-4)
    for name in ("loss_sampled", "loss_candidates", "kl_ref", "kl_old"):
        assert numbers[name] == pytest.approx(expected.metrics[name].item(), abs=1e-4)
    assert min(expected.metrics["entropy"], expected.metrics["kl_ref"]) > 0.01  # the terms say something
    assert model.training


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_log_probs_know_temperature_bias_and_soft_cap(tiny_experiment, head, temperature):
    experiment = tiny_experiment(generation={"temperature": temperature})
    model, options = head
    answers = two_prompts().answers
    logits_NV = full_logits(model, answers) + options.bias
    logp_NV = ((4 * (logits_NV / 4).tanh()) / temperature).log_softmax(-1)
    expected_N = logp_NV.gather(1, TARGETS[:, None])[:, 0]
    for got_N in (
        sampled_logprobs(experiment, model, answers),
        old_policy(experiment, model, PAPER, two_prompts()).logprobs_N,
    ):
        torch.testing.assert_close(got_N, expected_N, rtol=0, atol=1e-4)


def test_a_pair_weighs_as_its_winner(tiny_experiment, tiny_model):
    """Twice the weight of the answers 0, 2, 4; beta (Q_w - Q_l) by hand from the log-probs."""
    experiment, model, answers = tiny_experiment(), tiny_model(1), two_prompts().answers
    weights_B, ref_N = torch.tensor([0.5, 9.0, 0.25, 9.0, 0.0, 9.0]), torch.full((len(TARGETS),), -2.0)
    loss = backward_reward_loss(experiment, model, Dpo(beta=0.1), answers, ref_N, torch.zeros(6), weights_B)
    q_N = sampled_logprobs(experiment, model, answers) - ref_N
    q_B = torch.stack([part.sum() for part in q_N.split(CU.diff().tolist())])
    losses_P = torch.nn.functional.softplus(-0.1 * (q_B[::2] - q_B[1::2]))
    assert loss == pytest.approx((losses_P * torch.tensor([1.0, 0.5, 0.0])).sum().item(), rel=1e-5)


def test_the_reward_model_learns_in_training_mode_and_scores_in_evaluation_mode(
    tiny_experiment, tiny_model, monkeypatch
):
    experiment, batch, model = tiny_experiment(), two_prompts(), tiny_model(1)
    old = old_policy(experiment, tiny_model(2), PAPER, batch)
    modes = []

    def learn(experiment, model, *_):
        modes.append(("learn", model.training))
        return 0.0

    def score(experiment, model, batch, old, against_NK, beta):
        modes.append(("score", model.training))
        return against_NK

    monkeypatch.setattr(crediting, "backward_reward_loss", learn)
    monkeypatch.setattr(crediting, "_errors", score)
    monkeypatch.setattr(crediting, "apply_step", lambda *_: 0.0)
    settings = RlRewardModel(name="x", batch=6)
    for _ in range(2):  # each finds the model as the other left it
        update_reward_model(
            experiment, PAPER, settings, Ipvrm(), model, None, batch, old.logprobs_N, old.cu_seqlens, 1, 1
        )
        assign(experiment, PAPER, batch, old, model, Ipvrm())
    assert modes == [("learn", True), ("score", False)] * 2
