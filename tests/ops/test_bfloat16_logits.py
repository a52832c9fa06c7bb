"""`bfloat16_logits`: the loss and gradient are those of the rounded logits; whom it serves, and what it holds."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import ipvrm_core as ic
from ipvrm_core.dispatch import why_no_triton
from ipvrm_core.fused.head import Head
from tests.ops.problems import CONFIGS, Problem, make_problem

N, D, V, K = 37, 13, 301, 5
BUDGET = 6 * V * 8  # 8 rows of bfloat16 logits with a float32 gradient, as on a CPU
needs_triton = pytest.mark.skipif(why_no_triton(torch.empty(0)) is not None, reason="needs Triton or its interpreter")


def exact_problem(**options) -> Problem:
    """hidden, weight and bias in eighths: float32 sums of their products are exact, so the rounding is what differs."""
    problem = make_problem(N, D, V, K, dtype=torch.bfloat16, **options)
    coarse = [((8 * x).round() / 8).detach().requires_grad_() for x in problem.inputs]
    return Problem(*coarse, *[None] * (3 - len(coarse)), problem.batch)


def of_rounded_logits(problem: Problem, loss) -> list[Tensor]:
    """[loss, dh, dW, db] where loss(logits) meets x = h W^T + b rounded, and x's gradient goes on in float32."""
    h, W, *b = (x.detach().float() for x in problem.inputs)
    h = h.masked_fill(problem.batch.masked_N[:, None], 0.0)
    logits = (h @ W.t() + (b[0] if b else 0.0)).to(torch.bfloat16).float().requires_grad_()
    value = loss(logits)
    (G,) = torch.autograd.grad(value, logits)
    return [value.detach(), G @ W, G.t() @ h, *([G.sum(0)] if b else [])]


def own_loss(batch: ic.PolicyBatch):
    def fn(logprobs: ic.LogProbs, rows: slice) -> Tensor:
        terms_n = (logprobs.logprobs_NK - batch.old_logprobs_NS[rows]).exp().sum(1) + logprobs.lse_N.square()
        return (batch.token_weights_N[rows] * terms_n).sum()

    return fn


def check(got: list[Tensor], want: list[Tensor]) -> None:
    """Of gradients bfloat16 keeps 8 digits; db sums products that were rounded one by one."""
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
    for one, other in zip(got[1:], want[1:], strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.float(), other, rtol=2**-7, atol=2**-8 * other.abs().max().item())


@needs_triton
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["paper", "softcap", "everything"])
def test_distrl_loss_is_that_of_the_rounded_logits(name, bias):
    config = CONFIGS[name]
    problem = exact_problem(bias=bias, temperature=config.temperature, softcap=config.softcap)
    head, options = problem.inputs[:2], {"bias": problem.bias, "max_buffer_bytes": BUDGET}
    loss = ic.distrl_loss(*head, problem.batch, config, bfloat16_logits=True, **options).loss
    got = [loss.detach(), *torch.autograd.grad(loss, problem.inputs)]
    want = of_rounded_logits(
        problem, lambda x: ic.distrl_loss_from_logits(x, problem.batch, config, backend="chunked").loss
    )
    check(got, want)
    assert loss != ic.distrl_loss(*head, problem.batch, config, **options).loss  # there is something to round


@needs_triton
@pytest.mark.parametrize("near", [False, True])
def test_row_loss_is_that_of_the_rounded_logits(near):
    problem = exact_problem()
    batch = problem.batch = replace(problem.batch, token_weights_N=torch.rand(N) + 0.1)
    ids, fn = batch.ids_NS, own_loss(batch)
    options = {"near": batch.old_logprobs_NS[:, 0] if near else None, "max_buffer_bytes": BUDGET}
    loss = ic.row_loss(*problem.inputs[:2], ids, fn, bias=problem.bias, bfloat16_logits=True, **options)
    got = [loss.detach(), *torch.autograd.grad(loss, problem.inputs)]
    check(got, of_rounded_logits(problem, lambda x: ic.row_loss_from_logits(x, ids, fn, backend="chunked")))


@pytest.mark.parametrize(("with_gradient", "bytes_per_logit"), [(False, 2), (True, 2 + 4)])
def test_the_buffer_is_bfloat16_and_counted_as_such(with_gradient, bytes_per_logit):
    """On a CPU the gradient is float32, the type of the products there."""
    hidden, weight = torch.randn(3000, D).bfloat16(), torch.randn(V, D).bfloat16()
    budget = 1000 * V * 6
    options = {"apart": True, "with_gradient": with_gradient}
    head = Head(hidden, weight, None, budget, bfloat16_logits=True, **options)
    assert head.buffer.dtype == torch.bfloat16
    assert head.n == budget // (V * bytes_per_logit) // 128 * 128
    assert head.n > Head(hidden, weight, None, budget, **options).n


@pytest.mark.parametrize(
    ("dtypes", "backend", "message"),
    [
        ("bb", "chunked", "bfloat16_logits needs backend 'triton'; got 'chunked'"),
        ("bb", "reference", "bfloat16_logits needs backend 'triton'; got 'reference'"),
        pytest.param("fb", "triton", "needs hidden in torch.bfloat16; got torch.float32", marks=needs_triton),
        pytest.param("bf", "triton", "needs weight in torch.bfloat16; got torch.float32", marks=needs_triton),
    ],
)
def test_anything_else_is_refused(dtypes, backend, message):
    problem = make_problem(4, 3, 11, 2)
    kinds = {"b": torch.bfloat16, "f": torch.float32}
    head = [x.detach().to(kinds[kind]) for x, kind in zip(problem.inputs, dtypes, strict=False)]
    options = {"bfloat16_logits": True, "backend": backend}
    with pytest.raises(ValueError, match=message):
        ic.distrl_loss(*head, problem.batch, **options)
    with pytest.raises(ValueError, match=message):
        ic.row_loss(*head, problem.batch.ids_NS, own_loss(problem.batch), **options)


def test_a_split_head_is_refused():
    problem, shard = make_problem(4, 3, 10, 2), ic.VocabularyShard("any", 0, 20, 10)
    with pytest.raises(ValueError, match="bfloat16_logits is for a whole head; got VocabularyShard"):
        ic.distrl_loss(problem.hidden, problem.weight, problem.batch, shard=shard, bfloat16_logits=True)
