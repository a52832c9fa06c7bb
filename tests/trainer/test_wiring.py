"""Every setting, mode and property of a model arrives at the function that acts on it: the pieces of a step alone."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ipvrm_core import METHODS
from ipvrm_core.credit import Credit
from ipvrm_core.objectives.dpo import Dpo
from ipvrm_core.objectives.ipvrm import Ipvrm
from ipvrm_core.reference.policy_loss import distrl_loss_from_logits
from ipvrm_core.trainer.config import RlRewardModel
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.reward import backward_reward_loss
from ipvrm_core.trainer.rl import clock, policy_update, reward_update
from ipvrm_core.trainer.rl import credit as crediting
from ipvrm_core.trainer.rl import step as step_module
from ipvrm_core.trainer.rl.credit import BatchCredit, assign
from ipvrm_core.trainer.rl.old_policy import old_policy
from ipvrm_core.trainer.rl.policy_update import make_policy_batch, update_policy
from ipvrm_core.trainer.rl.reward_update import update_reward_model
from ipvrm_core.trainer.rl.step import Learner, rl_step
from tests.batches import CU, full_logits, two_prompts, two_short_answers

PAPER = METHODS["paper"]
TARGETS = torch.tensor([token for answer in two_prompts().answers for token in answer.response_ids])


def test_the_candidate_baseline(monkeypatch):
    """p = (.6, .2), delta = (3, -1): the mean over the candidates is (1.8 - .2) / .8 = 2."""
    batch, old = two_short_answers()
    errors_NS = torch.tensor([[3.0, 3.0, -1.0], [0.0, 0.0, 0.0], [-1.0, -1.0, 3.0], [0.0, 0.0, 0.0]])
    monkeypatch.setattr(crediting, "td_errors", lambda *_: errors_NS)
    plain, centred = (
        assign(replace(PAPER, candidate_baseline=name), batch, old, object(), Ipvrm()).credit.credit_NS
        for name in ("none", "mean")
    )
    assert torch.equal(plain[:, 1:], errors_NS[:, 1:])
    torch.testing.assert_close(centred[:, 1:], torch.tensor([[1.0, -3.0], [0.0, 0.0], [-1.0, 3.0], [0.0, 0.0]]))
    assert torch.equal(plain[:, 0], centred[:, 0])


def test_the_truth_as_credit():
    """Token 8 is due at the first position, nothing at the second, at the third what is no candidate; no sigma_V."""
    batch, old = two_short_answers()
    batch = replace(batch, due_N=torch.tensor([8, -1, 9, 1]))
    made = assign(PAPER, batch, old, None, None, source="oracle")
    rows = make_policy_batch(PAPER, made, [0, 1], None)
    expected = torch.tensor([[1.0, -1.0, 1.0], [1.0, 0.0, 0.0], [-1.0, -1.0, -1.0], [-1.0, 0.0, 0.0]])
    assert torch.equal(rows.advantages_NS, expected)  # slot 0: r = 1, 0, standardised
    assert torch.equal(rows.ids_NS, old.candidates.ids_NS)


def test_agreement_has_the_beta_of_the_objective(monkeypatch):
    """p = (.6, .2), beta 10: TD errors of 10 log 1.5 and 10 log 1/2 are pi_phi = .9 and .1."""
    batch, old = two_short_answers()
    errors_NS = 10 * torch.tensor([[1.5, 1.5, 0.5], [1.0, 1.0, 1.0], [1.5, 1.5, 0.5], [1.0, 1.0, 1.0]]).log()
    monkeypatch.setattr(crediting, "td_errors", lambda *_: errors_NS)
    method = replace(PAPER, candidate_form="agreement", sigma_scope="minibatch")
    rows = make_policy_batch(method, assign(method, batch, old, object(), Ipvrm(beta=10.0)), [0, 1], None)
    expected = torch.tensor([[0.8, -0.8], [0.0, 0.0]] * 2)
    torch.testing.assert_close(rows.advantages_NS[:, 1:], expected)


def test_the_policys_own_probabilities_as_credit():
    batch, old = two_short_answers()
    rows = make_policy_batch(PAPER, assign(PAPER, batch, old, None, None, source="policy"), [0, 1], None)
    torch.testing.assert_close(rows.advantages_NS[:, 1:], torch.tensor([[0.2, -0.6], [0.0, 0.0]] * 2))


@pytest.mark.parametrize(
    ("errors", "share"),
    [
        ([-1.0, 1.0], 1.0),  # the truth itself: 8 is due
        ([0.0, 2.0], 0.176 / 0.208),  # a constant moves the mass of C: g = (-.24, .32), g* = (-.36, .28)
        ([0.5, -0.5], -0.5),
    ],
)
def test_the_share_of_perfect_credit(errors, share):
    """p = (.6, .2), A* = (-1, 1): sum -.4, g* = (.6 * -.6, .2 * 1.4). For A = (0, 2): sum .4, g = (-.24, .32)."""
    _, old = two_short_answers()
    given = torch.tensor([errors, [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    gain = crediting.credit_gain(given, torch.tensor([8, -1, -1, -1]), old)
    assert gain == pytest.approx(share)


def test_how_often_the_credit_is_right(monkeypatch):
    """Two open positions, 8 and 7 due: TD errors prefer 6 and 7, the policy, .6 against .2, prefers 6 and 7."""
    batch, old = two_short_answers()
    errors_NS = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 2.0, -1.0], [0.0, 0.0, 0.0]])
    monkeypatch.setattr(crediting, "td_errors", lambda *_: errors_NS)
    numbers = assign(PAPER, replace(batch, due_N=torch.tensor([8, 1, 7, -1])), old, object(), Ipvrm()).numbers
    assert [numbers[key] for key in ("credit_open", "credit", "credit_policy")] == [0.5, 0.5, 0.5]
    none_open = assign(PAPER, replace(batch, due_N=torch.full((4,), -1)), old, object(), Ipvrm()).numbers
    assert none_open["credit_open"] == 0
    assert "credit" not in none_open  # a share of nothing
    assert "credit_open" not in assign(PAPER, batch, old, object(), Ipvrm()).numbers  # no task


@pytest.mark.parametrize("passes", [1, 3])
def test_passes_of_the_reward_model_over_a_batch(tiny_model, monkeypatch, passes):
    batch, seen = two_prompts(), []
    old = old_policy(LanguageModel(tiny_model(2)), PAPER, batch.answers)
    learn = lambda model, objective, answers, *_: seen.append([batch.answers.index(a) for a in answers]) or 0.0  # noqa: E731
    monkeypatch.setattr(reward_update, "backward_reward_loss", learn)
    monkeypatch.setattr(reward_update, "apply_step", lambda *_: 0.0)
    settings = RlRewardModel(name="x", batch=4, passes=passes)
    update_reward_model(LanguageModel(tiny_model(1)), None, Ipvrm(), settings, PAPER, batch, old, old.logprobs_N, 1, 1)
    assert [len(index) for index in seen] == [4, 2] * passes
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        assert sorted(first + second) == list(range(6))


@pytest.mark.parametrize(("form", "expected"), [("std_plus_eps", 2.0), ("floored_std", 4.0)])
def test_the_form_of_sigma(form, expected):
    """Values of std 1e-6, as large as eps: 4e-6 is divided by their sum, or by the larger of them."""
    _, old = two_short_answers()
    values_N = 1e-6 * torch.tensor([1.0, -1.0, 1.0, -1.0])
    credit = Credit(torch.full((4, 3), 4e-6), values_N)
    made = BatchCredit(credit, old.candidates.ids_NS, old.candidates.logprobs_NS, old.cu_seqlens, {})
    rows = make_policy_batch(replace(PAPER, sigma_form=form), made, [0, 1], None)
    torch.testing.assert_close(rows.advantages_NS[:, 1:], torch.full((4, 2), expected))
    assert (rows.advantages_NS[:, 0] == 4e-6).all()  # A_t is divided by nothing


HEADS = {"a soft cap": {"final_logit_softcapping": 4.0}, "a scale": {"logit_scale": 0.25}}


@pytest.fixture(params=HEADS)
def policy(tiny_model, request):
    """make(temperature) -> (a policy whose head has a bias, and a soft cap or a scale; its logits by hand)."""

    def make(temperature: float = 1.0):
        model = LanguageModel(tiny_model(1, 12.0), temperature=temperature)
        output = model.model.get_output_embeddings()
        output.bias = torch.nn.Parameter(torch.linspace(-1, 1, len(output.weight)))  # the model's own logits have it
        vars(model.model.config).update(HEADS[request.param])
        logits_NV = full_logits(model, two_prompts().answers)
        return model, 4 * (logits_NV / 4).tanh() if request.param == "a soft cap" else 0.25 * logits_NV

    return make


@pytest.fixture
def updated(tiny_config, tiny_model, policy, monkeypatch):
    """updated(temperature, **settings of the run) -> (numbers of a step on all answers, what the reference says)."""
    batch, reward_model = two_prompts(), LanguageModel(tiny_model(2, 12.0))
    monkeypatch.setattr(policy_update, "apply_step", lambda *_: 0.0)

    def run(temperature: float = 1.0, **settings):
        rl = tiny_config(rl={"x": {"minibatch": 6, "method": {"alpha": 2.0}, **settings}}).rl["x"]
        (model, logits_NV), method = policy(temperature), rl.resolved()
        old = old_policy(model, method, batch.answers)
        credit, ref_N = assign(method, batch, old, reward_model, Ipvrm()), old.logprobs_N - 0.3
        credit.old_logprobs_NS[:, 0] += 0.1  # as if the policy had moved
        torch.manual_seed(0)
        numbers = update_policy(model, None, rl, method, batch.answers, credit, ref_N, 1)
        made = make_policy_batch(method, credit, range(6), ref_N)
        config = method.loss_config(temperature, kl_coef=rl.kl_coef, entropy_coef=rl.entropy_coef)
        assert model.training
        return numbers, distrl_loss_from_logits(logits_NV, made, config)

    return run


@pytest.mark.parametrize("settings", [{}, {"kl_coef": 0.5}, {"entropy_coef": 0.5}, {"temperature": 0.5}])
def test_what_the_policy_loss_is_told(updated, settings):
    """Bias, soft cap and scale of the head, the temperature, and the coefficients of the run."""
    numbers, expected = updated(**settings)
    assert numbers["loss"] == pytest.approx(expected.loss.item(), abs=1e-4)
    for name in ("loss_sampled", "loss_candidates", "kl_ref", "kl_old"):
        assert numbers[name] == pytest.approx(expected.metrics[name].item(), abs=1e-4)
    assert min(expected.metrics["entropy"], expected.metrics["kl_ref"]) > 0.01  # the terms say something


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_log_probs_know_temperature_bias_soft_cap_and_scale(policy, temperature):
    model, logits_NV = policy(temperature)
    answers = two_prompts().answers
    logp_NV = (logits_NV / temperature).log_softmax(-1)
    expected_N = logp_NV.gather(1, TARGETS[:, None])[:, 0]
    for got_N in (model.logprobs(answers), old_policy(model, PAPER, answers).logprobs_N):
        torch.testing.assert_close(got_N, expected_N, rtol=0, atol=1e-4)


def test_a_pair_weighs_as_its_winner(tiny_model):
    """Twice the weight of the answers 0, 2, 4; beta (Q_w - Q_l) by hand from the log-probs."""
    model, answers = LanguageModel(tiny_model(1)), two_prompts().answers
    weights_B, ref_N = torch.tensor([0.5, 9.0, 0.25, 9.0, 0.0, 9.0]), torch.full((len(TARGETS),), -2.0)
    loss = backward_reward_loss(model, Dpo(beta=0.1), answers, ref_N, torch.zeros(6), weights_B)
    q_N = model.logprobs(answers) - ref_N
    q_B = torch.stack([part.sum() for part in q_N.split(CU.diff().tolist())])
    losses_P = torch.nn.functional.softplus(-0.1 * (q_B[::2] - q_B[1::2]))
    assert loss == pytest.approx((losses_P * torch.tensor([1.0, 0.5, 0.0])).sum().item(), rel=1e-5)


def test_the_reward_model_learns_in_training_mode_and_scores_in_evaluation_mode(tiny_model, monkeypatch):
    batch, model, modes = two_prompts(), LanguageModel(tiny_model(1)), []
    old = old_policy(LanguageModel(tiny_model(2)), PAPER, batch.answers)

    def learn(model, *_):
        modes.append(("learn", model.training, model.model.training))
        return 0.0

    def score(model, answers, ids_NS, against_NS, beta):
        modes.append(("score", model.training, model.model.training))
        return against_NS

    monkeypatch.setattr(reward_update, "backward_reward_loss", learn)
    monkeypatch.setattr(LanguageModel, "td_errors", score)
    monkeypatch.setattr(reward_update, "apply_step", lambda *_: 0.0)
    settings = RlRewardModel(name="x", batch=6)
    for _ in range(2):  # each finds the model as the other left it
        update_reward_model(model, None, Ipvrm(), settings, PAPER, batch, old, old.logprobs_N, 1, 1)
        assign(PAPER, batch, old, model, Ipvrm())
    assert modes == [("learn", True, True), ("score", False, False)] * 2


@pytest.mark.parametrize(
    ("update", "order"),
    [
        ("none", ["collect", "rest", "old_policy", "correct", "assign", "update_policy", "sync"]),
        (
            "before",
            ["collect", "rest", "old_policy", "correct", "update_reward_model", "assign", "update_policy", "sync"],
        ),
        (
            "after",
            ["collect", "rest", "old_policy", "correct", "assign", "update_policy", "update_reward_model", "sync"],
        ),
        ("none", ["take", "old_policy", "correct", "assign", "update_policy", "wait", "sync"]),
    ],
    ids=["none", "before", "after", "ahead"],
)
def test_the_order_of_a_step(tiny_config, monkeypatch, update, order):
    """Whoever samples rests while models learn and hears of every update; the reward model learns when it is said. Who
    samples the next batch meanwhile does not rest, and hears of the update when it is done.
    """
    done, batch = [], two_prompts()
    old = SimpleNamespace(logprobs_N=None, cu_seqlens=None)
    results = {"collect": batch, "old_policy": old, "correct": (None, {}), "assign": batch}
    for name in ("collect", "old_policy", "correct", "assign", "update_policy", "update_reward_model"):
        result = results.get(name, {})
        monkeypatch.setattr(step_module, name, lambda *_, name=name, result=result: done.append(name) or result)
    rl = tiny_config(rl={"x": {}}).rl["x"].model_copy(update={"reward_model": RlRewardModel(name="r", update=update)})
    policy = object()
    sampler = SimpleNamespace(
        rest=lambda: done.append("rest"), sync=lambda given: done.append("sync") if given is policy else None
    )
    learner = Learner("x", rl, rl.resolved(), policy, sampler, {"policy": None, "reward_model": None}, object())
    if "take" in order:
        learner.ahead = SimpleNamespace(take=lambda *_: done.append("take") or batch, wait=lambda: done.append("wait"))
    experiment = SimpleNamespace(seed=lambda *_: None, device="cpu")
    _, numbers = rl_step(experiment, learner, 1, 0, lambda *_, **__: None)
    assert done == order
    assert numbers["staleness"] == 0
    parts = {"sampling", "log_probs", "credit", "policy", "sync", *["reward_model"] * ("update_reward_model" in done)}
    assert {name for name in numbers if name.startswith("seconds")} == {f"seconds_{part}" for part in parts}


def test_the_seconds_of_a_part_add_up(monkeypatch):
    times = iter([10.0, 12.0, 12.5, 13.5])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(times))
    measured = clock.Clock()
    for part in ("a", "b", "a"):
        measured.read(part)
    assert measured.seconds == {"seconds_a": 3.0, "seconds_b": 0.5}


@pytest.mark.parametrize(
    ("seed", "seeded", "stream"), [(None, ("rl", "x", 4), "rl"), (0, ("rl", 0, 4), "rl 0"), (7, ("rl", 7, 4), "rl 7")]
)
def test_runs_of_one_seed_draw_the_same_whatever_their_names(tiny_config, monkeypatch, seed, seeded, stream):
    told, nothing = [], replace(two_prompts(), answers=[])
    monkeypatch.setattr(step_module, "collect", lambda *given: told.append(given[-1]) or nothing)
    rl = tiny_config(rl={"x": {"seed": seed}}).rl["x"]
    learner = Learner("x", rl, rl.resolved(), None, None, {})
    rl_step(SimpleNamespace(seed=lambda *given: told.append(given)), learner, 4, 0, None)
    assert told == [seeded, stream]
