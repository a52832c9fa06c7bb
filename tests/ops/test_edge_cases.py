"""Empty, masked, padded, infinite, equal: what a batch may hold and what comes of it."""

import math
from dataclasses import replace

import pytest
import torch

import ipvrm_core as ic
from tests.ops.problems import CONFIGS, loss_and_gradients, make_problem
from tests.slots import change, from_branches


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


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_row_of_weight_zero_may_hold_anything(backend):
    """Garbage in masked rows changes neither loss, metrics nor gradients: 0 * inf never reaches a sum."""
    problem = make_problem(9, 6, 65, 4)
    weights = problem.batch.token_weights_N.clone()
    weights[2] = weights[5] = 0.0
    clean = replace(problem.batch, token_weights_N=weights, candidate_weights_N=weights)
    dead = weights == 0
    garbage = change(
        clean,
        old_logprobs_N=clean.old_logprobs_N.masked_fill(dead, -1e9),
        ref_logprobs_N=clean.ref_logprobs_N.masked_fill(dead, 1e9),
        advantages_N=clean.advantages_N.masked_fill(dead, math.inf),
        candidate_old_logprobs_NK=clean.candidate_old_logprobs_NK.masked_fill(dead[:, None], -1e9),
    )
    outputs = [
        ic.distrl_loss(problem.hidden, problem.weight, b, CONFIGS["everything"], bias=problem.bias, backend=backend)
        for b in (clean, garbage)
    ]
    assert all(torch.equal(outputs[0].metrics[name], outputs[1].metrics[name]) for name in outputs[0].metrics)
    results = [loss_and_gradients(output, problem.inputs, 1.0) for output in outputs]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_coefficients_of_equal_ids_add():
    """One row, the sampled token also twice among the candidates: dL/dz by hand."""
    logits = torch.tensor([[math.log(x) for x in (1.0, 2.0, 3.0, 4.0)]], dtype=torch.float64, requires_grad=True)
    logp = logits.detach().log_softmax(-1)
    ids = torch.tensor([[2, 2]])
    one = torch.ones(1, dtype=torch.float64)
    batch = from_branches(
        torch.tensor([2]), logp[:, 2], 2 * one, one, ids, logp[:, [2, 2]], torch.tensor([[5.0, -1.0]]).double(), one
    )
    ic.distrl_loss_from_logits(logits, batch, ic.PolicyLossConfig(alpha=0.5)).loss.backward()
    # c = -rho A w: -2 for the sampled slot, 0.5 * 0.3 * (-5 + 1) = -0.6 for the candidates; dL/dz = c (onehot - p)
    expected = -2.6 * (torch.tensor([[0.0, 0.0, 1.0, 0.0]]) - torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
    torch.testing.assert_close(logits.grad, expected.double(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
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
