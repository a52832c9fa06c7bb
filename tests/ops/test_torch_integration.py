"""The chunked backend inside torch: operator checks, compilation, autocast, memory, second derivatives."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ipvrm_core as ic
from ipvrm_core.dispatch import why_no_triton
from ipvrm_core.fused.distrl_loss import distrl_loss as distrl_loss_op
from ipvrm_core.fused.distrl_loss import pack_batch, pack_config
from ipvrm_core.fused.head import rows_per_chunk
from ipvrm_core.fused.linear_logprobs import linear_logprobs as linear_logprobs_op
from ipvrm_core.fused.linear_logprobs import linear_logprobs_backward as backward_op
from ipvrm_core.fused.rows import TorchRows
from ipvrm_core.fused.select_candidates import select_candidates as select_candidates_op
from ipvrm_core.fused.td_errors import linear_td_errors as td_errors_op
from ipvrm_core.fused.transform import LogitTransform

N, D, V, K = 20, 6, 67, 3
CONFIG = ic.PolicyLossConfig(dual_clip=3.0, temperature=0.7, softcap=9.0, kl_coef=0.1, entropy_coef=0.1)
TRITON = why_no_triton(torch.empty(0)) is None  # `make test` runs this file a second time under the interpreter


def inputs(dtype=torch.float32, weight_grad=True):
    torch.manual_seed(0)
    hidden = torch.randn(N, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=weight_grad)
    ids = torch.randint(-1, V, (N, K))
    old = -torch.rand(N, 1 + K) - 3
    ids = torch.cat([torch.randint(V, (N, 1)), ids], dim=1)
    batch = ic.PolicyBatch(ids, old, torch.randn(N, 1 + K), torch.rand(N), torch.rand(N), old[:, 0])
    return hidden, weight, batch


def op_arguments(batch, need):
    return pack_batch(batch), pack_config(CONFIG), "", False, 2 * 4 * V * 7, TRITON, need


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("linear", [False, True])
def test_opcheck(linear, bias):
    hidden, weight, batch = inputs()
    bias_V = torch.randn(V, requires_grad=True) if bias and linear else None
    if not linear:
        hidden, weight = torch.randn(N, V, requires_grad=True), None
    head = (hidden, weight, bias_V)
    frozen = tuple(None if x is None else x.detach() for x in head)
    need = [x is not None for x in head]
    budget = 2 * 4 * V * 7
    torch.library.opcheck(distrl_loss_op, (*head, *op_arguments(batch, need)))
    torch.library.opcheck(distrl_loss_op, (*frozen, *op_arguments(batch, [False] * 3)))
    settings = (0.7, None, 20.0, "", budget, TRITON)
    grads = (torch.randn(N, 1 + K), None, torch.randn(N))
    for cut in ([], ic.Truncation(top_k=40, top_p=0.9).packed()):
        with_cut = (*settings[:3], cut, *settings[3:])
        torch.library.opcheck(linear_logprobs_op, (*head, batch.ids_NS, None, *with_cut))
        _, _, *statistics = linear_logprobs_op(*frozen, batch.ids_NS, batch.old_logprobs_NS[:, 0], *with_cut)
        torch.library.opcheck(backward_op, (*grads, *statistics, *frozen, batch.ids_NS, *with_cut, need))
    torch.library.opcheck(td_errors_op, (*frozen, batch.ids_NS, torch.randn(N, 1 + K), 10.0, *settings))
    exclude = torch.arange(N) % 2 == 0
    rule = (0.1, False, 2, True)
    torch.library.opcheck(select_candidates_op, (*frozen, batch.ids_NS[:, 0], exclude, *rule, *settings))


def all_functions(hidden, weight, batch, inplace=False):
    """One scalar through every public function; the candidates' log-probs are constants."""
    rows = ic.linear_logprobs(hidden, weight, batch.ids_NS, temperature=0.7)
    found = ic.select_candidates(hidden, weight, batch.ids_NS[:, 0], keep_sampled=True)
    loss = ic.distrl_loss(hidden, weight, batch, CONFIG)
    from_logits = ic.distrl_loss_from_logits(hidden @ weight.t(), batch, CONFIG, inplace=inplace).loss
    return (
        loss.loss
        + loss.metrics["ratio"]
        + rows.logprobs_NK.sum()
        + rows.entropy_N.sum()
        + from_logits
        + (found.logprobs_NS[:, 1:].sum() + found.counts_N.sum())
        + ic.linear_td_errors(hidden, weight, batch.ids_NS, batch.old_logprobs_NS, 10.0).sum()
    )


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own, on the first use of inductor
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, tracing a Function
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(("weight_grad", "inplace"), [(True, False), (False, False), (True, True)])
def test_compile_without_a_graph_break(backend, weight_grad, inplace):
    hidden, weight, batch = inputs(weight_grad=weight_grad)
    wanted = [hidden, weight] if weight_grad else [hidden]
    expected = all_functions(hidden, weight, batch)
    got = torch.compile(all_functions, fullgraph=True, backend=backend)(hidden, weight, batch, inplace)
    torch.testing.assert_close(got, expected)
    for one, other in zip(torch.autograd.grad(got * 2, wanted), torch.autograd.grad(expected * 2, wanted), strict=True):
        torch.testing.assert_close(one, other)


