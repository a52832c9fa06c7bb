"""Every reward model in the trainer: value heads, weights of a whole step, estimators, and one new file."""

import json
import shutil
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from ipvrm_core import PRESETS, objectives
from ipvrm_core.objectives.endorm import Endorm
from ipvrm_core.objectives.implicit_prm import ImplicitPrm
from ipvrm_core.objectives.ipvrm import Ipvrm
from ipvrm_core.objectives.prime import Prime
from ipvrm_core.objectives.qrm import Qrm
from ipvrm_core.objectives.repirl import Repirl
from ipvrm_core.reference.advantages import (
    masked_step_advantages,
    outcome_advantages,
    prime_advantages,
    rloo_advantages,
)
from ipvrm_core.reference.reward_losses import qrm_loss, repirl_weights
from ipvrm_core.reference.segments import expand
from ipvrm_core.trainer import checkpoint
from ipvrm_core.trainer import credit as crediting
from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.collect import Collected
from ipvrm_core.trainer.config import ConfigError, Lora, RlRewardModel, check
from ipvrm_core.trainer.credit import assign, old_policy, update_reward_model
from ipvrm_core.trainer.evaluation.step_scores import score_traces
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.models import add_lora, add_value_head, load_pretrained, save_model
from ipvrm_core.trainer.phases import distrl, evaluate, rollout, sft, train_rm
from ipvrm_core.trainer.policy_update import make_policy_batch
from ipvrm_core.trainer.reward import auc, backward_reward_loss, sampled_logprobs, scores

PAPER = PRESETS["paper"]
LENGTHS = [4, 7, 2, 5, 10, 3]
CU = torch.tensor([0, *LENGTHS]).cumsum(0)


