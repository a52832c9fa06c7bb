"""Log-probs under a sampler's truncation: against the sampler taken at its word, one token at a time, in float64."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

import ipvrm_core as ic
from ipvrm_core.reference import logprobs as reference
from tests.ops.problems import logprobs_and_gradients, make_problem

INF = math.inf
RULES = [
    ic.Truncation(*values)
    for values in product((None, 1, 4, 1000), (None, 0.3, 0.9, 1.0), (None, 0.02, 1.0))
    if values != (None, None, None)
]
CUT = ic.Truncation(top_k=7, top_p=0.8, min_p=0.01)


def distribution(logits: list[float], rule: ic.Truncation) -> list[float]:
    """The probability of every token, by removing tokens as a sampler does: min-p, top-k, top-p."""
    weights = {v: math.exp(x) for v, x in enumerate(logits)}
    if rule.min_p is not None:
        largest = max(weights.values())
        weights = {v: w for v, w in weights.items() if w >= rule.min_p * largest}
    if rule.top_k is not None and len(weights) > rule.top_k:
        least = sorted(weights.values(), reverse=True)[rule.top_k - 1]
        weights = {v: w for v, w in weights.items() if w >= least}
    if rule.top_p is not None and rule.top_p < 1:
        total = sum(weights.values())
        weights = {v: w for v, w in weights.items() if sum(u for u in weights.values() if u > w) < rule.top_p * total}
    total = sum(weights.values())
    return [weights.get(v, 0.0) / total for v in range(len(logits))]


def log(p: list[float]) -> Tensor:
    return torch.tensor(p, dtype=torch.float64).log()


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_distribution_of_the_sampler(rule, backend):
    """Rows without and with equal logits (quarters), of which several stand at the borders."""
    smooth, coarse = 2 * torch.randn(5, 31, dtype=torch.float64), torch.randn(5, 31, dtype=torch.float64)
    logits = torch.cat([smooth, (4 * coarse).round() / 4])
    ids = torch.arange(31).expand(10, 31)
    got = ic.logprobs_from_logits(logits, ids, truncation=rule, backend=backend, max_buffer_bytes=8 * 31 * 9)
    p = torch.tensor([distribution(row, rule) for row in logits.tolist()], dtype=torch.float64)
    torch.testing.assert_close(got.logprobs_NK, p.log(), rtol=0, atol=1e-12)
    torch.testing.assert_close(got.entropy_N, -torch.xlogy(p, p).sum(-1), rtol=0, atol=1e-12)
    kept = logits.masked_fill(p == 0, -INF).logsumexp(-1)
    torch.testing.assert_close(got.lse_N, kept, rtol=0, atol=1e-12)


LOGS = torch.tensor([[math.log(x) for x in (1, 2, 3, 3, 1)]], dtype=torch.float64)  # sum 10


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize(
    ("rule", "p"),
    [
        (ic.Truncation(top_k=1), [0, 0, 1 / 2, 1 / 2, 0]),  # both of the largest
        (ic.Truncation(top_k=3), [0, 2 / 8, 3 / 8, 3 / 8, 0]),
        (ic.Truncation(top_k=4), [0.1, 0.2, 0.3, 0.3, 0.1]),  # the fourth and its equal
        (ic.Truncation(top_p=0.59), [0, 0, 1 / 2, 1 / 2, 0]),  # above the second of the equals lie 0, not 3
        (ic.Truncation(top_p=0.61), [0, 2 / 8, 3 / 8, 3 / 8, 0]),
        (ic.Truncation(top_p=0.81), [0.1, 0.2, 0.3, 0.3, 0.1]),
        (ic.Truncation(top_p=1.0), [0.1, 0.2, 0.3, 0.3, 0.1]),
        (ic.Truncation(min_p=0.6), [0, 2 / 8, 3 / 8, 3 / 8, 0]),
        (ic.Truncation(top_k=3, top_p=0.7), [0, 0, 1 / 2, 1 / 2, 0]),  # 6 of 8 are not below 0.7, of 10 they would be
        (ic.Truncation(top_p=0.7, min_p=0.6), [0, 0, 1 / 2, 1 / 2, 0]),  # the same: min-p comes before top-p
    ],
    ids=str,
)
def test_rows_worked_out_by_hand(rule, p, backend):
    got = ic.logprobs_from_logits(LOGS, torch.arange(5)[None], truncation=rule, backend=backend)
    torch.testing.assert_close(got.logprobs_NK, log([p]), rtol=0, atol=1e-12)


def test_a_token_above_which_lies_exactly_top_p_is_out():
    logits = torch.tensor([[0.0, -1.0]], dtype=torch.float64)
    total = logits.exp().sum().item()
    assert 1 / total * total == 1.0
    for top_p, kept in ((1 / total, 1), (math.nextafter(1 / total, 1), 2)):
        got = ic.logprobs_from_logits(logits, torch.tensor([[0, 1]]), truncation=ic.Truncation(top_p=top_p))
        assert got.logprobs_NK.isfinite().sum() == kept


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_ids_outside_and_padding(backend):
    ids = torch.tensor([[0, -1, 2, -5, 2]])
    got = ic.logprobs_from_logits(LOGS, ids, truncation=ic.Truncation(top_k=3), backend=backend)
    assert got.logprobs_NK[0].tolist() == pytest.approx([-INF, 0.0, math.log(3 / 8), 0.0, math.log(3 / 8)])


@pytest.mark.parametrize("use", ["logprobs", "lse", "entropy", "all"])
@pytest.mark.parametrize("transform", [{}, {"temperature": 0.6, "softcap": 5.0}], ids=["plain", "transformed"])
def test_gradients_in_float64(use, transform):
    """The softmax over the set that is left. Of -inf no gradient comes back, whatever goes in."""
    problem = make_problem(19, 6, 101, 9, dtype=torch.float64, **transform)
    ids = problem.batch.ids_NS
    options = {"bias": problem.bias, "truncation": CUT, **transform}

    def finite(backend: str) -> list[Tensor]:
        out = ic.linear_logprobs(
            problem.hidden, problem.weight, ids, backend=backend, max_buffer_bytes=8 * 101 * 7, **options
        )
        outside = out.logprobs_NK == -INF
        assert outside.any()
        assert not outside.all()
        out = out._replace(logprobs_NK=out.logprobs_NK.masked_fill(outside, 0.0))
        return [outside, *logprobs_and_gradients(out, problem.inputs, use)]

    for got, want in zip(finite("chunked"), finite("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_minus_infinity_has_no_gradient(backend):
    """Nor has the set: whatever flows into -inf reaches nothing."""
    logits, rule = LOGS.clone().requires_grad_(), ic.Truncation(top_p=0.59)
    out = ic.logprobs_from_logits(logits, torch.tensor([[0, 2]]), truncation=rule, backend=backend)
    assert out.logprobs_NK[0, 0] == -INF
    (grad,) = torch.autograd.grad(out.logprobs_NK, logits, torch.tensor([[5.0, 1.0]], dtype=torch.float64))
    torch.testing.assert_close(grad, torch.tensor([[0, 0, 0.5, -0.5, 0]], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [ic.Truncation(top_k=20), ic.Truncation(top_p=0.9), CUT], ids=str)
def test_half_and_single_precision(rule, dtype):
    """The default backend (the kernels', where they run) takes the set of the same logits in float64.

    A token whose float32 sum is within rounding of top_p could go either way: there is none among these.
    """
    problem = make_problem(23, 13, 301, 5, dtype=dtype)
    args = (problem.hidden, problem.weight, problem.batch.ids_NS)
    got = ic.linear_logprobs(*args, bias=problem.bias, temperature=0.7, truncation=rule)
    wide = problem.to(torch.float64)
    want = reference.linear_logprobs(
        wide.hidden, wide.weight, problem.batch.ids_NS, bias_V=wide.bias, temperature=0.7, truncation=rule
    )
    for one, other in zip(got, want, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_nan_shows_and_stays_in_its_row():
    logits = torch.randn(3, 40)
    logits[1, 7] = math.nan
    got = ic.logprobs_from_logits(logits, torch.zeros(3, 1, dtype=torch.int64), truncation=CUT)
    assert got.lse_N.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"top_k": 0}, "top_k must be an integer >= 1, or None for all tokens; got 0"),
        ({"top_k": -1}, "top_k must be an integer >= 1, or None for all tokens; got -1"),
        ({"top_k": 2.5}, "top_k must be an integer >= 1, or None for all tokens; got 2.5"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], or None for all tokens; got 0.0"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\], or None for all tokens; got 1.1"),
        ({"min_p": math.nan}, r"min_p must be in \(0, 1\], or None for all tokens; got nan"),
    ],
)
def test_what_is_no_rule(rule, message):
    with pytest.raises(ValueError, match=message):
        ic.Truncation(**rule)


def test_a_split_head_is_refused():
    problem, shard = make_problem(4, 3, 10, 2), ic.VocabularyShard("any", 0, 20, 10)
    with pytest.raises(ValueError, match="truncation needs the whole head; got VocabularyShard"):
        ic.linear_logprobs(problem.hidden, problem.weight, problem.batch.ids_NS, shard=shard, truncation=CUT)
