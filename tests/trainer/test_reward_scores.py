"""Token scores of every reward model in the trainer: value heads, losses over a whole step, evaluation."""

from dataclasses import replace

import pytest
import torch

from ipvrm_core import METHODS
from ipvrm_core.objectives.endorm import Endorm
from ipvrm_core.objectives.implicit_prm import ImplicitPrm
from ipvrm_core.objectives.ipvrm import Ipvrm
from ipvrm_core.objectives.prime import Prime
from ipvrm_core.objectives.qrm import Qrm
from ipvrm_core.objectives.repirl import Repirl
from ipvrm_core.sequences.reward_losses import qrm_loss, repirl_weights
from ipvrm_core.trainer import checkpoint
from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.config import Lora, RlRewardModel
from ipvrm_core.trainer.data.tasks import ChainTask
from ipvrm_core.trainer.evaluation.reward_model.step_scores import score_traces
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.models import add_lora, character_tokenizer, load_pretrained, save_model
from ipvrm_core.trainer.phases import rollout, train_rm
from ipvrm_core.trainer.reward import auc, backward_reward_loss, scores
from ipvrm_core.trainer.rl import reward_update
from ipvrm_core.trainer.rl.collect import Collected
from ipvrm_core.trainer.rl.old_policy import old_policy
from tests.batches import CU, LENGTHS, two_prompts, with_value_head

PAPER = METHODS["paper"]
TOKENIZER = character_tokenizer(ChainTask.alphabet)


@pytest.fixture
def batch() -> Collected:
    return two_prompts()


@pytest.fixture
def lm(tiny_model):
    """make(number, value_head, **settings) -> LanguageModel of `tiny_model(number)`."""

    def make(number: int = 1, value_head: bool = False, **settings) -> LanguageModel:
        model = tiny_model(number)
        return LanguageModel(with_value_head(model) if value_head else model, **settings)

    return make


# ---- the value head


def test_the_score_of_each_kind(lm, batch):
    model = lm(value_head=True)
    own, reference = model.logprobs(batch.answers), torch.randn(sum(LENGTHS))
    assert torch.equal(scores(model, Ipvrm(), batch.answers, reference), own - reference)
    assert torch.equal(scores(model, Endorm(), batch.answers), own)
    assert torch.equal(scores(model, Endorm(), batch.answers, reference), own)
    values = scores(model, Repirl(head="value"), batch.answers, reference)
    assert torch.equal(values, scores(model, Qrm(), batch.answers))
    assert torch.equal(values, model.values(batch.answers))


@pytest.mark.parametrize("lora", [False, True])
def test_a_value_head_is_trained_saved_and_loaded(tiny_model, batch, tmp_path, lora):
    def values(model):
        return scores(LanguageModel(model), Qrm(), batch.answers)

    model = tiny_model(1)
    if lora:
        model = add_lora(model, Lora(rank=2, alpha=4.0))
    with_value_head(model)
    trained = checkpoint.trainable(model)
    assert sum("value_head" in name for name in trained) == 2
    assert not any("lora" in name and "value_head" in name for name in trained)
    before = values(model)
    save_model(model, TOKENIZER, tmp_path / "model")
    loaded = load_pretrained(tmp_path / "model")
    torch.testing.assert_close(values(loaded), before, rtol=0, atol=1e-5)
    again = add_lora(loaded, Lora(rank=2, alpha=4.0))  # the online update: adapters on a model that has a value head
    trained = checkpoint.trainable(again)
    assert sum("value_head" in name for name in trained) == 2
    assert not any("lora" in name and "value_head" in name for name in trained)
    torch.testing.assert_close(values(again), before, rtol=0, atol=1e-5)


def test_a_model_without_a_value_head_is_saved_as_before(tiny_model, tmp_path):
    save_model(tiny_model(), TOKENIZER, tmp_path / "model")
    assert not (tmp_path / "model/value_head.safetensors").exists()
    assert not hasattr(load_pretrained(tmp_path / "model"), "value_head")


# ---- the loss


@pytest.mark.parametrize(
    "objective",
    [Qrm(), Prime(), Repirl(), Repirl(length="sum"), Repirl(head="value")],
    ids=lambda o: f"{o.name}-{o.head}",
)
@pytest.mark.parametrize("limit", [1, 40])
def test_reward_gradient_does_not_depend_on_micro_batches(lm, batch, objective, limit):
    """For rePIRL this says that the weights of failed answers share one normaliser over the whole step."""
    results = []
    for tokens in (10_000, limit):
        model = lm(value_head=objective.head == "value", max_tokens=tokens)
        reference_N = lm(2).logprobs(batch.answers)
        weights = torch.full((6,), 1 / 6)
        loss = backward_reward_loss(model, objective, batch.answers, reference_N, batch.rewards_B, weights)
        results.append((loss, [p.grad for p in model.parameters() if p.grad is not None]))
    (loss, grads), (other_loss, other_grads) = results
    assert other_loss == pytest.approx(loss, rel=1e-4)
    assert len(grads) == len(other_grads) > 5
    for grad, other in zip(grads, other_grads, strict=True):
        torch.testing.assert_close(
            other, grad, rtol=0, atol=2e-5 * grad.abs().max().item() + 1e-7
        )  # Q-RM: the bias cancels


