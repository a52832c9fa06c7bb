"""The chunked backend against the reference, forward and backward.

The error criterion, truth being the reference in float64: |truth - ours| <= 2 |truth - torch in the same dtype| + tol.
"torch in the same dtype" is F.linear in that dtype, then log_softmax in float32 and autograd.
"""

import math
from dataclasses import dataclass, fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ipvrm_core as ic
from ipvrm_core.reference import logprobs as ref_logprobs
from ipvrm_core.reference import policy_loss as ref_loss

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float64: 1e-13}  # of the largest entry of the truth
SHAPES = [(37, 13, 101, 10), (1, 7, 129, 10), (5, 1, 1, 1), (4, 3, 2, 0), (9, 32, 1187, 4)]  # N, D, V, K


@dataclass
class Problem:
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    batch: ic.PolicyBatch

    @property
    def inputs(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    def to(self, dtype: torch.dtype) -> "Problem":
        cast = [
            None if x is None else x.detach().to(dtype).requires_grad_() for x in (self.hidden, self.weight, self.bias)
        ]
        return Problem(*cast, self.batch)


def make_problem(N, D, V, K, *, dtype=torch.float32, bias=True, scale=3.0, shift=0.0, temperature=1.0) -> Problem:
    """Ratios spread over 0.5..2; every fourth candidate is padding; slot 0 repeats the sampled id in odd rows."""
    torch.manual_seed(0)
    hidden, weight, bias_V = torch.randn(N, D) * scale / D**0.5, torch.randn(V, D), torch.randn(V) + shift
    head = Problem(hidden, weight, bias_V if bias else None, None).to(dtype).to(torch.float64)
    sampled = torch.randint(V, (N,))
    candidates = torch.randint(V, (N, K)).where(torch.rand(N, K) > 0.25, -1)
    if K:
        candidates[1::2, 0] = sampled[1::2]
    ids = torch.cat([sampled[:, None], candidates], dim=1)
    with torch.no_grad():
        logits = F.linear(head.hidden, head.weight, head.bias)
        logp = ref_logprobs.logprobs_from_logits(logits, ids, temperature=temperature).logprobs_NK
    old = (logp + 0.4 * torch.randn(N, 1 + K)).masked_fill(ids < 0, 0.0)
    batch = ic.PolicyBatch(
        sampled_ids_N=sampled,
        old_logprobs_N=old[:, 0],
        advantages_N=torch.randn(N),
        token_weights_N=torch.rand(N) / N * (torch.rand(N) > 0.2),
        candidate_ids_NK=candidates,
        candidate_old_logprobs_NK=old[:, 1:],
        candidate_advantages_NK=torch.randn(N, K),
        candidate_weights_N=torch.rand(N) / N * (torch.rand(N) > 0.2),
        ref_logprobs_N=old[:, 0] + 0.3 * torch.randn(N),
    )
    return replace(head.to(dtype), batch=batch)


def assert_no_worse(ours: list[Tensor], torch_same: list[Tensor], truth: list[Tensor], tolerance: float) -> None:
    for i, (got, same, exact) in enumerate(zip(ours, torch_same, truth, strict=True)):
        assert got.shape == exact.shape
        if not exact.numel():
            continue
        error, allowed = (got.double() - exact).abs().max(), (same.double() - exact).abs().max()
        bound = 2 * allowed + tolerance * exact.abs().max().clamp(min=1)
        assert error <= bound, f"output {i}: error {error:.2e} > {bound:.2e} (torch in the same dtype: {allowed:.2e})"


def loss_and_gradients(output: ic.PolicyLossOutput, inputs: list[Tensor], upstream: float) -> list[Tensor]:
    """Gradients first scaled back, so that a lost upstream factor shows as a factor."""
    gradients = torch.autograd.grad(output.loss * upstream, inputs)
    return [output.loss.detach(), *output.metrics.values(), *gradients]


def check_loss(problem: Problem, config: ic.PolicyLossConfig, upstream=3.0, tolerance=None, **options) -> None:
    dtype, wide = problem.hidden.dtype, problem.to(torch.float64)
    naive_logits = F.linear(problem.hidden, problem.weight, problem.bias)
    naive = loss_and_gradients(
        ref_loss.distrl_loss_from_logits(naive_logits, problem.batch, config), problem.inputs, upstream
    )
    truth = loss_and_gradients(
        ref_loss.distrl_loss(wide.hidden, wide.weight, wide.batch, config, bias_V=wide.bias), wide.inputs, upstream
    )
    ours = loss_and_gradients(
        ic.distrl_loss(problem.hidden, problem.weight, problem.batch, config, bias=problem.bias, **options),
        problem.inputs,
        upstream,
    )
    assert [x.dtype for x in ours[-len(problem.inputs) :]] == [dtype] * len(problem.inputs)
    assert_no_worse(ours, naive, truth, tolerance or TOLERANCE[dtype])


CONFIGS = {
    "paper": ic.PolicyLossConfig(),
    "temperature": ic.PolicyLossConfig(temperature=0.6),
    "grpo": ic.PolicyLossConfig(alpha=0.0),
    "asymmetric": ic.PolicyLossConfig(alpha=2.0, clip_low=0.05, clip_high=0.6, candidate_clip_low=0.5),
    "dual_clip": ic.PolicyLossConfig(
        alpha=1.0, clip_high=9.0, dual_clip=1.3, candidate_clip_high=9, candidate_dual_clip=1.2
    ),
    "kl": ic.PolicyLossConfig(kl_coef=0.7),
    "entropy": ic.PolicyLossConfig(entropy_coef=0.5),
    "everything": ic.PolicyLossConfig(
        1.5, 0.1, 0.3, 1.6, 0.2, 0.1, 1.4, temperature=1.7, kl_coef=0.2, entropy_coef=0.3
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_settings(name, dtype):
    problem = make_problem(*SHAPES[0], dtype=dtype, temperature=CONFIGS[name].temperature)
    check_loss(problem, CONFIGS[name], max_buffer_bytes=16 * 101 * 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
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


def logprobs_and_gradients(output: ic.LogProbs, inputs: list[Tensor], use: str) -> list[Tensor]:
    """Every output with its own weights, or one of them alone, so that absent gradients are met too."""
    total = 0.0
    for name, value in zip(("logprobs", "lse", "entropy"), output, strict=True):
        if use in (name, "all"):
            weights = torch.linspace(-1, 2, max(value.numel(), 1), dtype=torch.float64)[: value.numel()].view(
                value.shape
            )
            total = total + (weights * value).sum()
    return [*(value.detach() for value in output), *torch.autograd.grad(total, inputs)]


def check_logprobs(problem: Problem, temperature: float, use="all", tolerance=None, **options) -> None:
    wide, ids = problem.to(torch.float64), problem.batch.ids_NK
    naive_logits = F.linear(problem.hidden, problem.weight, problem.bias)
    naive = logprobs_and_gradients(
        ref_logprobs.logprobs_from_logits(naive_logits, ids, temperature=temperature), problem.inputs, use
    )
    truth = logprobs_and_gradients(
        ref_logprobs.linear_logprobs(wide.hidden, wide.weight, ids, bias_V=wide.bias, temperature=temperature),
        wide.inputs,
        use,
    )
    got = ic.linear_logprobs(problem.hidden, problem.weight, ids, bias=problem.bias, temperature=temperature, **options)
    ours = logprobs_and_gradients(got, problem.inputs, use)
    assert (ours[0] == 0)[ids < 0].all()
    assert_no_worse(ours, naive, truth, tolerance or TOLERANCE[problem.hidden.dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("use", ["logprobs", "lse", "entropy", "all"])
def test_logprobs(use, shape, dtype):
    problem = make_problem(*shape, dtype=dtype, bias=use != "all")
    check_logprobs(problem, 0.7, use, max_buffer_bytes=3 * 16 * shape[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_from_logits_equals_the_reference_on_the_same_logits(dtype):
    """Same logits, so only the order of a few operations differs; the gradient comes in the dtype of the logits."""
    problem = make_problem(17, 5, 103, 6)
    config = CONFIGS["everything"]
    logits = (torch.randn(17, 103) * 3).to(dtype).requires_grad_()
    got, want = [], []
    for backend, out in (("chunked", got), ("reference", want)):
        loss = ic.distrl_loss_from_logits(logits, problem.batch, config, backend=backend, max_buffer_bytes=5000)
        out += loss_and_gradients(loss, [logits], -2.0)
        rows = ic.logprobs_from_logits(
            logits, problem.batch.ids_NK, temperature=0.7, backend=backend, max_buffer_bytes=5000
        )
        out += logprobs_and_gradients(rows, [logits], "all")
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-12}[dtype]
    for ours, reference in zip(got, want, strict=True):
        assert ours.dtype == reference.dtype
        torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)


def test_given_logits_are_not_written_to():
    problem = make_problem(8, 5, 33, 3)
    logits = torch.randn(8, 33)
    before = logits.clone()
    ic.distrl_loss_from_logits(logits.requires_grad_(), problem.batch).loss.backward()
    ic.logprobs_from_logits(logits, problem.batch.ids_NK).logprobs_NK.sum().backward()
    ic.select_candidates_from_logits(logits, problem.batch.sampled_ids_N)
    assert torch.equal(logits, before)


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
            total = ic.linear_logprobs(problem.hidden, problem.weight, problem.batch.ids_NK, bias=problem.bias)[0].sum()
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
        rows = ic.linear_logprobs(problem.hidden, problem.weight, problem.batch.ids_NK, **options)
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
    first, second = (ic.linear_logprobs(h, problem.weight, problem.batch.ids_NK) for h in (problem.hidden, other))
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


@pytest.mark.parametrize("backend", ["chunked", "reference"])
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
    batch = replace(
        batch,
        token_weights_N=torch.zeros(9),
        candidate_weights_N=torch.ones(9),
        candidate_ids_NK=torch.full_like(batch.candidate_ids_NK, -1),
    )
    output = ic.distrl_loss(problem.hidden, problem.weight, batch, CONFIGS["everything"], bias=problem.bias)
    assert output.loss.item() == 0.0
    assert all(gradient.count_nonzero() == 0 for gradient in torch.autograd.grad(output.loss, problem.inputs))


def test_junk_in_padded_slots_is_never_read():
    """The log-probs and advantages under a padded id may be anything, NaN and inf too."""
    problem = make_problem(9, 6, 65, 4)
    batch, padding = problem.batch, problem.batch.candidate_ids_NK < 0
    assert padding.any()
    junk = replace(
        batch,
        candidate_old_logprobs_NK=batch.candidate_old_logprobs_NK.masked_fill(padding, math.inf),
        candidate_advantages_NK=batch.candidate_advantages_NK.masked_fill(padding, math.nan),
    )
    results = [
        loss_and_gradients(ic.distrl_loss(problem.hidden, problem.weight, b, bias=problem.bias), problem.inputs, 1.0)
        for b in (batch, junk)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_a_row_of_weight_zero_may_hold_anything(backend):
    """Garbage in masked rows changes neither loss, metrics nor gradients: 0 * inf never reaches a sum."""
    problem = make_problem(9, 6, 65, 4)
    weights = problem.batch.token_weights_N.clone()
    weights[2] = weights[5] = 0.0
    clean = replace(problem.batch, token_weights_N=weights, candidate_weights_N=weights)
    dead = weights == 0
    garbage = replace(
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
    batch = ic.PolicyBatch(
        torch.tensor([2]), logp[:, 2], 2 * one, one, ids, logp[:, [2, 2]], torch.tensor([[5.0, -1.0]]).double(), one
    )
    ic.distrl_loss_from_logits(logits, batch, ic.PolicyLossConfig(alpha=0.5)).loss.backward()
    # c = -rho A w: -2 for the sampled slot, 0.5 * 0.3 * (-5 + 1) = -0.6 for the candidates; dL/dz = c (onehot - p)
    expected = -2.6 * (torch.tensor([[0.0, 0.0, 1.0, 0.0]]) - torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
    torch.testing.assert_close(logits.grad, expected.double(), rtol=1e-7, atol=1e-7)


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


def test_non_contiguous_inputs():
    problem = make_problem(12, 6, 65, 4)
    expected = loss_and_gradients(
        ic.distrl_loss(problem.hidden, problem.weight, problem.batch), problem.inputs[:2], 1.0
    )
    hidden = problem.hidden.detach().t().contiguous().t().requires_grad_()
    weight = torch.stack([problem.weight.detach()] * 2, dim=-1)[..., 0].requires_grad_()
    values = {f.name: getattr(problem.batch, f.name) for f in fields(problem.batch)}
    batch = ic.PolicyBatch(**{name: torch.stack([x, x], dim=-1)[..., 0] for name, x in values.items()})
    assert not any(x.is_contiguous() for x in (hidden, weight, batch.advantages_N, batch.candidate_ids_NK))
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
        return tuple(ic.linear_logprobs(hidden, weight, problem.batch.ids_NK, bias=bias, temperature=temperature))

    assert torch.autograd.gradcheck(loss, problem.inputs)
    assert torch.autograd.gradcheck(rows, problem.inputs)


def test_same_bits_twice():
    problem = make_problem(70, 16, 501, 10)
    runs = [
        loss_and_gradients(ic.distrl_loss(problem.hidden, problem.weight, problem.batch), problem.inputs[:2], 1.0)
        for _ in range(2)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_on_cuda(bias, dtype):
    """The paths that only exist there: tensor-core products with float32 results, slot-by-slot scatter."""
    problem = make_problem(300, 64, 1187, 10, dtype=dtype, bias=bias)
    problem = replace(
        problem,
        batch=problem.batch.to("cuda"),
        **{
            name: None if value is None else value.detach().cuda().requires_grad_()
            for name, value in (("hidden", problem.hidden), ("weight", problem.weight), ("bias", problem.bias))
        },
    )
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    check_loss(problem, replace(CONFIGS["everything"], temperature=1.0), tolerance=tolerance, max_buffer_bytes=400_000)
    check_logprobs(problem, 0.7, tolerance=tolerance, max_buffer_bytes=400_000)
    found = [
        ic.select_candidates(problem.hidden, problem.weight, problem.batch.sampled_ids_N, backend=b)
        for b in ("chunked", "reference")
    ]
    torch.testing.assert_close(found[0].entropy_N, found[1].entropy_N, rtol=1e-3, atol=1e-3)
