"""Scans and sums inside sequences. Truth is float64; the error may be twice that of torch in float32."""

import pytest
import torch

from ipvrm_core.kernels import segments as kernels
from ipvrm_core.packing import cu_seqlens_from_lengths
from ipvrm_core.sequences import torch_segments as reference
from ipvrm_core.sequences import triton_segments as ops

DECAYS = [1.0, 0.95, 0.0]
DIRECTIONS = pytest.mark.parametrize("reverse", [False, True])


def ragged(device, *lengths):
    """x [N] around 1, so that sums grow, and cu_seqlens [B+1]. A length that is a float is in blocks of the kernel."""
    block = kernels.launch(device)["BLOCK"]
    lengths = torch.tensor([round(n * block) if isinstance(n, float) else n for n in lengths], dtype=torch.int64)
    return torch.randn(int(lengths.sum()), device=device) + 1, cu_seqlens_from_lengths(lengths).to(device)


def edges(device):
    """One token, none, about one block less or more, several blocks, the empty sequence first, inside and last."""
    block = kernels.launch(device)["BLOCK"]
    return ragged(device, 0, 1, block - 1, block, 0, 0, block + 1, 3.4, 2.0, 7, 2 * block + 1, 0)


def pieces(x_N, cu_seqlens):
    return x_N.split(cu_seqlens.diff().tolist())


def by_powers(x_N, cu_seqlens, decay, reverse):
    """The sum with its powers written out as a lower (reverse: upper) triangular matrix of each sequence."""

    def one(x_T):
        t = torch.arange(len(x_T), device=x_T.device)
        power_TT = torch.as_tensor(decay, dtype=x_T.dtype) ** (t[:, None] - t).clamp(min=0)
        return (power_TT.tril().T if reverse else power_TT.tril()) @ x_T

    return torch.cat([one(x_T) for x_T in pieces(x_N, cu_seqlens)])


def assert_as_good_as_torch(got, function, x, *others):
    """|truth - got| <= 2 |truth - float32| + 2e-7 of the largest entry, with `function` on the CPU."""
    others = [other.cpu() if isinstance(other, torch.Tensor) else other for other in others]
    truth, single = (function(x.detach().cpu().to(dtype), *others) for dtype in (torch.float64, torch.float32))
    allowed = 2 * (single - truth).abs().max() + 2e-7 * truth.abs().max()
    assert got.shape == truth.shape
    assert (got.detach().cpu() - truth).abs().max() <= allowed


@DIRECTIONS
@pytest.mark.parametrize("decay", DECAYS)
def test_scan(device, decay, reverse):
    x, cu = edges(device)
    assert_as_good_as_torch(kernels.scan(x, cu, decay, reverse), by_powers, x, cu, decay, reverse)


def test_total(device):
    x, cu = edges(device)
    assert_as_good_as_torch(kernels.total(x, cu), reference.segment_sum, x, cu)


def test_known_answers(device):
    x = torch.tensor([1.0, 2, 3, 10, 20], device=device)
    cu = torch.tensor([0, 3, 3, 5], device=device, dtype=torch.int32)
    assert kernels.total(x, cu).tolist() == [6, 0, 30]
    assert ops.segment_cumsum(x, cu).tolist() == [1, 3, 6, 10, 30]
    assert ops.segment_reverse_scan(x, cu).tolist() == [6, 5, 3, 30, 20]
    # decay 1/2: 1 + (2 + 3/2) / 2 = 2.75, 2 + 3/2 = 3.5, 3;  10 + 20/2 = 20, 20.  Forward: 1, 2.5, 4.25;  10, 25
    assert ops.segment_reverse_scan(x, cu, 0.5).tolist() == [2.75, 3.5, 3, 20, 20]
    assert kernels.scan(x, cu, 0.5).tolist() == [1, 2.5, 4.25, 10, 25]


@DIRECTIONS
@pytest.mark.parametrize("decay", DECAYS)
def test_a_sequence_has_the_same_bits_alone_and_in_any_batch(device, decay, reverse):
    x, cu = edges(device)
    scanned, totals = kernels.scan(x, cu, decay, reverse), kernels.total(x, cu)
    assert torch.equal(kernels.scan(x, cu, decay, reverse), scanned)
    assert torch.equal(kernels.total(x, cu), totals)
    for x_T, scanned_T, total in zip(pieces(x, cu), pieces(scanned, cu), totals, strict=True):
        alone = torch.tensor([0, len(x_T)], device=device)
        assert torch.equal(kernels.scan(x_T, alone, decay, reverse), scanned_T)
        assert torch.equal(kernels.total(x_T, alone)[0], total)


