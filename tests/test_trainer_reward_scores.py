"""Token scores of every reward model in the trainer: value heads, losses over a whole step, evaluation."""

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
from ipvrm_core.trainer import credit as crediting
from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.config import Lora, RlRewardModel
from ipvrm_core.trainer.evaluation.step_scores import score_traces
from ipvrm_core.trainer.models import add_lora, load_pretrained, save_model
from ipvrm_core.trainer.phases import rollout, train_rm
from ipvrm_core.trainer.reward import auc, backward_reward_loss, sampled_logprobs, scores
from ipvrm_core.trainer.rl.collect import Collected
from ipvrm_core.trainer.rl.credit import old_policy, update_reward_model
from tests.batches import CU, LENGTHS, at_limit, two_prompts, with_value_head

PAPER = METHODS["paper"]


@pytest.fixture
def batch() -> Collected:
    return two_prompts()


# ---- the value head


def test_a_value_head_scores_the_state_after_each_token(tiny_experiment, tiny_model, batch):
    experiment, model = tiny_experiment(micro_batch_tokens=24), with_value_head(tiny_model(1))
    ours = scores(experiment, model, Qrm(), batch.answers)
    expected = []
    with torch.no_grad():
        for answer in batch.answers:
            ids = torch.tensor([answer.prompt_ids + answer.response_ids])
            hidden = model.get_decoder()(input_ids=ids).last_hidden_state[0, len(answer.prompt_ids) :]
            expected.append((hidden @ model.value_head.weight[0]) + model.value_head.bias)
    torch.testing.assert_close(ours, torch.cat(expected), rtol=0, atol=1e-4)


def test_the_score_of_each_kind(tiny_experiment, tiny_model, batch):
    experiment, model = tiny_experiment(), tiny_model(1)
    own, reference = sampled_logprobs(experiment, model, batch.answers), torch.randn(sum(LENGTHS))
    assert torch.equal(scores(experiment, model, Ipvrm(), batch.answers, reference), own - reference)
    assert torch.equal(scores(experiment, model, Endorm(), batch.answers), own)
    assert torch.equal(scores(experiment, model, Endorm(), batch.answers, reference), own)
    explicit = Repirl(head="value")
    values = scores(experiment, with_value_head(model), explicit, batch.answers, reference)
    assert torch.equal(values, scores(experiment, model, Qrm(), batch.answers))


@pytest.mark.parametrize("lora", [False, True])
def test_a_value_head_is_trained_saved_and_loaded(tiny_experiment, tiny_model, batch, tmp_path, lora):
    experiment, model = tiny_experiment(), tiny_model(1)
    if lora:
        model = add_lora(model, Lora(rank=2, alpha=4.0))
    with_value_head(model)
    trained = checkpoint.trainable(model)
    assert sum("value_head" in name for name in trained) == 2
    assert not any("lora" in name and "value_head" in name for name in trained)
    before = scores(experiment, model, Qrm(), batch.answers)
    save_model(model, experiment.tokenizer, tmp_path / "model")
    loaded = load_pretrained(tmp_path / "model")
    torch.testing.assert_close(scores(experiment, loaded, Qrm(), batch.answers), before, rtol=0, atol=1e-5)
    again = add_lora(loaded, Lora(rank=2, alpha=4.0))  # the online update: adapters on a model that has a value head
    trained = checkpoint.trainable(again)
    assert sum("value_head" in name for name in trained) == 2
    assert not any("lora" in name and "value_head" in name for name in trained)
    torch.testing.assert_close(scores(experiment, again, Qrm(), batch.answers), before, rtol=0, atol=1e-5)


def test_a_model_without_a_value_head_is_saved_as_before(tiny_experiment, tiny_model, tmp_path):
    save_model(tiny_model(), tiny_experiment().tokenizer, tmp_path / "model")
    assert not (tmp_path / "model/value_head.safetensors").exists()
    assert not hasattr(load_pretrained(tmp_path / "model"), "value_head")


# ---- the loss


@pytest.mark.parametrize(
    "objective",
    [Qrm(), Prime(), Repirl(), Repirl(length="sum"), Repirl(head="value")],
    ids=lambda o: f"{o.name}-{o.head}",
)
@pytest.mark.parametrize("limit", [1, 40])
def test_reward_gradient_does_not_depend_on_micro_batches(tiny_experiment, tiny_model, batch, objective, limit):
    """For rePIRL this says that the weights of failed answers share one normaliser over the whole step."""
    results = []
    for tokens in (10_000, limit):
        experiment = at_limit(tiny_experiment, tokens)
        model = tiny_model(1)
        if objective.head == "value":
            with_value_head(model)
        reference_N = sampled_logprobs(experiment, tiny_model(2), batch.answers)
        weights = torch.full((6,), 1 / 6)
        loss = backward_reward_loss(experiment, model, objective, batch.answers, reference_N, batch.rewards_B, weights)
        results.append((loss, [p.grad for p in model.parameters() if p.grad is not None]))
    (loss, grads), (other_loss, other_grads) = results
    assert other_loss == pytest.approx(loss, rel=1e-4)
    assert len(grads) == len(other_grads) > 5
    for grad, other in zip(grads, other_grads, strict=True):
        torch.testing.assert_close(
            other, grad, rtol=0, atol=2e-5 * grad.abs().max().item() + 1e-7
        )  # Q-RM: the bias cancels


