"""The registry of estimators, what each one declares and computes, and one new file in a policy run."""

import sys
from dataclasses import replace

import pytest
import torch

from ipvrm_core import METHODS, estimators
from ipvrm_core.estimators import Estimator, TokenRewards

PLAIN = replace(METHODS["paper"], process_coef=0.5, gamma=0.5, lam=0.5)


def token_rewards() -> TokenRewards:
    """A right and a wrong answer to one prompt, two tokens each; the rewards have mean 0 and spread 1."""
    return TokenRewards(
        reward_N=torch.tensor([1.0, 1.0, -1.0, -1.0]),
        outcome_B=torch.tensor([1.0, -1.0]),
        rewards_B=torch.tensor([1.0, 0.0]),
        cu_seqlens=torch.tensor([0, 2, 4]),
        groups_B=torch.tensor([7, 7]),
        sigma=torch.tensor(2.0),
    )


def advantages(name: str, **settings) -> torch.Tensor:
    return estimators.find(name)().advantages(token_rewards(), replace(PLAIN, **settings))


def test_the_field_is_complete():
    assert estimators.names() == ["gae", "mc", "msa", "none", "prime", "td"]


@pytest.mark.parametrize("name", estimators.names())
def test_an_estimator_has_its_name_and_says_what_it_does(name):
    assert estimators.find(name).name == name
    assert estimators.find(name).__doc__.strip()


def test_what_the_estimators_state():
    """Declarations that the configuration and the trainer act on; each row is one estimator."""
    found = {name: estimators.find(name) for name in estimators.names()}
    every = ("grpo", "rloo", "reinforce")
    assert {name: (c.token_rewards, c.reads, c.outcomes) for name, c in found.items()} == {
        "gae": ("optional", ("gamma", "lam"), every),
        "mc": ("required", ("gamma",), every),
        "td": ("required", (), every),
        "msa": ("own", (), every),
        "none": ("optional", (), every),
        "prime": ("required", (), ("rloo",)),
    }


@pytest.mark.parametrize(
    ("name", "process"),
    [
        ("td", [1.0, 1.0]),
        ("mc", [1.0 + 0.5, 1.0]),
        ("gae", [1.0 + 0.25, 1.0]),
        ("msa", [1.0, 2.0]),  # running sums 1, 2 and -1, -2: their mean at every token is 0
        ("none", [0.0, 0.0]),
    ],
)
def test_known_answers(name, process):
    """A_t = outcome + process_t / 2; the wrong answer mirrors the right one."""
    right = [1 + 0.5 * value for value in process]
    expected = torch.tensor([*right, *(-value for value in right)])
    torch.testing.assert_close(advantages(name), expected, rtol=0, atol=1e-5)


def test_known_answer_of_prime():
    """r / 2, the largest suffix sum, is 0.5; leave-one-out of two answers doubles it, as the means 0.5, -0.5 cancel.

    Suffix sums 2, 1 with coefficient 1/2, and the RLOO outcome 1: 2, 1.5. Whitened by their std, sqrt(12.5 / 3).
    """
    expected = torch.tensor([2.0, 1.5, -2.0, -1.5]) / (12.5 / 3) ** 0.5
    torch.testing.assert_close(advantages("prime"), expected, rtol=0, atol=1e-5)


def test_normalised_over_the_batch_by_sigma_v():
    """delta / 2 = (.5, .5, -.5, -.5), whitened by sqrt(1/3)."""
    process = torch.tensor([0.5, 0.5, -0.5, -0.5]) / (1 / 3) ** 0.5
    expected = torch.tensor([1.0, 1.0, -1.0, -1.0]) + 0.5 * process
    torch.testing.assert_close(advantages("td", process_normalize="batch"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", estimators.names())
@pytest.mark.parametrize("setting", ["gamma", "lam"])
def test_an_estimator_reads_what_it_says(name, setting):
    same = torch.equal(advantages(name), advantages(name, **{setting: 0.9}))
    assert same == (setting not in estimators.find(name).reads)


# ---- the registry (tests/core/test_objectives.py has more of it)


class Elsewhere(Estimator):
    """An estimator of another package."""


def test_an_estimator_of_another_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "somebodys_package", sys.modules[__name__])
    assert estimators.find("somebodys_package:Elsewhere") is Elsewhere
    with pytest.raises(NotImplementedError):
        Elsewhere().advantages(token_rewards(), PLAIN)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sarsa", "estimator must be one of gae, .*td, or package.module:Class; got 'sarsa'"),
        ("no_such_package:Thing", "estimator 'no_such_package:Thing' cannot be imported: No module"),
        ("torch:Tensor", "estimator 'torch:Tensor' must be a class that derives from Estimator"),
    ],
)
def test_what_is_no_estimator(name, message, tiny_config):
    with pytest.raises(ValueError, match=message):
        estimators.find(name)
    with pytest.raises(ValueError, match=rf"rl\.x: .*method\.{message}"):
        tiny_config(rl={"x": {"method": {"estimator": name}}})


