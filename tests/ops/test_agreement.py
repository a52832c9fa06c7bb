"""The bounded-memory backend of this machine against the reference, forward and backward.

`make test` runs this folder twice: with the chunked backend, and with the Triton kernels in the interpreter. On a GPU
all of it runs on the GPU (conftest.py).
"""

import math
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F

import ipvrm_core as ic
from ipvrm_core.reference import logprobs as ref_logprobs
from tests.ops.problems import (
    CONFIGS,
    DTYPES,
    SHAPES,
    TOLERANCE,
    assert_no_worse,
    check_logprobs,
    check_loss,
    logprobs_and_gradients,
    loss_and_gradients,
    make_problem,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_settings(name, bias, dtype):
    """Without a bias and an entropy gradient a row's factor stays out of its logits, on a CPU too."""
    config = CONFIGS[name]
    problem = make_problem(*SHAPES[0], dtype=dtype, bias=bias, temperature=config.temperature, softcap=config.softcap)
    check_loss(problem, config, max_buffer_bytes=16 * 101 * 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_a_temperature_for_every_row(softcap, dtype):
    problem = make_problem(*SHAPES[0], dtype=dtype, temperature="rows", softcap=softcap)
    check_loss(problem, ic.PolicyLossConfig(softcap=softcap, entropy_coef=0.2), max_buffer_bytes=16 * 101 * 8)
    check_logprobs(problem, problem.batch.temperatures_N, softcap=softcap, max_buffer_bytes=16 * 101 * 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_td_errors(dtype):
    """beta = 10 times a difference of log-probs, from the model's own products; 0 at padding, whatever stands there."""
    problem = make_problem(*SHAPES[0], dtype=dtype, bias=True)
    ids, wide = problem.batch.ids_NS, problem.to(torch.float64)
    old = torch.randn(ids.shape).masked_fill(ids < 0, math.inf)
    heads = [(x.hidden, x.weight, x.bias) for x in (problem, wide)]
    options = {"temperature": 0.7, "softcap": 6.0, "max_buffer_bytes": 16 * 101 * 8}
    ours = ic.linear_td_errors(*heads[0][:2], ids, old, 10.0, bias=heads[0][2], **options)
    truth = ic.linear_td_errors(*heads[1][:2], ids, old, 10.0, bias=heads[1][2], backend="reference", **options)
    logits = F.linear(*heads[0])
    same = ref_logprobs.logprobs_from_logits(logits, ids, temperature=0.7, softcap=6.0).logprobs_NK
    naive = (10.0 * (same - old)).masked_fill(ids < 0, 0.0)
    assert (ours[ids < 0] == 0).all()
    assert not ours.requires_grad
    assert_no_worse([ours], [naive], [truth], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["paper", "softcap_entropy"])
def test_in_place_gives_the_same_gradient_in_the_memory_of_the_logits(name, dtype):
    """The upstream factor -2 is exact, so the rescaling rounds nothing; 1 is the case that touches nothing."""
    problem, config = make_problem(17, 5, 103, 6), CONFIGS[name]
    for upstream in (1.0, -2.0):
        leaf = (torch.randn(17, 103) * 3).to(dtype).requires_grad_()
        plain = ic.distrl_loss_from_logits(leaf, problem.batch, config)
        (want,) = torch.autograd.grad(plain.loss * upstream, leaf)
        logits = leaf.clone()  # not a leaf, as from a model
        output = ic.distrl_loss_from_logits(logits, problem.batch, config, inplace=True)
        received = []
        logits.register_hook(received.append)
        (got,) = torch.autograd.grad(output.loss * upstream, leaf)
        assert torch.equal(output.loss, plain.loss)
        assert torch.equal(got, want)
        assert received[0].data_ptr() == logits.data_ptr()
        assert torch.equal(logits, want)  # and so the logits are gone


@pytest.mark.parametrize("inplace", [False, True])
def test_logits_whose_rows_are_not_contiguous(inplace):
    """Columns of a transposed tensor: the same results as from a contiguous copy."""
    problem, leaf = make_problem(17, 5, 103, 6), torch.randn(103, 17, requires_grad=True)
    (want,) = torch.autograd.grad(ic.distrl_loss_from_logits(leaf.t().contiguous(), problem.batch).loss, leaf)
    logits = leaf.clone().t()
    assert logits.stride() == (1, 17)
    (got,) = torch.autograd.grad(ic.distrl_loss_from_logits(logits, problem.batch, inplace=inplace).loss * 2, leaf)
    assert torch.equal(got, 2 * want)


def test_in_place_without_a_gradient_leaves_the_logits_alone():
    problem, logits = make_problem(17, 5, 103, 6), torch.randn(17, 103)
    before = logits.clone()
    ic.distrl_loss_from_logits(logits, problem.batch, inplace=True)
    with torch.no_grad():
        ic.distrl_loss_from_logits(logits.requires_grad_(), problem.batch, inplace=True)
    assert torch.equal(logits.detach(), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_shapes(shape, bias, dtype):
    config = replace(CONFIGS["everything"], temperature=1.0)
    check_loss(make_problem(*shape, dtype=dtype, bias=bias), config, max_buffer_bytes=3 * 16 * shape[2])


@pytest.mark.parametrize("function", ["loss", "logprobs"])
@pytest.mark.parametrize(
    ("scale", "shift"), [(0.1, -50.0), (3.0, -1e4), (3000.0, 0.0)], ids=["negative", "-1e4", "peaked"]
)
def test_large_and_all_negative_logits(function, scale, shift):
    """The tolerance is a tenth of the spacing of float32 numbers at 1e4: which way a logit was rounded is luck."""
    problem = make_problem(21, 5, 131, 6, scale=scale, shift=shift)
    if function == "loss":
        check_loss(problem, ic.PolicyLossConfig(), tolerance=1e-4, max_buffer_bytes=1)
    else:
        check_logprobs(problem, 1.0, tolerance=1e-4, max_buffer_bytes=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("use", ["logprobs", "lse", "entropy", "all"])
def test_logprobs(use, shape, dtype):
    problem = make_problem(*shape, dtype=dtype, bias=use != "all")
    check_logprobs(problem, 0.7, use, max_buffer_bytes=3 * 16 * shape[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_from_logits_equals_the_reference_on_the_same_logits(dtype):
    """Same logits, so only the order of a few operations differs; the gradient comes in the dtype of the logits."""
    problem = make_problem(17, 5, 103, 6)
    config = CONFIGS["everything"]
    logits = (torch.randn(17, 103) * 3).to(dtype).requires_grad_()
    got, want = [], []
    for backend, out in (("auto", got), ("reference", want)):
        loss = ic.distrl_loss_from_logits(logits, problem.batch, config, backend=backend, max_buffer_bytes=5000)
        out += loss_and_gradients(loss, [logits], -2.0)
        rows = ic.logprobs_from_logits(
            logits, problem.batch.ids_NS, temperature=0.7, backend=backend, max_buffer_bytes=5000
        )
        out += logprobs_and_gradients(rows, [logits], "all")
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-12}[dtype]
    for ours, reference in zip(got, want, strict=True):
        assert ours.dtype == reference.dtype
        torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("bias",), ("hidden", "weight"), ("weight", "bias")])
@pytest.mark.parametrize("function", ["loss", "logprobs"])
def test_partial_gradients(function, trained):
    """A gradient is the same whether or not others are made, and stays None where it was not asked for."""
    gradients = {}
    for wanted in (("hidden", "weight", "bias"), trained):
        problem = make_problem(12, 6, 65, 4)
        for name in ("hidden", "weight", "bias"):
            getattr(problem, name).requires_grad_(name in wanted)
        if function == "loss":
            total = ic.distrl_loss(problem.hidden, problem.weight, problem.batch, bias=problem.bias).loss
        else:
            total = ic.linear_logprobs(problem.hidden, problem.weight, problem.batch.ids_NS, bias=problem.bias)[0].sum()
        total.backward()
        gradients[wanted] = {name: getattr(problem, name).grad for name in ("hidden", "weight", "bias")}
    full = gradients["hidden", "weight", "bias"]
    for name, value in gradients[trained].items():
        assert (value is not None) == (name in trained)
        if value is not None:
            assert torch.equal(value, full[name])


def test_no_gradient_gives_the_same_values():
    problem = make_problem(12, 6, 65, 4)
    with_grad = ic.distrl_loss(problem.hidden, problem.weight, problem.batch, bias=problem.bias)
    with torch.no_grad():
        without = ic.distrl_loss(problem.hidden, problem.weight, problem.batch, bias=problem.bias)
    assert with_grad.loss.requires_grad
    assert not without.loss.requires_grad
    assert torch.equal(with_grad.loss, without.loss)
    assert not any(value.requires_grad for value in with_grad.metrics.values())
    assert {name: value.item() for name, value in with_grad.metrics.items()} == {
        name: value.item() for name, value in without.metrics.items()
    }


@pytest.mark.parametrize("budget", [1, 2 * 8 * 211 * 3, 2 * 8 * 211 * 64, 1 << 30])
def test_results_do_not_depend_on_the_budget(budget):
    """130 rows as 130 chunks, 44, 3 and 1, in float64: differences can only be rounding."""
    problem = make_problem(130, 6, 211, 5, dtype=torch.float64)
    config = CONFIGS["entropy"]
    results = []
    for max_buffer_bytes in (None, budget):
        options = {"bias": problem.bias, "max_buffer_bytes": max_buffer_bytes}
        loss = ic.distrl_loss(problem.hidden, problem.weight, problem.batch, config, **options)
        rows = ic.linear_logprobs(problem.hidden, problem.weight, problem.batch.ids_NS, **options)
        results.append(
            [*loss_and_gradients(loss, problem.inputs, 1.0), *logprobs_and_gradients(rows, problem.inputs, "all")]
        )
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_a_row_does_not_depend_on_the_other_rows():
    """To the last bit: the other rows' values change, the shapes do not."""
    problem = make_problem(40, 16, 301, 5)
    other = problem.hidden.detach().clone()
    other[1:] = 100 * torch.randn_like(other[1:])
    first, second = (ic.linear_logprobs(h, problem.weight, problem.batch.ids_NS) for h in (problem.hidden, other))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a[0], b[0])


def test_pieces_add_up_to_the_whole():
    """The weights are global: loss, metrics and gradients of micro-batches sum to those of the batch."""
    problem = make_problem(23, 6, 65, 4, dtype=torch.float64)
    config = CONFIGS["everything"]
    whole = loss_and_gradients(
        ic.distrl_loss(problem.hidden, problem.weight, problem.batch, config, bias=problem.bias), problem.inputs, 1.0
    )
    total = [torch.zeros_like(value) for value in whole]
    for rows in (slice(0, 9), slice(9, 23)):
        piece = ic.distrl_loss(
            problem.hidden[rows], problem.weight, problem.batch.rows(rows), config, bias=problem.bias
        )
        total = [a + b for a, b in zip(total, loss_and_gradients(piece, problem.inputs, 1.0), strict=True)]
    for one, other in zip(whole, total, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_non_contiguous_inputs():
    problem = make_problem(12, 6, 65, 4)
    expected = loss_and_gradients(
        ic.distrl_loss(problem.hidden, problem.weight, problem.batch), problem.inputs[:2], 1.0
    )
    hidden = problem.hidden.detach().t().contiguous().t().requires_grad_()
    weight = torch.stack([problem.weight.detach()] * 2, dim=-1)[..., 0].requires_grad_()
    given = {f.name: getattr(problem.batch, f.name) for f in fields(problem.batch)}
    values = {name: x for name, x in given.items() if x is not None}
    batch = ic.PolicyBatch(**{name: torch.stack([x, x], dim=-1)[..., 0] for name, x in values.items()})
    assert not any(x.is_contiguous() for x in (hidden, weight, batch.advantages_NS, batch.ids_NS))
    got = loss_and_gradients(ic.distrl_loss(hidden, weight, batch), [hidden, weight], 1.0)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradcheck(temperature):
    problem = make_problem(5, 3, 7, 2, dtype=torch.float64, temperature=temperature)
    config = replace(CONFIGS["everything"], temperature=temperature)

    def loss(hidden, weight, bias):
        return ic.distrl_loss(hidden, weight, problem.batch, config, bias=bias, max_buffer_bytes=2 * 8 * 7 * 2).loss

    def rows(hidden, weight, bias):
        return tuple(ic.linear_logprobs(hidden, weight, problem.batch.ids_NS, bias=bias, temperature=temperature))

    assert torch.autograd.gradcheck(loss, problem.inputs)
    assert torch.autograd.gradcheck(rows, problem.inputs)


def test_same_bits_twice():
    problem = make_problem(70, 16, 501, 10)
    runs = [
        loss_and_gradients(ic.distrl_loss(problem.hidden, problem.weight, problem.batch), problem.inputs[:2], 1.0)
        for _ in range(2)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
