"""The credit that goes into TRL's batch is that of the library's definitions on full logits."""

from dataclasses import replace

import pytest
import torch

import ipvrm_core as ic
from ipvrm_core.integrations.trl import DistRL
from ipvrm_core.integrations.trl.passes import Batch
from ipvrm_core.objectives import RewardBatch
from ipvrm_core.sequences.advantages import masked_step_advantages, prime_advantages
from tests.integrations.trl import cases

GROUPS = torch.arange(8) // 4


@torch.no_grad()
def rows(trainer, model, batch: Batch) -> torch.Tensor:
    """The logits that predict the tokens, one sequence at a time, without padding: [N, V], float64."""
    found, T = [], batch.mask_BT.shape[1]
    for b in range(len(batch.ids_BL)):
        kept = batch.attention_BL[b].bool()
        logits = torch.zeros(batch.ids_BL.shape[1], model.config.vocab_size, dtype=torch.float64)
        logits[kept] = model(batch.ids_BL[b][kept][None]).logits[0].double()
        found.append(logits[-T - 1 : -1][batch.mask_BT[b]])
    return torch.cat(found)


def outcomes(out, trainer) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards, and TRL's own advantages of them: (r - mean) / (std + 1e-4) of the group."""
    rewards = trainer.distrl_rewards.sum(1).double()
    of_group = rewards.view(2, 4)
    advantages = (of_group - of_group.mean(1, keepdim=True)) / (of_group.std(1, keepdim=True) + 1e-4)
    assert advantages.abs().max() > 0.5
    return rewards, advantages.flatten()