def test_the_loss_sees_the_same_scores_as_everybody_else(tiny_experiment, tiny_model, batch):
    """Of a value head: the state after each token, in training as in scoring. Pairs (0, 1), (2, 3), (4, 5)."""
    experiment, model = tiny_experiment(), with_value_head(tiny_model(1))
    score_N = scores(experiment, model, Qrm(), batch.answers)
    expected = qrm_loss(score_N, CU, torch.arange(6).view(3, 2)).mean().item()
    unused_N, weights_B = torch.zeros(sum(LENGTHS)), torch.full((6,), 1 / 6)
    loss = backward_reward_loss(experiment, model, Qrm(), batch.answers, unused_N, batch.rewards_B, weights_B)
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("given", [False, True])
def test_the_weights_of_repirl_are_of_the_policy_that_sampled(tiny_experiment, tiny_model, batch, given):
    """The loss by its formula from scores and log-probs; without policy_logprobs_N the reference is that policy."""
    experiment, model, objective = tiny_experiment(), tiny_model(1), Repirl(beta=0.5)
    reference_N = sampled_logprobs(experiment, tiny_model(2), batch.answers)
    policy_N = sampled_logprobs(experiment, tiny_model(3), batch.answers)
    reward_N = 0.5 * (sampled_logprobs(experiment, model, batch.answers) - reference_N)
    weights_B = repirl_weights(
        reward_N, policy_N if given else reference_N, CU, batch.rewards_B, torch.full((6,), 1 / 6)
    )
    means = torch.stack([piece.mean() for piece in reward_N.split(LENGTHS)])
    expected = (weights_B * means * (1 - 2 * batch.rewards_B)).sum().item()
    arguments = (batch.answers, reference_N, batch.rewards_B, torch.full((6,), 1 / 6), None)
    loss = backward_reward_loss(experiment, model, objective, *arguments, policy_N if given else None)
    assert loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("objective", "plain", "boundary"), [(Prime(), True, False), (ImplicitPrm(), False, False), (Ipvrm(), False, True)]
)
def test_online_weights_and_boundary(tiny_experiment, tiny_model, batch, monkeypatch, objective, plain, boundary):
    """1/B for PRIME; 1 - mu and mu for those that take the dynamic weights; V(x) only for IPVRM; pi_old always."""
    seen = {}

    def record(experiment, model, objective, answers, ref_N, labels_B, weights_B, boundary_B, policy_N):
        seen.update(labels=labels_B, weights=weights_B, boundary=boundary_B, ref=ref_N, policy=policy_N)
        return 0.0

    monkeypatch.setattr(crediting, "backward_reward_loss", record)
    monkeypatch.setattr(crediting, "apply_step", lambda *_: 0.0)
    experiment, model = tiny_experiment(), tiny_model()
    old = old_policy(experiment, model, PAPER, batch)
    torch.manual_seed(0)
    update_reward_model(
        experiment,
        PAPER,
        RlRewardModel(name="x"),
        objective,
        model,
        None,
        batch,
        old.logprobs_N - 1,
        old.cu_seqlens,
        1,
        1,
        old.logprobs_N,
    )
    assert torch.equal(seen["policy"] - 1, seen["ref"])
    assert (seen["boundary"] is not None) == boundary
    weights = sorted((6 * seen["weights"]).tolist())
    expected = [1.0] * 6 if plain else [1 / 3] * 4 + [2 / 3] * 2
    assert weights == pytest.approx(expected)


# ---- evaluation


@pytest.mark.parametrize("objective", [Endorm(decay=0.8), Qrm(), Ipvrm()], ids=lambda o: o.name)
def test_steps_and_answers_are_scored_by_the_objective(tiny_experiment, tiny_model, objective):
    """Step sums and the held-out AUC from token scores: discounted log-probs, values, log-ratios."""
    experiment, model, reference = tiny_experiment(), with_value_head(tiny_model(1)), tiny_model(2)
    traces = experiment.task.labelled_traces(3, 4, "train")
    scored = score_traces(experiment, model, reference, traces, objective)

    def encode(text: str) -> list[int]:
        return experiment.tokenizer(text, add_special_tokens=False)["input_ids"]

    groups = []
    for trace, process in zip(traces, scored["process"], strict=True):
        answer = Answer(encode(trace.prompt), encode("".join(trace.steps)))
        ref_N = sampled_logprobs(experiment, reference, [answer])
        token_N = scores(experiment, model, objective, [answer], ref_N)
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
