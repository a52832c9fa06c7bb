"""`row_loss` against autograd through the reference, and losses of the field written with it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ipvrm_core as ic
from tests.ops.problems import DTYPES, SHAPES, TOLERANCE, Problem, assert_no_worse, make_problem


def uses(what: str, problem: Problem):
    """A function of one output or of all, which are not linear, with a weight for every row."""
    old_NS = problem.batch.old_logprobs_NS
    weights_N = torch.linspace(-1, 2, len(problem.hidden), dtype=torch.float64)

    def fn(logprobs: ic.LogProbs, rows: slice) -> Tensor:
        weights_n, total_n = weights_N[rows], 0.0
        if what in ("logprobs", "all"):
            total_n = total_n + (logprobs.logprobs_NK - old_NS[rows]).exp().sum(1)
        if what in ("lse", "all"):
            total_n = total_n + logprobs.lse_N.square()
        if what in ("entropy", "all"):
            total_n = total_n + logprobs.entropy_N.square()
        return (weights_n * total_n).sum()

    return fn


def gradients(loss: Tensor, problem: Problem) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(3.0 * loss, problem.inputs)]


def run(problem: Problem, what: str, **options) -> list[Tensor]:
    fn, ids = uses(what, problem), problem.batch.ids_NS
    return gradients(ic.row_loss(problem.hidden, problem.weight, ids, fn, bias=problem.bias, **options), problem)


def check(problem: Problem, what: str, **options) -> None:
    dtype, fn = problem.hidden.dtype, uses(what, problem)
    ours = run(problem, what, max_buffer_bytes=16 * problem.weight.shape[0] * 8, **options)
    assert [grad.dtype for grad in ours[1:]] == [dtype] * len(problem.inputs)
    truth = run(problem.to(torch.float64), what, backend="reference", **options)
    logits = F.linear(problem.hidden, problem.weight, problem.bias)
    plain = ic.row_loss_from_logits(logits, problem.batch.ids_NS, fn, backend="reference", **options)
    assert_no_worse(ours, gradients(plain, problem), truth, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, dtype):
    check(make_problem(*shape, dtype=dtype), "all")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("what", ["logprobs", "lse", "entropy", "nothing"])
def test_a_function_of_one_output(what, bias):
    problem = make_problem(*SHAPES[0], bias=bias)
    if what == "nothing":
        zero = ic.row_loss(*problem.inputs[:2], problem.batch.ids_NS, lambda logprobs, rows: torch.zeros(()))
        grads = torch.autograd.grad(zero, problem.inputs[:2])
        assert all((x == 0).all() for x in (zero, *grads))
    else:
        check(problem, what)


@pytest.mark.parametrize("bias", [True, False])
def test_rows_whose_softmax_has_no_gradient(bias):
    """sum_k c_k is 0 in the first two: the gradient is at the ids alone, though exp(z - max) stands where it goes."""
    problem = make_problem(*SHAPES[0], dtype=torch.float64, bias=bias)

    def fn(logprobs: ic.LogProbs, rows: slice) -> Tensor:
        signs_n = torch.arange(rows.start, rows.start + len(logprobs.lse_N))
        first_n, second_n = logprobs.logprobs_NK[:, 0], logprobs.logprobs_NK[:, 1]
        alone_n = torch.where(signs_n < 2, 0.0, first_n.square())
        return (first_n - second_n + alone_n).sum()

    ids = problem.batch.ids_NS.clamp(min=0)
    ours, exact = (
        gradients(ic.row_loss(problem.hidden, problem.weight, ids, fn, bias=problem.bias, backend=backend), problem)
        for backend in ("chunked", "reference")
    )
    for got, expected in zip(ours, exact, strict=True):
        assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("share", [1e-5, 1e-39])
def test_rows_whose_softmax_has_nearly_no_gradient(share):
    """Beside coefficients of 1: a share that can be seen is kept, one that would make them infinite is left out."""
    problem = make_problem(*SHAPES[0], bias=False)

    def fn(logprobs: ic.LogProbs, rows: slice) -> Tensor:
        return (logprobs.logprobs_NK[:, 0] - logprobs.logprobs_NK[:, 1] + share * logprobs.lse_N).sum()

    ids = problem.batch.ids_NS.clamp(min=0)
    ours, exact = (
        gradients(ic.row_loss(p.hidden, p.weight, ids, fn, backend=backend), p)[1:]
        for p, backend in ((problem, "auto"), (problem.to(torch.float64), "reference"))
    )
    for got, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("temperature", [0.6, "rows"])
def test_transforms(temperature, softcap):
    problem = make_problem(*SHAPES[0], temperature=temperature)
    given = problem.batch.temperatures_N.masked_fill(problem.batch.masked_N, 1.0) if temperature == "rows" else 0.6
    check(problem, "all", temperature=given, softcap=softcap)


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_partial_gradients(trained):
    problem = make_problem(*SHAPES[0])
    whole = dict(zip(("hidden", "weight", "bias"), run(problem, "all")[1:], strict=True))
    for name in ("hidden", "weight", "bias"):
        getattr(problem, name).requires_grad_(name == trained)
    fn, ids = uses("all", problem), problem.batch.ids_NS
    loss = ic.row_loss(problem.hidden, problem.weight, ids, fn, bias=problem.bias)
    (grad,) = torch.autograd.grad(3.0 * loss, getattr(problem, trained))
    torch.testing.assert_close(grad, whole[trained])


def test_given_logits_stay_as_they_are():
    problem = make_problem(*SHAPES[0])
    logits = (problem.hidden @ problem.weight.T).detach().requires_grad_()
    before, fn = logits.detach().clone(), uses("all", problem)
    outcome = {}
    for backend in ("auto", "reference"):
        loss = ic.row_loss_from_logits(logits, problem.batch.ids_NS, fn, backend=backend)
        outcome[backend] = loss.detach(), *torch.autograd.grad(loss, logits)
    assert torch.equal(logits.detach(), before)
    torch.testing.assert_close(outcome["auto"], outcome["reference"], rtol=1e-5, atol=1e-5)


def test_without_a_gradient_the_function_is_not_differentiated():
    problem, seen = make_problem(*SHAPES[0]), []

    def fn(logprobs, rows):
        seen.append(logprobs.logprobs_NK.requires_grad)
        return logprobs.lse_N.sum()

    with torch.no_grad():
        assert not ic.row_loss(problem.hidden, problem.weight, problem.batch.ids_NS, fn).requires_grad
    assert not any(seen)
    assert ic.row_loss(problem.hidden, problem.weight, problem.batch.ids_NS, fn).requires_grad
    assert seen[-1]


def test_every_row_is_seen_once_and_none_of_an_empty_batch():
    problem, seen = make_problem(*SHAPES[0]), []

    def fn(logprobs, rows):
        seen.extend(range(rows.start, rows.stop))
        return logprobs.lse_N.sum()

    ic.row_loss(problem.hidden, problem.weight, problem.batch.ids_NS, fn, max_buffer_bytes=1)
    assert seen == list(range(37))
    seen.clear()
    loss = ic.row_loss(problem.hidden[:0], problem.weight, problem.batch.ids_NS[:0], fn)
    assert loss == 0
    assert torch.autograd.grad(loss, problem.weight)[0].abs().max() == 0
    assert seen == []


# ---- losses of the field, [N, 1]: the sampled token alone


def clipped(ratio, advantages):
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)


LOSSES = {
    "ppo": lambda new, old, a: clipped((new - old).exp(), a),
    "cispo": lambda new, old, a: -(new - old).exp().clamp(max=1.2).detach() * a * new,
    "sapo": lambda new, old, a: -4 * torch.sigmoid(((new - old).exp() - 1) * torch.where(a > 0, 1.0, 1.05)) * a,
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_the_field_against_plain_pytorch(name):
    problem = make_problem(*SHAPES[0])
    batch, ids_N1 = problem.batch, problem.batch.ids_NS[:, :1].clamp(min=0)
    weights_N1 = batch.token_weights_N[:, None]

    def fn(logprobs: ic.LogProbs, rows: slice) -> Tensor:
        slots = logprobs.logprobs_NK, batch.old_logprobs_NS[rows, :1], batch.advantages_NS[rows, :1]
        return (weights_N1[rows] * LOSSES[name](*slots)).sum()

    loss = ic.row_loss(problem.hidden, problem.weight, ids_N1, fn, bias=problem.bias, max_buffer_bytes=16 * 101 * 4)
    logits = F.linear(problem.hidden, problem.weight, problem.bias)
    plain = fn(ic.LogProbs(logits.log_softmax(-1).gather(1, ids_N1), None, None), slice(None))
    torch.testing.assert_close(loss, plain)
    found, expected = (torch.autograd.grad(x, problem.inputs) for x in (loss, plain))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_clipped_loss_is_distrl_loss_without_candidates():
    problem = make_problem(*SHAPES[0])
    batch = problem.batch

    def fn(logprobs: ic.LogProbs, rows: slice) -> Tensor:
        ratio = (logprobs.logprobs_NK - batch.old_logprobs_NS[rows])[:, 0].exp()
        return (batch.token_weights_N[rows] * clipped(ratio, batch.advantages_NS[rows, 0])).sum()

    own = ic.row_loss(problem.hidden, problem.weight, batch.ids_NS, fn, bias=problem.bias)
    config = ic.PolicyLossConfig(alpha=0.0, clip_low=0.2, clip_high=0.2)
    built_in = ic.distrl_loss(problem.hidden, problem.weight, batch, config, bias=problem.bias).loss
    torch.testing.assert_close(own, built_in)
    found, expected = (torch.autograd.grad(x, problem.inputs) for x in (own, built_in))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# ---- what is refused


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("fn", "got"), [(lambda logprobs, rows: logprobs.lse_N, r"shape \(5,\)"), (lambda logprobs, rows: 1.0, "1.0")]
)
def test_a_function_that_returns_something_else(fn, got, backend):
    hidden, weight = torch.randn(5, 3), torch.randn(7, 3)
    with pytest.raises(ValueError, match=f"fn must return a 0-d tensor, the sum over its rows; got {got}"):
        ic.row_loss(hidden, weight, torch.zeros(5, 1).long(), fn, backend=backend)


def test_a_function_that_holds_a_trained_tensor():
    hidden, weight = torch.randn(5, 3, requires_grad=True), torch.randn(7, 3)
    temperature = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"fn uses a tensor of shape \(2,\) that requires grad: detach it"):
        ic.row_loss(hidden, weight, torch.zeros(5, 1).long(), lambda x, rows: (x.lse_N.sum() * temperature.exp()).sum())


def test_no_second_derivative():
    hidden, weight = torch.randn(5, 3, requires_grad=True), torch.randn(7, 3)
    loss = ic.row_loss(hidden, weight, torch.zeros(5, 1).long(), lambda x, rows: x.lse_N.square().sum())
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)
