"""The README's code and the scripts of examples/ run as they stand, and do what they say."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ipvrm_core as ic
from examples import logits, own_loop, own_loss
from examples.own_objective import Brier
from examples.own_reward import last_number
from ipvrm_core import estimators, objectives
from ipvrm_core.objectives import RewardBatch

pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[1]


def test_the_readme_runs_as_it_stands(capsys):
    first, second = re.findall(r"(?ms)^```python\n(.*?)^```", (ROOT / "README.md").read_text())[:2]
    assert len(first.splitlines()) <= 30
    torch.manual_seed(0)
    namespace = {}
    exec(compile(first, "README.md", "exec"), namespace)
    assert re.match(r"loss -?\d\.\d+, on the sampled tokens ", capsys.readouterr().out)
    assert namespace["metrics"]["loss_candidates"] != 0
    policy, loss = namespace["policy"], namespace["loss"].item()
    gradient = policy.lm_head.weight.grad.clone()
    policy.zero_grad()
    exec(compile(second, "README.md", "exec"), namespace)  # on logits: the same numbers
    assert namespace["loss"].item() == pytest.approx(loss, abs=1e-5)
    torch.testing.assert_close(policy.lm_head.weight.grad, gradient, rtol=1e-3, atol=1e-5)


def test_the_readme_calls_five_functions():
    first = re.search(r"(?ms)^```python\n(.*?)^```", (ROOT / "README.md").read_text())[1]
    called = set(re.findall(r"ic\.(\w+(?:\.\w+)?)\(", first)) - {"attach"}
    assert called == {"select_candidates", "linear_td_errors", "distrl_advantages", "PolicyBatch.of", "distrl_loss"}


def test_the_loop_learns():
    shares = own_loop.train(steps=12)
    assert shares[0] < 0.2
    assert shares[-1] > 0.5


def test_the_loss_of_given_logits():
    loss, metrics, gradient_NV = logits.main()
    assert metrics["loss_candidates"] != 0
    assert loss == pytest.approx(metrics["loss_sampled"] + 0.1 * metrics["loss_candidates"], rel=1e-5)
    assert gradient_NV.sum(1).abs().max() < 1e-5  # a constant added to a row's logits changes nothing
    assert gradient_NV.abs().max() > 1e-3


def test_losses_of_other_papers():
    """At the old policy both are the plain policy gradient, over tokens and over answers; main has one a little off."""
    assert [gradient.abs().amax(1).gt(0).sum() >= 10 for _, gradient in own_loss.main().values()] == [True] * 3
    lengths_B, advantages_B = torch.tensor([3, 5, 4, 6]), torch.tensor([1.0, -1.0, 0.5, -0.5])
    hidden, weight = torch.randn(18, 32, requires_grad=True), torch.randn(1000, 32)
    tokens_N = torch.randint(1000, (18,))
    new_N = (hidden @ weight.T).log_softmax(-1).gather(1, tokens_N[:, None])[:, 0]
    given, weights_N = (hidden, weight, tokens_N, new_N.detach()), advantages_B.repeat_interleave(lengths_B)
    by_answer_N = weights_N / (4 * lengths_B.repeat_interleave(lengths_B))
    logits = hidden @ weight.T
    top_NK = logits.detach().topk(5).indices
    teacher_NK, student_NK = torch.randn(18, 5).log_softmax(-1), logits.gather(1, top_NK).log_softmax(-1)
    reverse = (student_NK.exp() * (student_NK - teacher_NK)).sum() / 18
    forward = (teacher_NK.exp() * (teacher_NK - student_NK)).sum() / 18
    for loss, plain in (
        (own_loss.distill(hidden, weight, top_NK, teacher_NK), reverse),
        (own_loss.distill(hidden, weight, top_NK, teacher_NK, "forward"), forward),
        (own_loss.cispo(*given, weights_N), -(weights_N * new_N).mean()),
        (own_loss.gspo(*given, advantages_B, lengths_B), -(by_answer_N * new_N).sum()),
    ):
        expected = torch.autograd.grad(plain, hidden, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(loss, hidden), expected, rtol=1e-4, atol=1e-5)


def test_an_objective_of_ones_own():
    """vbar of one token q = 0.1 with beta 10 is 1: (sigma(1) - 1)^2, and for a wrong answer sigma(1)^2."""
    assert objectives.find("examples.own_objective:Brier") is Brier
    cu, labels = torch.tensor([0, 1, 2]), torch.tensor([1.0, 0.0])
    loss = Brier().loss(torch.tensor([0.1, 0.1]), RewardBatch(cu, labels, torch.tensor([1.0, 10.0])))
    sigma = 0.7310586
    assert loss.item() == pytest.approx((1 - sigma) ** 2 + 10 * sigma**2, rel=1e-5)


def test_an_estimator_of_ones_own():
    """Errors 0, 2 | 4 of one prompt: mean 2, std sqrt(8/3), normalised -1.2247, 0, 1.2247; the best to come of each."""
    name = "examples.own_estimator:BestToCome"
    assert estimators.find(name).name == "best_to_come"
    cu, delta = torch.tensor([0, 2, 3]), torch.tensor([[0.0], [2.0], [4.0]])
    method = replace(ic.METHODS["paper"], estimator=name, outcome="reinforce")
    given = torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 1), torch.zeros(2), cu, ["x", "x"]
    got = ic.distrl_advantages(delta, *given, method)
    assert got[:, 0].tolist() == pytest.approx([0.0, 0.0, 1.2247], abs=1e-4)


def test_a_reward_function_of_ones_own():
    assert last_number("First 3, then 1,204.", "1204")
    assert not last_number("1204, no: 7", "1204")
    assert not last_number("none", "1204")
