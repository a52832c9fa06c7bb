"""The on-policy step in one pass against the three calls that it is: values, metrics, candidates, gradients."""

from dataclasses import replace

import pytest
import torch

import ipvrm_core as ic
from ipvrm_core.fused import head
from ipvrm_core.fused.head import Head
from ipvrm_core.types import METRICS
from tests.ops.problems import CONFIGS, DTYPES, Problem, make_problem

N, D, V = 19, 8, 101
SIGMA, BETA = 0.7, 10.0
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float64: 1e-11}
RULES = {
    "paper": {},
    "many": {"p_min": 0.02},
    "forced": {"p_min": 0.3, "keep_sampled": True, "top_k": 2, "strict": True},
}


def make(dtype: torch.dtype, temperature=1.0, softcap=None) -> tuple[Problem, Problem]:
    """The policy, whose batch has sampled tokens alone (some rows masked), and the reward model near it."""
    problem = make_problem(N, D, V, 4, dtype=dtype, temperature=temperature, softcap=softcap)
    batch = problem.batch
    batch = replace(
        batch, ids_NS=batch.ids_NS[:, :1].contiguous(), old_logprobs_NS=None, advantages_NS=batch.advantages_NS[:, :1]
    )
    near = (problem.weight + 0.1 * torch.randn(V, D)).detach().to(dtype)
    return replace(problem, batch=batch), Problem(problem.hidden.detach(), near, problem.bias.detach(), batch)


def one_pass(problem: Problem, judge: Problem, config, rule, **options) -> list[torch.Tensor]:
    out = ic.on_policy_distrl_loss(
        problem.hidden, problem.weight, problem.batch, judge.hidden, judge.weight, BETA, SIGMA, config,
        bias=problem.bias, reward_bias=judge.bias, **rule, **options,
    )  # fmt: skip
    return flat(out.loss, out.metrics, out.candidates, out.td_errors_NS, problem)


def three_calls(problem: Problem, judge: Problem, config, rule) -> list[torch.Tensor]:
    batch, head = problem.batch, {"bias": problem.bias}
    T = config.temperature if batch.temperatures_N is None else batch.temperatures_N
    transform = {"temperature": T, "softcap": config.softcap}
    found = ic.select_candidates(problem.hidden, problem.weight, batch.ids_NS[:, 0], **rule, **transform, **head)
    slots = found.ids_NS, found.logprobs_NS
    delta = ic.linear_td_errors(judge.hidden, judge.weight, *slots, BETA, bias=judge.bias, **transform)
    advantages = torch.cat([batch.advantages_NS, delta[:, 1:] / SIGMA], dim=1)
    batch = replace(batch, ids_NS=found.ids_NS, advantages_NS=advantages)
    loss, metrics = ic.distrl_loss(problem.hidden, problem.weight, batch, config, **head)
    return flat(loss, metrics, found, delta, problem)


def flat(loss, metrics, found: ic.Candidates, delta, problem: Problem) -> list[torch.Tensor]:
    """Rows that are masked in both branches have candidates of no meaning."""
    live = ~problem.batch.masked_N
    per_row = [x[live] for x in (*found, delta)]
    return [loss.detach(), *metrics.values(), *per_row, *torch.autograd.grad(2.0 * loss, problem.inputs)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["paper", "temperature", "softcap_entropy", "kl"])
def test_the_three_calls_in_one(name, rule, dtype):
    config = CONFIGS[name]
    problem, judge = make(dtype, config.temperature, config.softcap)
    got = one_pass(problem, judge, config, RULES[rule], max_buffer_bytes=2 * 16 * 7 * V)
    want = three_calls(problem, judge, config, RULES[rule])
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype
        scale = theirs.abs().max().clamp(min=1).item() if theirs.numel() else 1.0
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)
    counts = got[1 + len(METRICS) + 2]
    assert counts.max() > 0 or name == "softcap_entropy"  # which leaves no token a probability of 0.1


