"""Every objective in the trainer: what a configuration may combine, all phases, and one new file."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from ipvrm_core import METHODS, objectives
from ipvrm_core.trainer.config import ConfigError, check
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.models import load_pretrained
from ipvrm_core.trainer.phases import evaluate, rl, rollout, sft, train_rm
from ipvrm_core.trainer.rl import step
from tests.tiny_runs import BASE, BATCH

PAPER = METHODS["paper"]


# ---- what a configuration may combine


def configured(
    objective: str | None = "ipvrm", rm: dict | None = None, update="none", batch: dict | None = None, **method
):
    policy = {"steps": 2, "minibatch": 12, "optim": {"lr": 1e-3}, "method": method, "batch": {**BATCH, **(batch or {})}}
    if objective:
        policy["reward_model"] = {"name": "y", "update": update, "batch": 12, "optim": {"lr": 1e-3}}
    rm = {"objective": objective or "ipvrm", "steps": 20, "batch": 16, "optim": {"lr": 1e-3}, **(rm or {})}
    return check({**BASE, "rm": {"y": rm}, "rl": {"x": policy}})


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
        ({"objective": "qrm", "alpha": 0.0, "td_reference": "sft"}, ["rl.x.method.td_reference", "'qrm'", "got 'sft'"]),
        ({"objective": "endorm", "td_reference": "sft"}, ["rl.x.method.td_reference", "'endorm'"]),
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
        (
            {"batch": {"accuracy_range": [0.8, 0.2]}},
            ["must be [low, high] with 0 <= low <= high", "[0.8, 0.2]"],
        ),
        ({"batch": {"accuracy_range": [0.2, 1.2]}}, ["accuracy_range must be [low, high]", "[0.2, 1.2]"]),
        ({"batch": {"accuracy_range": [0.2, 0.3, 0.8]}}, ["rl.x.batch.accuracy_range"]),
        (
            {"batch": {"accuracy_range": [0.3, 0.4], "rollouts": 4}},
            ["shares 1/4 .. 3/4", "rollouts = 4", "[0.3, 0.4]"],
        ),
        ({"batch": {"accuracy_range": [1.0, 1.0]}}, ["one of the shares 1/6 .. 5/6", "[1.0, 1.0]"]),
        (
            {"batch": {"accuracy_range": [0.2, 0.8], "too_few_mixed": "fill"}},
            ["rl.x", "batch.too_few_mixed must be 'sample_on'", "got 'fill'"],
        ),
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
        {"objective": "prime", "update": "before", "online_reference": "sft", "td_reference": "sft"},
        {"objective": "repirl", "update": "after", "outcome": "rloo", "rm": {"experts": 3, "args": {"length": "sum"}}},
        {"objective": "repirl", "rm": {"args": {"head": "value"}}, "alpha": 0.0},
        {"objective": None, "estimator": "msa"},
        {"objective": None, "outcome": "reinforce", "estimator": "none"},
        {"objective": "ipvrm", "estimator": "mc", "gamma": 0.9},
        {"objective": "repirl", "batch": {"accuracy_range": [0.2, 0.8]}},
        {"batch": {"accuracy_range": [0, 1], "too_few_mixed": "fill"}},
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
    assert (model.value_head is not None) == (built.head == "value")
    assert train_rm.validate(experiment, model, groups, built)["held_out_auc"] > 0.75
    assert len(metrics(experiment, "rm/y")) == 40


@pytest.mark.slow
def test_the_training_free_reward_model_is_the_start(through, start):
    experiment = through(configured("endorm"))
    own = experiment.load(experiment.run / "rm/y/model").model.state_dict()
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
        {"objective": "prime", "update": "before", "estimator": "prime", "outcome": "rloo", "td_reference": "sft"},
        {"objective": "repirl", "update": "before", "outcome": "rloo", "process_coef": 0.1, "online_reference": "sft"},
        {"objective": "repirl", "update": "after", "rm": {"args": {"head": "value"}}, "alpha": 0.0},
        {"objective": None, "estimator": "msa"},
    ],
    ids=lambda arguments: f"{arguments['objective']}-{arguments.get('estimator', 'gae')}",
)
def test_every_reward_model_under_a_policy(through, arguments):
    """Two steps of RL, then the evaluation: the grid of reward models and estimators."""
    experiment = through(configured(**arguments))
    rl.run(experiment, "x")
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

    def record(model, objective, *given):
        seen.append(given)
        return real(model, objective, *given)

    monkeypatch.setattr(train_rm, "backward_reward_loss", record)
    experiment = through(configured("repirl", {"experts": 3, "steps": 2}))
    start = experiment.start_policy().eval()
    for answers, ref_N, labels_B, weights_B in seen:
        assert len(answers) == 16 + 3
        assert labels_B.tolist() == [1.0, 0.0] * 8 + [1.0] * 3
        assert torch.equal(weights_B, torch.full((19,), 1 / 19))
        torch.testing.assert_close(start.logprobs(answers), ref_N, rtol=0, atol=1e-4)
    assert seen[0][0][16:] != seen[1][0][16:]
    demonstrations = [experiment.text.demonstration(example) for example in experiment.examples("rm experts", 0, 6)]
    assert seen[0][0][16:] + seen[1][0][16:] == demonstrations


@pytest.mark.slow
def test_online_weights_are_of_the_old_policy_whatever_the_reference(through, monkeypatch):
    seen, real = [], step.update_reward_model

    def record(*arguments):
        seen.append((arguments[6].logprobs_N, arguments[7]))
        return real(*arguments)

    monkeypatch.setattr(step, "update_reward_model", record)
    rl.run(through(configured("repirl", update="before", online_reference="sft")), "x")
    assert torch.allclose(*seen[0], atol=1e-5)  # the first step starts at the reference
    assert not torch.allclose(*seen[1], atol=1e-5)


# ---- a new objective is one new file (CONTRIBUTING.md)


DUMMY = '''
"""A hinge on the mean score, for the test of the recipe in CONTRIBUTING.md."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ipvrm_core.objectives.base import Objective, RewardBatch
from ipvrm_core.sequences.reward_losses import repirl_loss


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
    rl.run(experiment, "x")
    assert all("rm_loss" in line for line in metrics(experiment, "rl/x"))
    evaluate.run(experiment)
    assert (experiment.run / "eval/rm-y.json").exists()


def test_the_file_is_gone_afterwards():
    assert "hinge" not in objectives.names()
