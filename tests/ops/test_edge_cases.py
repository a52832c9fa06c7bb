"""Empty, masked, padded, infinite, equal: what a batch may hold and what comes of it."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import ipvrm_core as ic
from tests.ops.problems import CONFIGS, Problem, loss_and_gradients, make_problem
from tests.slots import branches, change


def test_given_logits_are_not_written_to():
    problem = make_problem(8, 5, 33, 3)
    logits = torch.randn(8, 33)
    before = logits.clone()
    ic.distrl_loss_from_logits(logits.requires_grad_(), problem.batch).loss.backward()
    ic.logprobs_from_logits(logits, problem.batch.ids_NS).logprobs_NK.sum().backward()
    ic.select_candidates_from_logits(logits, problem.batch.ids_NS[:, 0])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_empty_batch(backend):
    problem = make_problem(3, 6, 65, 4)
    hidden = problem.hidden[:0]
    output = ic.distrl_loss(hidden, problem.weight, problem.batch.rows(slice(0, 0)), bias=problem.bias, backend=backend)
    assert output.loss.item() == 0.0
    assert set(output.metrics) == set(ic.types.METRICS)
    assert all(value.item() == 0.0 for value in output.metrics.values())
    gradients = torch.autograd.grad(output.loss, problem.inputs)
    assert all(gradient.count_nonzero() == 0 for gradient in gradients)
    assert [gradient.shape for gradient in gradients] == [x.shape for x in problem.inputs]
    rows = ic.linear_logprobs(hidden, problem.weight, torch.empty(0, 2, dtype=torch.int64), backend=backend)
    assert [tuple(value.shape) for value in rows] == [(0, 2), (0,), (0,)]


def test_all_rows_masked_and_no_candidates_left():
    """Zero weights: zero loss and exactly zero gradients, also where ids are padding everywhere."""
    problem = make_problem(9, 6, 65, 4)
    batch = problem.batch
    batch = change(
        batch,
        token_weights_N=torch.zeros(9),
        candidate_weights_N=torch.ones(9),
        candidate_ids_NK=torch.full_like(batch.ids_NS[:, 1:], -1),
    )
    output = ic.distrl_loss(problem.hidden, problem.weight, batch, CONFIGS["everything"], bias=problem.bias)
    assert output.loss.item() == 0.0
    assert all(gradient.count_nonzero() == 0 for gradient in torch.autograd.grad(output.loss, problem.inputs))


def test_junk_in_padded_slots_is_never_read():
    """The log-probs and advantages under a padded id may be anything, NaN and inf too."""
    problem = make_problem(9, 6, 65, 4)
    batch, padding = problem.batch, problem.batch.ids_NS[:, 1:] < 0
    assert padding.any()
    junk = change(
        batch,
        candidate_old_logprobs_NK=batch.old_logprobs_NS[:, 1:].masked_fill(padding, math.inf),
        candidate_advantages_NK=batch.advantages_NS[:, 1:].masked_fill(padding, math.nan),
    )
    results = [
        loss_and_gradients(ic.distrl_loss(problem.hidden, problem.weight, b, bias=problem.bias), problem.inputs, 1.0)
        for b in (batch, junk)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def masked_and_garbage() -> tuple[Problem, Problem]:
    """A problem with two masked rows, and the same with nothing but garbage in them (ids must be ids)."""
    problem = make_problem(9, 6, 65, 4, temperature="rows")
    weights = problem.batch.token_weights_N.clone()
    weights[2] = weights[5] = 0.0
    clean = replace(problem.batch, token_weights_N=weights, candidate_weights_N=weights)
    dead = clean.masked_N
    junk = {
        "old_logprobs_N": -1e9,
        "ref_logprobs_N": 1e9,
        "advantages_N": math.inf,
        "candidate_old_logprobs_NK": -1e9,
        "candidate_advantages_NK": math.nan,
        "temperatures_N": 0.0,
    }
    fields = {name: branches(clean)[name] for name in junk}
    garbage = {name: x.masked_fill(dead.view(-1, *[1] * (x.dim() - 1)), junk[name]) for name, x in fields.items()}
    hidden = problem.hidden.detach().clone()
    hidden[2], hidden[5] = math.nan, math.inf
    dirty = replace(problem, hidden=hidden.requires_grad_(), batch=change(clean, **garbage))
    return replace(problem, batch=clean), dirty


@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
def test_a_masked_row_is_not_seen(backend):
    """Garbage in rows of weight 0 changes neither loss, metrics nor any gradient: 0 * NaN never reaches a sum."""
    config = replace(CONFIGS["everything"], temperature=1.0)
    clean, dirty = masked_and_garbage()
    results = []
    for problem in (clean, dirty):
        output = ic.distrl_loss(
            problem.hidden, problem.weight, problem.batch, config, bias=problem.bias, backend=backend
        )
        results.append(loss_and_gradients(output, problem.inputs, 1.0))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert not any(value.isnan().any() for value in results[1])


@pytest.mark.parametrize(
    ("backend", "inplace"), [("auto", True), ("auto", False), ("chunked", True), ("reference", False)]
)
def test_masked_logits_are_not_seen(backend, inplace):
    results = []
    for problem in masked_and_garbage():
        leaf = F.linear(problem.hidden, problem.weight, problem.bias).detach().requires_grad_()
        output = ic.distrl_loss_from_logits(leaf.clone(), problem.batch, inplace=inplace, backend=backend)
        results.append(loss_and_gradients(output, [leaf], 1.0))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert (results[1][-1][[2, 5]] == 0).all()


EXTREMES = {  # (logits of a row, log pi_old of the sampled token 0, its log pi_ref)
    "new beyond old": ([0.0, -3.0, -5.0], -200.0, -1.0),
    "old is certain that it cannot be": ([0.0, -3.0, -5.0], -math.inf, -1.0),
    "reference beyond new": ([-150.0, 0.0, 0.0], -150.0, -1.0),
    "impossible under new": ([-math.inf, 0.0, 0.0], -300.0, -3.0),
}


@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_an_exponential_that_would_overflow(extreme, dual_clip, backend):
    """log rho and log pi_ref - log pi are min(., 40): the terms are constant beyond, so no gradient comes from them."""
    logits, old, ref = EXTREMES[extreme]
    x_NV, weights_N = torch.tensor([logits] * 3, requires_grad=True), torch.tensor([0.5, 0.25, 2.0])
    advantages_N, ids_N = torch.tensor([-1.5, 0.0, 1.5]), torch.zeros(3, dtype=torch.int64)
    old_N, ref_N = torch.full((3,), old), torch.full((3,), ref)
    slots = (torch.stack([x_N, x_N], dim=1) for x_N in (ids_N, old_N, advantages_N))
    batch = ic.PolicyBatch(*slots, weights_N, weights_N, ref_N)

    p_V = x_NV[0].detach().double().softmax(-1)
    log_ratio, log_ref = min(p_V[0].log().item() - old, 40.0), min(ref - p_V[0].log().item(), 40.0)
    ratio, k3 = math.exp(log_ratio), math.exp(log_ref) - 1 - log_ref
    # A < 0: the ratio from 0.8 to the dual clip; A = 0: nothing; A > 0: the ratio up to 1.28
    used = (min(max(ratio, 0.8), dual_clip or math.inf), 0.0, min(ratio, 1.28))
    for kl_coef in (0.0, 0.5):
        config = ic.PolicyLossConfig(dual_clip=dual_clip, candidate_dual_clip=dual_clip, kl_coef=kl_coef)
        output = ic.distrl_loss_from_logits(x_NV, batch, config, backend=backend)
        losses = [-rho * a + kl_coef * k3 for rho, a in zip(used, advantages_N.tolist(), strict=True)]
        torch.testing.assert_close(output.loss.item(), torch.tensor(losses).dot(weights_N).item(), rtol=1e-5, atol=1e-7)
        kl_slope = kl_coef * (1 - math.exp(log_ref)) if log_ref < 40 else 0.0
        slopes_N = torch.tensor(
            [
                kl_slope - (ratio * a if rho == ratio and log_ratio < 40 else 0.0)
                for rho, a in zip(used, advantages_N.tolist(), strict=True)
            ]
        )
        want_NV = (weights_N * slopes_N)[:, None].double() * (torch.tensor([1.0, 0.0, 0.0]) - p_V)
        (grad_NV,) = torch.autograd.grad(output.loss, x_NV)
        torch.testing.assert_close(grad_NV.double(), want_NV, rtol=1e-5, atol=1e-7)
        infinite = [name for name, value in output.metrics.items() if not value.isfinite()]
        assert infinite == (["kl_old"] if p_V[0] == 0 else [])  # log pi_old - log pi is what it is


@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
@pytest.mark.parametrize(("x", "u"), [(0.5, 1.0), (60.0, 1.0), (0.5, 60.0), (60.0, 60.0)])
def test_a_factor_beyond_its_limit_is_a_constant_in_rho_k3(x, u, backend):
    """x = log rho, u = log pi_ref - log pi: each of rho and k3 passes a gradient where its own exponent is below 40."""
    logits = torch.zeros(1, 2, requires_grad=True)  # p = 1/2
    old, ref = -math.log(2) - x, -math.log(2) + u
    ids, one = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1)
    batch = ic.PolicyBatch(ids, torch.full((1, 1), old), torch.zeros(1, 1), one, one, torch.full((1,), ref))
    config = ic.PolicyLossConfig(kl_coef=0.5, kl_ratio=True)
    loss = ic.distrl_loss_from_logits(logits, batch, config, backend=backend).loss
    (grad,) = torch.autograd.grad(loss, logits)
    rho, bounded = math.exp(min(x, 40.0)), min(u, 40.0)
    k3 = math.exp(bounded) - 1 - bounded
    slope = 0.5 * rho * ((1 - math.exp(u) if u < 40 else 0.0) + (k3 if x < 40 else 0.0))
    assert loss.item() == pytest.approx(0.5 * rho * k3, rel=1e-5)
    assert grad[0].tolist() == pytest.approx([slope / 2, -slope / 2], rel=1e-5)


def test_coefficients_of_equal_ids_add():
    """One row, the sampled token also twice among the candidates: dL/dz by hand."""
    logits = torch.tensor([[math.log(x) for x in (1.0, 2.0, 3.0, 4.0)]], dtype=torch.float64, requires_grad=True)
    logp = logits.detach().log_softmax(-1)
    one = torch.ones(1, dtype=torch.float64)
    ids = torch.tensor([[2, 2, 2]])
    batch = ic.PolicyBatch(ids, logp[:, [2, 2, 2]], torch.tensor([[2.0, 5.0, -1.0]]).double(), one, one)
    ic.distrl_loss_from_logits(logits, batch, ic.PolicyLossConfig(alpha=0.5)).loss.backward()
    # c = -rho A w: -2 for the sampled slot, 0.5 * 0.3 * (-5 + 1) = -0.6 for the candidates; dL/dz = c (onehot - p)
    expected = -2.6 * (torch.tensor([[0.0, 0.0, 1.0, 0.0]]) - torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
    torch.testing.assert_close(logits.grad, expected.double(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_temperatures_of_any_dtype(dtype):
    """0.5, 0.75 and so on are exact in all of them, so the results are the same to the bit."""
    problem = make_problem(9, 6, 65, 4)
    temperatures = torch.arange(2, 11) / 4
    results = [
        ic.linear_logprobs(problem.hidden, problem.weight, problem.batch.ids_NS, temperature=t)
        for t in (temperatures, temperatures.to(dtype))
    ]
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("coefficient", [0.0, 0.5])
def test_minus_infinity_removes_a_token(coefficient):
    """Logits with -inf columns give what the smaller vocabulary gives, and no gradient at those columns."""
    problem = make_problem(9, 6, 40, 3)
    config = ic.PolicyLossConfig(entropy_coef=coefficient)
    small = torch.randn(9, 40, dtype=torch.float64, requires_grad=True)
    large = torch.cat([small.detach(), torch.full((9, 7), -math.inf)], dim=1).requires_grad_()
    outputs = [ic.distrl_loss_from_logits(logits, problem.batch, config) for logits in (small, large)]
    for output in outputs:
        output.loss.backward()
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss)
    torch.testing.assert_close(large.grad[:, :40], small.grad)
    assert (large.grad[:, 40:] == 0).all()


def test_nan_is_not_hidden():
    logits = torch.zeros(2, 5)
    logits[0, 3] = math.nan
    rows = ic.logprobs_from_logits(logits, torch.zeros(2, 1, dtype=torch.int64))
    assert all(value[0].isnan().all() and not value[1].isnan().any() for value in rows)