def test_a_temperature_for_every_row_and_the_reference():
    problem, judge = make(torch.float64, temperature="rows")
    got, want = (one_pass(problem, judge, ic.PolicyLossConfig(), {}, backend=name) for name in ("auto", "reference"))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_a_frozen_head_and_no_gradient_at_all():
    problem, judge = make(torch.float32)
    whole = one_pass(problem, judge, ic.PolicyLossConfig(), {})
    frozen = Problem(problem.hidden, problem.weight.detach(), None, problem.batch)
    frozen.bias = problem.bias.detach()
    hidden_alone = Problem(problem.hidden, frozen.weight, frozen.bias, problem.batch)
    out = ic.on_policy_distrl_loss(
        hidden_alone.hidden, frozen.weight, problem.batch, judge.hidden, judge.weight, BETA, SIGMA,
        bias=frozen.bias, reward_bias=judge.bias,
    )  # fmt: skip
    (dh,) = torch.autograd.grad(2.0 * out.loss, problem.hidden)
    assert torch.equal(dh, whole[-3])
    with torch.no_grad():
        silent = ic.on_policy_distrl_loss(
            problem.hidden, problem.weight, problem.batch, judge.hidden, judge.weight, BETA, SIGMA,
            bias=problem.bias, reward_bias=judge.bias,
        )  # fmt: skip
    assert not silent.loss.requires_grad
    torch.testing.assert_close(silent.loss, out.loss.detach(), rtol=1e-6, atol=1e-6)


def test_masked_rows_may_hold_anything():
    problem, judge = make(torch.float32)
    masked = problem.batch.masked_N.clone()
    masked[3] = True
    weights = {
        name: getattr(problem.batch, name).masked_fill(masked, 0.0)
        for name in ("token_weights_N", "candidate_weights_N")
    }
    batch = replace(problem.batch, **weights)
    results = []
    for junk in (0.0, float("nan")):
        hidden = problem.hidden.detach().masked_fill(masked[:, None], junk).requires_grad_()
        judged = Problem(judge.hidden.masked_fill(masked[:, None], junk), judge.weight, judge.bias, batch)
        results.append(
            one_pass(Problem(hidden, problem.weight, problem.bias, batch), judged, ic.PolicyLossConfig(), {})
        )
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": 0.0}, "sigma must be > 0; got 0.0"),
        ({"reward_weight": torch.zeros(V + 1, D)}, "rows and vocabulary"),
        ({"p_min": 0.0}, "p_min must be in"),
        ({"config": ic.PolicyLossConfig(kl_coef=0.1)}, "needs batch.ref_logprobs_N"),
    ],
)
def test_bad_input(change, message):
    problem, judge = make(torch.float32)
    given = {
        "hidden": problem.hidden, "weight": problem.weight, "batch": replace(problem.batch, ref_logprobs_N=None),
        "reward_hidden": judge.hidden, "reward_weight": judge.weight, "beta": BETA, "sigma": SIGMA,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        ic.on_policy_distrl_loss(**given | change)


def test_a_batch_with_old_logprobs_is_refused():
    problem, judge = make(torch.float32)
    batch = replace(problem.batch, old_logprobs_NS=torch.zeros(N, 1))
    with pytest.raises(ValueError, match="no old log-probs"):
        ic.on_policy_distrl_loss(problem.hidden, problem.weight, batch, judge.hidden, judge.weight, BETA, SIGMA)


def test_a_chunk_has_as_many_rows_as_that_of_one_head(monkeypatch):
    """By default: the reward model's logits have memory of their own. A given budget is for both."""
    rows = []
    chunks = Head.chunks
    monkeypatch.setattr(Head, "chunks", lambda head: rows.append(head.n) or chunks(head))
    monkeypatch.setitem(head.DEFAULT_BUFFER_BYTES, "cpu", (6 * 10 * V, 6 * 10 * V))
    problem, judge = make(torch.float32)
    ic.distrl_loss(problem.hidden, problem.weight, problem.batch)
    one_pass(problem, judge, CONFIGS["paper"], {})
    one_pass(problem, judge, CONFIGS["paper"], {}, max_buffer_bytes=6 * 10 * V)
    assert rows[0] == rows[1] > rows[2] >= 1