@pytest.fixture
def batch() -> Collected:
    """Two prompts, three answers each, of different lengths."""
    generator = torch.Generator().manual_seed(5)

    def ids(count: int) -> list[int]:
        return torch.randint(2, 19, (count,), generator=generator).tolist()

    prompts = [ids(4), ids(6)]
    answers = [Answer(prompts[i // 3], [*ids(length - 1), 1]) for i, length in enumerate(LENGTHS)]
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    means = torch.tensor([1 / 3] * 3 + [2 / 3] * 3)
    return Collected(answers, rewards, torch.tensor([0, 0, 0, 1, 1, 1]), means, 0, {})


def at_limit(make, limit: int) -> Experiment:
    """A run folder of its own for every micro-batch size."""
    first = make()
    config = first.config.model_copy(update={"micro_batch_tokens": limit})
    return Experiment(config, first.run.parent / f"limit-{limit}")


def with_value_head(model):
    head = add_value_head(model)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(9)))
        head.bias.fill_(0.3)
    return model


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


# ---- estimators


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
    settings = {"estimator": estimator, "gae_coef": 0.7, "gae_normalize": normalize, "outcome": "rloo", **discount}
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
    credit, delta = assigned(Prime(), estimator="prime", outcome="rloo", gae_coef=0.4, skip_last_token=skip)
    if skip:
        delta = delta.clone()
        delta[CU[1:] - 1] = 0.0
    expected = prime_advantages(delta, batch.rewards_B, CU, batch.groups_B, coef=0.4)
    torch.testing.assert_close(credit.advantages_N, expected, rtol=1e-4, atol=1e-4)
    assert credit.advantages_N.mean().abs() < 1e-5
    assert credit.advantages_N.std() == pytest.approx(1.0, abs=1e-4)


def test_masked_step_advantages_of_a_reward_model(assigned, batch):
    credit, delta = assigned(Ipvrm(), estimator="msa", gae_coef=0.3)
    outcome = expand(outcome_advantages(batch.rewards_B, batch.groups_B), CU, len(delta))
    expected = outcome + 0.3 * masked_step_advantages(delta, CU, batch.groups_B)
    torch.testing.assert_close(credit.advantages_N, expected, rtol=1e-4, atol=1e-4)


def test_spro_takes_the_policy_against_the_start(assigned, batch):
    ref_N = -torch.rand(sum(LENGTHS))
    credit, own = assigned(None, ref_N, estimator="msa", gae_coef=0.3)
    outcome = expand(outcome_advantages(batch.rewards_B, batch.groups_B), CU, len(own))
    expected = outcome + 0.3 * masked_step_advantages(own - ref_N, CU, batch.groups_B)
    torch.testing.assert_close(credit.advantages_N, expected, rtol=1e-5, atol=1e-5)
    assert credit.candidates is None


def test_credit_of_a_value_head(assigned, batch):
    """beta Z of the sampled tokens; nothing for the candidates, and a policy batch without them."""
    credit, delta = assigned(Qrm(beta=0.5), estimator="td", alpha=0.0, gae_coef=2.0)
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


# ---- what a configuration may combine


TASK = {"task": "chain", "task_args": {"min_ops": 1, "max_ops": 2}}
BASE = {
    "device": "cpu",
    "model": {"scratch": {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 2, "intermediate_size": 64}},
    "data": TASK,
    "test": TASK,
    "verifier": {"kind": "exact"},
    "generation": {"max_new_tokens": 16},
    "sft": {"steps": 60, "batch": 32, "optim": {"lr": 1e-2, "warmup": 5}},
    "rollout": {"prompts": 24, "samples": 8, "held_out": 8, "batch": 24},
    "eval": {"prompts": 8, "samples": 2, "traces": 30},
}
METHOD = {"prompts": 12, "keep_prompts": 4, "rollouts": 6}


def configured(objective: str | None = "ipvrm", rm: dict | None = None, update: str = "none", **method):
    rl = {"steps": 2, "minibatch": 12, "optim": {"lr": 1e-3}, "method": {**METHOD, **method}}
    if objective:
        rl["reward_model"] = {"name": "y", "update": update, "batch": 12, "optim": {"lr": 1e-3}}
    rm = {"objective": objective or "ipvrm", "steps": 20, "batch": 16, "optim": {"lr": 1e-3}, **(rm or {})}
    return check({**BASE, "rm": {"y": rm}, "rl": {"x": rl}})


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"objective": "qrm"}, ["rl.x.method.alpha must be 0", "rm.y", "'qrm'", "got 0.1"]),
        ({"objective": "repirl", "rm": {"args": {"head": "value"}}}, ["rl.x.method.alpha must be 0", "'repirl'"]),
        ({"objective": "qrm", "alpha": 0.0, "update": "before"}, ["update must be 'none'", "pairwise", "got 'before'"]),
        ({"objective": "endorm", "update": "after"}, ["update must be 'none'", "training-free", "got 'after'"]),
        ({"objective": "endorm", "rm": {"args": {"decay": 1.5}}}, ["decay must be in (0, 1]", "1.5"]),
        ({"objective": "endorm", "rm": {"experts": 4}}, ["experts must be 0", "training-free", "got 4"]),
        ({"objective": "dpo", "rm": {"experts": 4}}, ["experts must be 0", "pairwise", "got 4"]),
        ({"objective": "repirl", "rm": {"args": {"length": "max"}}}, ["args.length", "'max'"]),
        ({"objective": None, "estimator": "td"}, ["estimator = 'td' needs a reward_model", "got None"]),
        ({"objective": None, "estimator": "mc"}, ["estimator = 'mc' needs a reward_model"]),
        ({"objective": None, "estimator": "prime", "outcome": "rloo"}, ["'prime' needs a reward_model"]),
        ({"estimator": "prime"}, ["method.outcome must be 'rloo'", "'prime'", "got 'grpo'"]),
        ({"estimator": "td", "lam": 0.9}, ["method.lam must be 1", "'td'", "got 0.9"]),
        ({"estimator": "td", "gamma": 0.9}, ["method.gamma must be 1", "'td'", "got 0.9"]),
        ({"estimator": "mc", "lam": 0.9}, ["method.lam must be 1", "'mc'", "got 0.9"]),
        ({"estimator": "msa", "gamma": 0.9}, ["method.gamma must be 1", "'msa'"]),
        ({"estimator": "prime", "outcome": "rloo", "lam": 0.5}, ["method.lam must be 1", "'prime'"]),
        ({"estimator": "none", "lam": 0.5}, ["method.lam must be 1", "'none'"]),
        ({"estimator": "sarsa"}, ["method.estimator", "'sarsa'"]),
        ({"outcome": "ppo"}, ["method.outcome", "'ppo'"]),
    ],
)
def test_impossible_combinations(arguments, parts):
    with pytest.raises(ConfigError) as caught:
        configured(**arguments)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"objective": "qrm", "alpha": 0.0, "estimator": "td"},
        {"objective": "endorm", "gamma": 0.95},
        {"objective": "prime", "update": "before", "estimator": "prime", "outcome": "rloo", "alpha": 0.0},
        {"objective": "prime", "update": "before"},
        {"objective": "repirl", "update": "after", "outcome": "rloo", "rm": {"experts": 3, "args": {"length": "sum"}}},
        {"objective": "repirl", "rm": {"args": {"head": "value"}}, "alpha": 0.0},
        {"objective": None, "estimator": "msa"},
        {"objective": None, "outcome": "reinforce", "estimator": "none"},
        {"objective": "ipvrm", "estimator": "mc", "gamma": 0.9},
    ],
)
def test_possible_combinations_survive_json(arguments):
    config = configured(**arguments)
    assert check(json.loads(config.model_dump_json())) == config