def test_a_file_that_python_cannot_read(tmp_path, monkeypatch):
    (tmp_path / "half_written.py").write_text("class Half(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"'half_written:Half' cannot be imported: .*half_written.py, line 1"):
        estimators.find("half_written:Half")


# ---- a new estimator is one new file


FILE = '''
from ipvrm_core.estimators import Estimator


class Raw(Estimator):
    """process_t = r_t."""

    name = "raw"
    token_rewards = "own"
    reads = ("gamma",)
    outcomes = ("rloo", "reinforce")
    seen = []

    def process(self, tokens, method):
        self.seen.append((tokens, method))
        return method.gamma * tokens.reward_N
'''


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """The file lies in a folder of its own that Python finds; what it is called in a configuration."""
    folder = tmp_path / "somebodys"
    folder.mkdir()
    (folder / "somebodys_estimators.py").write_text(FILE)
    monkeypatch.syspath_prepend(folder)
    yield "somebodys_estimators:Raw"
    sys.modules.pop("somebodys_estimators", None)


def test_the_configuration_heeds_what_the_file_declares(raw, tiny_config):
    def configured(**method):
        return tiny_config(rl={"x": {"method": {"estimator": raw, **method}}})

    with pytest.raises(ValueError, match=f"method.outcome must be 'rloo' or 'reinforce' for .* = '{raw}'; got 'grpo'"):
        configured()
    with pytest.raises(ValueError, match=f"method.lam must be 1 for method.estimator = '{raw}'"):
        configured(outcome="rloo", lam=0.5)
    assert configured(outcome="rloo", gamma=0.5).rl["x"].resolved().estimator == raw


def test_one_new_file_is_enough(raw, tiny_config, tmp_path, monkeypatch):
    """It makes the advantages of a policy run, of the policy's log-ratio to its start; a changed file is refused."""
    pytest.importorskip("transformers")
    from ipvrm_core.trainer.experiment import Experiment
    from ipvrm_core.trainer.phases import rl
    from ipvrm_core.trainer.rl import policy_update
    from ipvrm_core.trainer.sampling.verified import Asker
    from ipvrm_core.trainer.verify import Verdict

    def ask(asker, sampler, examples, drawing):
        made, _ = own(asker, sampler, examples, drawing)
        return made, [Verdict(index % 2 == 0, "ok") for index in range(len(made))]

    def keeping(*arguments):
        batches.append(make(*arguments))
        return batches[-1]

    own, make, batches = Asker.ask, policy_update.make_policy_batch, []
    monkeypatch.setattr(Asker, "ask", ask)
    monkeypatch.setattr(policy_update, "make_policy_batch", keeping)
    settings = {
        "steps": 2,
        "batch": {"prompts": 4, "keep_prompts": 2, "rollouts": 2},
        "method": {"estimator": raw, "outcome": "rloo", "gamma": 0.5, "process_coef": 3.0},
        "optim": {"lr": 1e-2},
    }
    config = tiny_config(rl={"x": settings})
    rl.run(Experiment(config, tmp_path / "run"), "x")

    (first, _), (second, method) = estimators.find(raw).seen
    assert method.gamma == 0.5
    assert first.reward_N.abs().max() < 1e-5  # the policy is its start
    assert second.reward_N.abs().max() > 1e-2
    outcome = second.outcome_B.repeat_interleave(second.cu_seqlens.diff())
    expected_N = outcome + 3.0 * 0.5 * second.reward_N
    given = batches[1].advantages_NS[:, 0].sort().values  # the rows of a minibatch are in another order
    torch.testing.assert_close(given, expected_N.sort().values)

    (tmp_path / "somebodys" / "somebodys_estimators.py").write_text(FILE.replace("method.gamma * ", ""))
    with pytest.raises(ValueError, match=r"other contents of rl\.x\.method\.estimator \(somebodys_estimators\.py\)"):
        Experiment(config, tmp_path / "run")