def test_a_token_that_is_not_finite_stays_in_its_sequence(device):
    x, cu = ragged(device, 5, 2.5, 5)
    x[cu[1] : cu[2]] = torch.nan
    for got in (ops.segment_cumsum(x, cu), ops.segment_reverse_scan(x, cu, 0.9)):
        assert [part.isnan().all().item() for part in pieces(got, cu)] == [False, True, False]
    assert ops.segment_sum(x, cu).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("blocks", [0.5, 1.0, 2.5])
def test_nothing_outside_the_sequences_is_read_or_written(device, blocks):
    x, cu = ragged(device, blocks)
    around = torch.nn.functional.pad(x, (3, 3), value=torch.nan)
    assert torch.equal(kernels.total(around, cu + 3), kernels.total(x, cu))
    for reverse in (False, True):
        wide = kernels.scan(around, cu + 3, 0.9, reverse)
        assert torch.equal(wide[3:-3], kernels.scan(x, cu, 0.9, reverse))
        assert wide[:3].isnan().all()
        assert wide[-3:].isnan().all()


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)])
def test_no_tokens(device, lengths):
    x, cu = ragged(device, *lengths)
    x.requires_grad_()
    assert ops.segment_sum(x, cu).tolist() == [0.0] * len(lengths)
    for got in (ops.segment_cumsum(x, cu), ops.segment_reverse_scan(x, cu, 0.5)):
        assert got.shape == (0,)
        assert torch.autograd.grad(got.sum(), x)[0].shape == (0,)


def test_strided_and_half_precision_input(device):
    x, cu = ragged(device, 5, 1.5)
    wide = torch.stack([x, -x], dim=1)
    assert torch.equal(ops.segment_cumsum(wide[:, 0], cu), ops.segment_cumsum(x, cu))
    assert torch.equal(ops.segment_sum(wide[:, 0], cu), ops.segment_sum(x, cu))
    half = x.half()
    assert ops.segment_sum(half, cu).dtype == torch.float16
    torch.testing.assert_close(ops.segment_cumsum(half, cu), ops.segment_cumsum(half.float(), cu).half())


SCANS = {
    "cumsum": lambda segments, x, cu: segments.segment_cumsum(x, cu),
    "reverse scan": lambda segments, x, cu: segments.segment_reverse_scan(x, cu, 0.9),
    "sum": lambda segments, x, cu: segments.segment_sum(x, cu),
}


@pytest.mark.parametrize("name", SCANS)
def test_gradients(device, name):
    x, cu = edges(device)
    run, upstream = SCANS[name], torch.randn_like(SCANS[name](ops, x, cu))

    def gradient(x, cu, upstream, segments=reference):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(run(segments, x, cu), x, upstream.to(x.dtype))[0]

    assert_as_good_as_torch(gradient(x, cu, upstream, ops), gradient, x, cu, upstream)
    ones = torch.ones_like(upstream)
    by_sum = torch.autograd.grad(run(ops, x.requires_grad_(), cu).sum(), x)[0]  # .sum() hands down a stride of 0
    assert torch.equal(by_sum, gradient(x.detach(), cu, ones, ops))


def test_gradients_of_gradients(device):
    """L = sum y^2, so dL/dx = 2 A'A x for y = A x, and its product with v has the gradient 2 A'A v."""
    x, cu = ragged(device, 3, 1.2, 0)
    v = torch.randn_like(x)
    for run in SCANS.values():

        def twice(at, run=run):
            at = at.clone().requires_grad_()
            return at, torch.autograd.grad(run(ops, at, cu).square().sum(), at, create_graph=True)[0]

        at, first = twice(x)
        torch.testing.assert_close(torch.autograd.grad(first, at, v)[0], twice(v)[1], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_opcheck(device):
    x, cu = ragged(device, 3, 0, 1.2)
    x.requires_grad_()
    torch.library.opcheck(ops.segment_scan, (x, cu, 0.9, True))
    torch.library.opcheck(ops.segment_scan, (x.detach(), cu, 1.0, False))
    torch.library.opcheck(ops.segment_sum, (x, cu))


def test_compile_without_a_graph_break(device):
    x, cu = ragged(device, 3, 0, 1.2)
    x.requires_grad_()

    def run(x):
        return ops.segment_sum(ops.segment_reverse_scan(ops.segment_cumsum(x, cu), cu, 0.9).square(), cu).sum()

    expected, got = run(x), torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(got, expected)
    assert torch.equal(torch.autograd.grad(got, x)[0], torch.autograd.grad(expected, x)[0])