def test_experts_need_demonstrations():
    source = {"path": "a.jsonl"}
    more = {"model": {"path": "m"}, "data": source, "test": source, "sft": None}
    with pytest.raises(ConfigError, match=r"rm\.<name>\.experts needs demonstrations"):
        check({**BASE, **more, "rm": {"y": {"objective": "repirl", "experts": 2}}})


def test_a_training_free_objective_has_one_step():
    assert configured("endorm").rm["y"].steps == 1


# ---- all the way through the phases


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A run folder with finished sft and rollout."""
    folder = tmp_path_factory.mktemp("start")
    experiment = Experiment(check(BASE), folder)
    sft.run(experiment)
    rollout.run(experiment)
    return folder


@pytest.fixture
def through(start, tmp_path):
    """through(config) -> Experiment with a trained reward model, from the shared start."""

    def run(config):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for phase in ("sft", "rollout"):
            shutil.copytree(start / phase, folder / phase)
        experiment = Experiment(config, folder)
        train_rm.run(experiment, "y")
        return experiment

    return run


def metrics(experiment: Experiment, phase: str) -> list[dict]:
    return [json.loads(line) for line in (experiment.run / phase / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "rm"),
    [
        ("ipvrm", {}),
        ("ipvrm", {"args": {"weighting": "early"}}),
        ("ipvrm", {"args": {"weighting": "late"}}),
        ("implicit_prm", {}),
        ("dpo", {}),
        ("qrm", {}),
        ("prime", {}),
        ("repirl", {}),
        ("repirl", {"experts": 4, "args": {"head": "value", "length": "sum", "expert_share": "experts"}}),
    ],
)
def test_every_objective_learns_to_rank(through, objective, rm):
    """On the training prompts themselves, where right answers must come to score higher."""
    config = configured(objective, {"steps": 40, **rm}, alpha=0.0)
    experiment = through(config)
    built = config.rm["y"].build()
    groups = [g for g in rollout.read(experiment.run / "rollout")[:16] if 0 < sum(g.correct) < len(g.correct)]
    model = experiment.load(experiment.run / "rm/y/model")
    assert hasattr(model, "value_head") == (built.head == "value")
    assert train_rm.validate(experiment, model, groups, built)["held_out_auc"] > 0.75
    assert len(metrics(experiment, "rm/y")) == 40


@pytest.mark.slow
def test_the_training_free_reward_model_is_the_start(through, start):
    experiment = through(configured("endorm"))
    own = experiment.load(experiment.run / "rm/y/model").state_dict()
    first = load_pretrained(start / "sft/model").state_dict()
    assert own.keys() == first.keys()
    assert all(torch.equal(own[name], first[name]) for name in own)
    (line,) = metrics(experiment, "rm/y")
    assert 0 <= line["held_out_auc"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        {"objective": "ipvrm", "update": "before", "estimator": "td"},
        {"objective": "implicit_prm", "update": "before", "outcome": "rloo", "estimator": "mc"},
        {"objective": "dpo"},
        {"objective": "qrm", "alpha": 0.0, "estimator": "td", "outcome": "reinforce"},
        {"objective": "endorm", "gamma": 0.95},
        {"objective": "prime", "update": "before", "estimator": "prime", "outcome": "rloo", "skip_last_token": True},
        {"objective": "repirl", "update": "before", "outcome": "rloo", "gae_coef": 0.1, "online_reference": "sft"},
        {"objective": "repirl", "update": "after", "rm": {"args": {"head": "value"}}, "alpha": 0.0},
        {"objective": None, "estimator": "msa"},
    ],
    ids=lambda arguments: f"{arguments['objective']}-{arguments.get('estimator', 'gae')}",
)
def test_every_reward_model_under_a_policy(through, arguments):
    """Two steps of RL, then the evaluation: the grid of reward models and estimators."""
    experiment = through(configured(**arguments))
    distrl.run(experiment, "x")
    lines = metrics(experiment, "rl/x")
    assert len(lines) == 2
    assert all(value == value for line in lines for value in line.values())
    assert all(("rm_loss" in line) == (arguments.get("update", "none") != "none") for line in lines)
    assert all(line["grad_norm"] > 0 for line in lines)
    wide = arguments["objective"] and arguments.get("alpha", PAPER.alpha) > 0
    assert all((line["loss_candidates"] != 0) == bool(wide) for line in lines)
    evaluate.run(experiment)
    result = json.loads((experiment.run / "eval/rm-y.json").read_text())
    assert all(0 <= cell["f1_oracle"] <= 1 for cell in result["localisation"].values())
    value = objectives.find(arguments["objective"] or "ipvrm").head == "value" or "args" in arguments.get("rm", {})
    credit = result["candidate_credit"]
    assert ("reward_model" in credit) == (not value)
    if arguments["objective"] == "endorm":  # log-probs of the start alone: it prefers what the start prefers
        assert credit["reward_model"] == credit["policy"]


@pytest.mark.slow
def test_demonstrations_join_every_step(through, monkeypatch):
    """Three more right answers a step, others in each step, with their log-probs under the start."""
    seen, real = [], train_rm.backward_reward_loss

    def record(experiment, model, objective, answers, ref_N, labels_B, weights_B):
        seen.append((answers, ref_N, labels_B, weights_B))
        return real(experiment, model, objective, answers, ref_N, labels_B, weights_B)

    monkeypatch.setattr(train_rm, "backward_reward_loss", record)
    experiment = through(configured("repirl", {"experts": 3, "steps": 2}))
    start = experiment.start_policy().eval()
    for answers, ref_N, labels_B, weights_B in seen:
        assert len(answers) == 16 + 3
        assert labels_B.tolist() == [1.0, 0.0] * 8 + [1.0] * 3
        assert torch.equal(weights_B, torch.full((19,), 1 / 19))
        torch.testing.assert_close(sampled_logprobs(experiment, start, answers), ref_N, rtol=0, atol=1e-4)
    assert seen[0][0][16:] != seen[1][0][16:]
    demonstrations = [experiment.demonstration(example) for example in experiment.examples("rm experts", 0, 6)]
    assert seen[0][0][16:] + seen[1][0][16:] == demonstrations


@pytest.mark.slow
def test_online_weights_are_of_the_old_policy_whatever_the_reference(through, monkeypatch):
    seen, real = [], distrl.update_reward_model

    def record(*arguments):
        seen.append((arguments[7], arguments[11]))
        return real(*arguments)

    monkeypatch.setattr(distrl, "update_reward_model", record)
    distrl.run(through(configured("repirl", update="before", online_reference="sft")), "x")
    assert torch.allclose(*seen[0], atol=1e-5)  # the first step starts at the reference
    assert not torch.allclose(*seen[1], atol=1e-5)


# ---- a new objective is one new file (CONTRIBUTING.md)


DUMMY = '''
"""A hinge on the mean score, for the test of the recipe in CONTRIBUTING.md."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ipvrm_core.objectives.base import Objective, RewardBatch
from ipvrm_core.ops.sequences import repirl_loss