def test_the_loss_sees_the_same_scores_as_everybody_else(lm, batch):
    """Of a value head: the state after each token, in training as in scoring. Pairs (0, 1), (2, 3), (4, 5)."""
    model = lm(value_head=True)
    score_N = scores(model, Qrm(), batch.answers)
    expected = qrm_loss(score_N, CU, torch.arange(6).view(3, 2)).mean().item()
    unused_N, weights_B = torch.zeros(sum(LENGTHS)), torch.full((6,), 1 / 6)
    loss = backward_reward_loss(model, Qrm(), batch.answers, unused_N, batch.rewards_B, weights_B)
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("given", [False, True])
def test_the_weights_of_repirl_are_of_the_policy_that_sampled(lm, batch, given):
    """The loss by its formula from scores and log-probs; without policy_logprobs_N the reference is that policy."""
    model, objective = lm(), Repirl(beta=0.5)
    reference_N, policy_N = lm(2).logprobs(batch.answers), lm(3).logprobs(batch.answers)
    reward_N = 0.5 * (model.logprobs(batch.answers) - reference_N)
    weights_B = repirl_weights(
        reward_N, policy_N if given else reference_N, CU, batch.rewards_B, torch.full((6,), 1 / 6)
    )
    means = torch.stack([piece.mean() for piece in reward_N.split(LENGTHS)])
    expected = (weights_B * means * (1 - 2 * batch.rewards_B)).sum().item()
    arguments = (batch.answers, reference_N, batch.rewards_B, torch.full((6,), 1 / 6), None)
    loss = backward_reward_loss(model, objective, *arguments, policy_N if given else None)
    assert loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("objective", "settings", "plain", "boundary"),
    [
        (Prime(), {}, True, False),
        (ImplicitPrm(), {}, False, False),
        (Ipvrm(), {}, False, True),
        (Ipvrm(), {"online_boundary": False}, False, False),
        (Ipvrm(), {"dlw_scale": "none"}, True, True),
    ],
)
def test_online_weights_and_boundary(lm, batch, monkeypatch, objective, settings, plain, boundary):
    """1/B for PRIME; 1 - mu and mu for those that take the dynamic weights; V(x) only for IPVRM; pi_old always."""
    method = replace(PAPER, **settings)
    seen = {}

    def record(model, objective, answers, ref_N, labels_B, weights_B, boundary_B, policy_N):
        seen.update(labels=labels_B, weights=weights_B, boundary=boundary_B, ref=ref_N, policy=policy_N)
        return 0.0

    monkeypatch.setattr(reward_update, "backward_reward_loss", record)
    monkeypatch.setattr(reward_update, "apply_step", lambda *_: 0.0)
    old = old_policy(model := lm(), PAPER, batch.answers)
    torch.manual_seed(0)
    given = method, batch, old, old.logprobs_N - 1
    reward_update.update_reward_model(model, None, objective, RlRewardModel(name="x"), *given, step=1, total=1)
    assert torch.equal(seen["policy"] - 1, seen["ref"])
    assert (seen["boundary"] is not None) == boundary
    weights = sorted((6 * seen["weights"]).tolist())
    expected = [1.0] * 6 if plain else [1 / 3] * 4 + [2 / 3] * 2
    assert weights == pytest.approx(expected)


# ---- evaluation


@pytest.mark.parametrize("objective", [Endorm(decay=0.8), Qrm(), Ipvrm()], ids=lambda o: o.name)
def test_steps_and_answers_are_scored_by_the_objective(tiny_experiment, lm, objective):
    """Step sums and the held-out AUC from token scores: discounted log-probs, values, log-ratios."""
    experiment, model, reference = tiny_experiment(), lm(value_head=True), lm(2)
    traces = experiment.task.labelled_traces(3, 4, "train")
    scored = score_traces(experiment, model, reference, traces, objective)

    def encode(text: str) -> list[int]:
        return experiment.text.tokenizer(text, add_special_tokens=False)["input_ids"]

    groups = []
    for trace, process in zip(traces, scored["process"], strict=True):
        answer = Answer(encode(trace.prompt), encode("".join(trace.steps)))
        ref_N = reference.logprobs([answer])
        token_N = scores(model, objective, [answer], ref_N)
        if objective.name == "endorm":
            token_N = token_N * 0.8 ** torch.arange(len(token_N))
        expected = [piece.sum().item() for piece in token_N.split([len(step) for step in trace.steps])]
        assert process == pytest.approx(expected, abs=1e-3)
        right = len(groups) % 2 == 0
        groups.append((rollout.Rollouts(len(groups), [answer], [right], [ref_N.tolist()]), token_N, right))
    numbers = train_rm.validate(experiment, model, [group for group, _, _ in groups], objective)
    labels = torch.tensor([right for _, _, right in groups])
    for name, statistic in (("held_out_auc", torch.mean), ("held_out_auc_sum", torch.sum)):
        expected = auc(torch.stack([statistic(token_N) for _, token_N, _ in groups]), labels)
        assert numbers[name] == pytest.approx(expected)