@pytest.mark.parametrize("distrl", [{}, {"skip_last_token": True, "candidate_baseline": "mean", "keep_sampled": True}])
@pytest.mark.parametrize("rollouts", [{}, {"rollout_func": cases.rollouts}], ids=["generated", "tools"])
def test_token_advantages_and_candidates(build, distrl, rollouts):
    trainer = build({"temperature": 0.8}, {"process_coef": 0.7, **distrl}, **rollouts)
    policy, reward_model = trainer.model, trainer.reward_model.asked.model
    out = cases.generated(trainer)
    batch, d = Batch.of(out), trainer.distrl
    _, outcome = outcomes(out, trainer)
    how = {"temperature": 0.8, "backend": "reference"}
    last = torch.zeros(len(batch.tokens_N), dtype=torch.bool)
    last[batch.cu_seqlens[1:] - 1] = d.skip_last_token
    old = ic.select_candidates_from_logits(
        rows(trainer, policy, batch), batch.tokens_N, **d.candidate_rule(), exclude=last, **how
    )
    delta = ic.td_errors_from_logits(
        rows(trainer, reward_model, batch), old.ids_NS, old.logprobs_NS, trainer.objective.beta, **how
    )
    given = old.ids_NS, old.logprobs_NS, torch.zeros(8), batch.cu_seqlens, GROUPS
    method = replace(d, **distrl)
    expected = ic.distrl_advantages(delta, *given, replace_outcome(method))
    expected[:, 0] += torch.repeat_interleave(outcome, batch.mask_BT.sum(1))
    ids, logprobs, advantages = (torch.cat(column) for column in zip(*out["distrl"], strict=True))
    S = ids.shape[1]
    assert S > 2
    assert ids.equal(old.ids_NS[:, :S])
    assert (old.ids_NS[:, S:] == -1).all()
    torch.testing.assert_close(logprobs.double(), old.logprobs_NS[:, :S], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(advantages.double(), expected[:, :S], rtol=1e-3, atol=1e-4)
    assert out["advantages"][batch.mask_BT].equal(advantages[:, 0])
    assert (out["advantages"][~batch.mask_BT] == 0).all()


def replace_outcome(method: DistRL) -> ic.Method:
    """The same switches with an outcome that adds nothing."""
    names = ic.Method.__dataclass_fields__
    return ic.Method(**{name: getattr(method, name) for name in names if name != "outcome"}, outcome="reinforce")


def test_prime(build, models):
    """Token rewards against the start, leave-one-out and whitened with the outcome."""
    d = {"objective": "prime", "estimator": "prime", "alpha": 0.0, "td_reference": "sft"}
    start = cases.model_of(models, "reward")
    trainer = build({}, d, policy="tied", reward_model="tied", reference_model=start, rollout_func=cases.rollouts)
    with torch.no_grad():
        trainer.reward_model.asked.model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    out = cases.generated(trainer)
    batch = Batch.of(out)
    logp = [
        rows(trainer, model, batch).log_softmax(-1).gather(1, batch.tokens_N[:, None])[:, 0]
        for model in (trainer.reward_model.asked.model, start)
    ]
    rewards, _ = outcomes(out, trainer)
    expected = prime_advantages(0.05 * (logp[0] - logp[1]), rewards, batch.cu_seqlens, GROUPS)
    torch.testing.assert_close(out["advantages"][batch.mask_BT].double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reference", ["given", "trl", "adapters"])
def test_spro_needs_no_reward_model(build, models, reference):
    """The policy's log-ratio to its start stands for token rewards; the start is given, TRL's, or the base model."""
    more, policy, config = {}, "tied", {}
    if reference == "given":
        more = {"reference_model": cases.model_of(models, "reward")}
    if reference == "trl":
        config = {"beta": 0.01}
    if reference == "adapters":
        policy = cases.lora(cases.model_of(models, "tied"))
    d = {"estimator": "msa", "alpha": 0.0}
    trainer = build(config, d, policy=policy, reward_model=None, rollout_func=cases.rollouts, **more)
    if reference == "trl":
        with torch.no_grad():  # it has trained
            trainer.model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    out = cases.generated(trainer)
    batch = Batch.of(out)
    start = cases.model_of(models, "reward" if reference == "given" else "tied")
    logp = [
        rows(trainer, model, batch).log_softmax(-1).gather(1, batch.tokens_N[:, None])[:, 0]
        for model in (trainer.model.eval(), start)
    ]
    _, outcome = outcomes(out, trainer)
    process = masked_step_advantages(logp[0] - logp[1], batch.cu_seqlens, GROUPS)
    assert process.abs().max() > 1e-2
    expected = torch.repeat_interleave(outcome, batch.mask_BT.sum(1)) + process
    torch.testing.assert_close(out["advantages"][batch.mask_BT].double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("objective", "reference"), [("ipvrm", "old"), ("implicit_prm", "old"), ("prime", "sft"), ("repirl", "sft")]
)
def test_the_reward_model_learns_its_objective(build, models, objective, reference):
    """The gradient of one step is that of the objective on full logits, whatever the micro-batches."""
    d = {"objective": objective, "online": "after", "learning_rate": 1e-3, "right_above": 0.6}
    start = cases.model_of(models, "untied")
    trainer = build(
        {"per_device_train_batch_size": 2, "steps_per_generation": 4},
        {**d, "online_reference": reference},
        rollout_func=cases.rollouts,
        reference_model=start,
    )
    model, seen = trainer.reward_model.asked.model, {}
    trainer.args.max_grad_norm = 0
    trainer.reward_model.optimizer.register_step_pre_hook(
        lambda *_: seen.update({name: p.grad.clone() for name, p in model.named_parameters()})
    )
    before = cases.weights(model)
    out = cases.generated(trainer)
    assert cases.largest_difference(before, cases.weights(model)) > 1e-4
    model.load_state_dict(before, strict=False)

    batch = Batch.of(out)
    labels = (trainer.distrl_rewards.sum(1) > 0.6).float()
    assert 0 < labels.sum() < 8
    mu = labels.view(2, 4).mean(1).repeat_interleave(4)
    weights = torch.ones(8) / 8
    if trainer.objective.dynamic_weights:
        weights = weights * ic.dynamic_loss_weights(labels, mu)
    boundary = ic.difficulty_boundary(mu) if trainer.objective.boundary else None
    logits = model.eval()(batch.ids_BL, attention_mask=batch.attention_BL).logits
    T = batch.mask_BT.shape[1]
    logp = logits[:, -T - 1 : -1][batch.mask_BT].log_softmax(-1).gather(1, batch.tokens_N[:, None])[:, 0]
    old = torch.cat([logprobs[:, 0] for _, logprobs, _ in out["distrl"]])
    against = old
    if reference == "sft":
        against = rows(trainer, start, batch).log_softmax(-1).gather(1, batch.tokens_N[:, None])[:, 0].float()
    if trainer.objective.reweighs:
        weights = trainer.objective.reweigh(logp - against, old, batch.cu_seqlens, labels, weights)
    rm_batch = RewardBatch(batch.cu_seqlens, labels, weights, boundary)
    trainer.objective.loss(logp - against, rm_batch).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_an_answer_without_a_reward_teaches_nothing(build):
    """TRL takes None for "not judged"; its weight is 0 and the others are those of the group without it."""
    d = {"online": "before", "right_above": 0.5}

    def some(completions, **_):
        return [None if i % 4 == 1 else float(i % 4 == 0) for i in range(len(completions))]

    trainer = build({}, d, reward_funcs=some, rollout_func=cases.rollouts)
    cases.generated(trainer)
    labels, weights, boundary = trainer.reward_model._labels(trainer._distrl_judged(8))
    assert labels.tolist() == [1, 0, 0, 0] * 2
    assert weights.tolist() == pytest.approx([2 / 3 / 6, 0, 1 / 3 / 6, 1 / 3 / 6] * 2)
    assert boundary.tolist() == pytest.approx([torch.tensor(1 / 3).logit().item()] * 8, rel=1e-5)