@dataclass(frozen=True)
class Hinge(Objective):
    """sum_b w_b max(0, margin - s_b beta qbar_b)."""

    name: ClassVar[str] = "hinge"

    beta: float = 1.0
    margin: float = 0.5

    def loss(self, score_N: Tensor, batch: RewardBatch) -> Tensor:
        signed_B = repirl_loss(self.beta * score_N, batch.cu_seqlens, batch.labels_B)
        return (batch.weights_B * (self.margin + signed_B).clamp(min=0)).sum()
'''


@pytest.fixture
def hinge(tmp_path, monkeypatch):
    """The file lies in a folder that is part of ipvrm_core/objectives for the time of the test."""
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "hinge.py").write_text(DUMMY)
    monkeypatch.setattr(objectives, "__path__", [*objectives.__path__, str(folder)])
    yield
    sys.modules.pop("ipvrm_core.objectives.hinge", None)
    vars(objectives).pop("hinge", None)


@pytest.mark.slow
def test_one_new_file_is_enough(hinge, through):
    """Configured with its own setting, trained offline, updated online, scored, evaluated. Nothing else is touched."""
    with pytest.raises(ConfigError, match="margin"):
        configured("hinge", {"args": {"margin": "wide"}})
    config = configured("hinge", {"args": {"margin": 0.7}}, update="before")
    assert config.rm["y"].args == {"beta": 1.0, "margin": 0.7}
    experiment = through(config)
    first = metrics(experiment, "rm/y")[0]
    assert first["loss"] == pytest.approx(0.7, abs=1e-4)  # all scores are 0 at the start: the margin is what is left
    distrl.run(experiment, "x")
    assert all("rm_loss" in line for line in metrics(experiment, "rl/x"))
    evaluate.run(experiment)
    assert (experiment.run / "eval/rm-y.json").exists()


def test_the_file_is_gone_afterwards():
    assert "hinge" not in objectives.names()