def test_autocast_changes_nothing():
    """The products stay float32 inside an autocast region: log-probabilities are what the region is left for."""
    hidden, weight, batch = inputs()

    def gradients():
        total = (
            ic.distrl_loss(hidden, weight, batch, CONFIG).loss
            + ic.linear_logprobs(hidden, weight, batch.ids_NS)[0].sum()
        )
        return torch.autograd.grad(total, [hidden, weight])

    plain = gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gradients()
    assert all(torch.equal(one, other) for one, other in zip(plain, inside, strict=True))


def test_the_reference_leaves_autocast_too():
    """Its products are float32 inside the region; the backward belongs outside, as always in torch."""
    hidden, weight, batch = inputs()
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = ic.distrl_loss(hidden, weight, batch, CONFIG, backend="reference").loss
        results.append([loss, *torch.autograd.grad(loss, [hidden, weight])])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


class LargestTensor(TorchDispatchMode):
    """Numel of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor) and value._base is None:
                self.numel = max(self.numel, value.numel())
        return out


def test_nothing_of_size_tokens_times_vocabulary_is_made():
    hidden, weight, batch = inputs()
    rows = 4
    options = {"max_buffer_bytes": 4 * V * (rows + 1)}
    with LargestTensor() as largest:
        ic.select_candidates(hidden, weight, batch.ids_NS[:, 0], **options)
        ic.linear_logprobs(hidden, weight, batch.ids_NS, truncation=ic.Truncation(top_p=0.9), **options)
        loss = ic.distrl_loss(hidden, weight, batch, CONFIG, **options).loss
        (loss + ic.linear_logprobs(hidden, weight, batch.ids_NS, **options).entropy_N.sum()).backward()
    assert largest.numel == max(rows * V, V * D)
    with LargestTensor() as largest:  # the instrument sees what it is for
        ic.distrl_loss(hidden, weight, batch, CONFIG, backend="reference")
    assert largest.numel >= N * V


@pytest.mark.parametrize(
    ("n_rows", "budget", "expected"),
    [
        (1000, 1, 1),
        (1000, 8 * V * 3, 3),
        (1000, 8 * V * 100, 100),
        (1000, 8 * V * 130, 128),
        (1000, 8 * V * 400, 384),
        (50, 1 << 30, 50),
        (0, 1, 1),
    ],
)
def test_rows_per_chunk(n_rows, budget, expected):
    assert rows_per_chunk(n_rows, V, 8, budget) == expected


@pytest.fixture
def unwritten_memory_is_nan():
    torch.use_deterministic_algorithms(True)  # torch.utils.deterministic.fill_uninitialized_memory is on by default
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("rows", [0, 7, N])
def test_the_first_chunk_writes_the_gradient_of_the_weight(unwritten_memory_is_nan, rows):
    assert torch.empty(3).isnan().all()
    hidden, weight, batch = inputs()
    hidden, batch = hidden[:rows], batch.rows(slice(rows))

    def gradient(**options):
        return torch.autograd.grad(ic.distrl_loss(hidden, weight, batch, CONFIG, **options).loss, weight)[0]

    expected = gradient(backend="reference")
    allowed = 1e-5 * expected.abs().max().item()  # of float32 sums in another order
    torch.testing.assert_close(gradient(max_buffer_bytes=4 * V * 5), expected, rtol=1e-5, atol=allowed)


@pytest.mark.parametrize("rows", [7, 40, 1000])
def test_buffers_fit_the_budget(rows):
    """Down to the smallest budget that holds a row of logits and a row of scratch."""
    budget = 4 * V * rows
    work = TorchRows(torch.randn(100, D), torch.randn(V, D), None, LogitTransform(), budget)
    chunks = [(rows, x.nbytes) for rows, x in work.head.chunks()]
    assert torch.cat([torch.arange(100)[rows] for rows, _ in chunks]).tolist() == list(range(100))
    assert max(size for _, size in chunks) + work.scratch.nbytes <= budget


def test_second_derivatives_are_refused():
    hidden, weight, batch = inputs()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(ic.distrl_loss(hidden, weight, batch).loss, hidden, create_graph=True)
    (first,) = torch.autograd.grad(
        ic.linear_logprobs(hidden, weight, batch.ids_NS).logprobs_NK.sum(), hidden, create_graph=True
    )
    with pytest.raises(RuntimeError, match="autograd"):
        first.sum().backward()


def test_backward_twice_gives_the_same_or_is_refused():
    """The kernels' gradient is given away, scaled in place."""
    hidden, weight, batch = inputs()
    loss = ic.distrl_loss(hidden, weight, batch).loss
    if TRITON:
        torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
        with pytest.raises(RuntimeError, match="gave the gradient of this loss away"):
            torch.autograd.grad(loss, [hidden, weight])
        return
    first, second = (torch.autograd.grad(loss, [hidden, weight], retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    doubled = torch.autograd.grad(2 * loss, [hidden, weight], retain_graph=True)
    torch.testing.assert_close(doubled, tuple(2 * grad for grad in first), rtol=0, atol=0)
    first[1].zero_()  # the very memory that is kept where the upstream gradient is 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, [hidden, weight])


@pytest.mark.skipif(TRITON, reason="a second backward is refused")
def test_what_is_kept_for_a_second_backward_is_not_added_to():
    """Where the upstream gradient is 1 the kept memory is given out: to a parameter only as a copy."""
    hidden, weight, batch = inputs()
    loss = ic.distrl_loss(hidden, weight, batch).loss
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(weight.grad, 3 * once)
