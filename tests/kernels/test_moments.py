"""Mean and std over groups of sequences. Truth is float64; the error may be twice that of torch in float32."""

import pytest
import torch

from ipvrm_core.kernels.moments import group_moments
from ipvrm_core.kernels.segments import launch
from ipvrm_core.packing import cu_seqlens_from_lengths
from ipvrm_core.sequences import torch_segments as reference
from ipvrm_core.sequences import triton_segments as ops
from ipvrm_core.sequences.segments import expand


@pytest.fixture
def batch(device):
    """x [N], cu_seqlens, groups: unsorted, negative and huge labels, groups of one and of empty sequences only.

    Group -3 has more members than a block and lies in several blocks of sequences; 5 has long sequences.
    """
    block = launch(device)["BLOCK"]
    lengths = [0, 1, block - 1, 3 * block + 5, block, 0, block + 1, 2 * block, 7, 0] + [2, 0, 1] * (block // 2)
    groups = [5, -3, 5, 2**40, 5, 7, -3, 5, -3, 5] + [-3] * 3 * (block // 2)
    cu = cu_seqlens_from_lengths(torch.tensor(lengths)).to(device)
    # A level for each sequence, so that mean_b - mean matters, and far from 0, so that E[x^2] - E[x]^2 would not do.
    level_B = 100 + torch.randn(len(lengths), device=device)
    x = torch.randn(int(cu[-1]), device=device) + expand(level_B, cu, int(cu[-1]))
    return x, cu, torch.tensor(groups, device=device)


def within(x, cu, groups, label):
    return x[expand(groups, cu, len(x)) == label]


def test_against_float64(batch):
    cpu = [tensor.cpu() for tensor in batch]
    truth, single = (reference.group_moments(cpu[0].to(dtype), *cpu[1:]) for dtype in (torch.float64, torch.float32))
    for got, mine, torchs in zip(group_moments(*batch), truth, single, strict=True):
        assert got.shape == mine.shape
        assert (got.cpu() - mine).abs().max() <= 2 * (torchs - mine).abs().max() + 2e-7 * mine.max()


def test_known_answers(device):
    """Group 4 owns 1, 3 and 5: mean 3, std sqrt(8/3). Group -1 owns 10, 20: mean 15, std 5."""
    x, cu = torch.tensor([1.0, 3, 10, 20, 5], device=device), torch.tensor([0, 2, 4, 5], device=device)
    mean, std = group_moments(x, cu.int(), torch.tensor([4, -1, 4], device=device, dtype=torch.int32))
    assert mean.tolist() == [3, 3, 15, 15, 3]
    torch.testing.assert_close(std.cpu() ** 2, torch.tensor([8 / 3, 8 / 3, 25, 25, 8 / 3]))


@pytest.mark.parametrize("value", [0.1, -1e-30, 3e20])
def test_equal_values_have_a_std_of_exactly_zero(batch, value):
    x, cu, groups = batch
    x = torch.full_like(x, value)
    mean, std = group_moments(x, cu, groups)
    assert torch.equal(mean, x)
    assert std.eq(0).all()


def test_one_token_is_its_own_mean(device):
    x = torch.tensor([0.3], device=device)
    mean, std = group_moments(x, torch.tensor([0, 0, 1, 1], device=device), torch.tensor([8, 8, 8], device=device))
    assert (mean.item(), std.item()) == (x.item(), 0.0)


def test_a_group_has_the_same_bits_alone_and_in_any_batch(batch):
    x, cu, groups = batch
    mean, std = group_moments(*batch)
    for again, before in zip(group_moments(*batch), (mean, std), strict=True):
        assert torch.equal(again, before)
    for label in groups.unique():
        lengths = cu.diff()[groups == label]
        alone = within(x, cu, groups, label), cu_seqlens_from_lengths(lengths), label.expand(len(lengths))
        got_mean, got_std = group_moments(*alone)
        assert torch.equal(got_mean, within(mean, cu, groups, label))
        assert torch.equal(got_std, within(std, cu, groups, label))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # inf - inf in the interpreter
def test_a_token_that_is_not_finite_stays_in_its_group(batch):
    x, cu, groups = batch
    x[cu[3]] = torch.inf  # the first token of the only sequence of group 2**40
    x[cu[8]] = torch.nan  # one of group -3
    for got in group_moments(*batch):
        assert within(got, cu, groups, 5).isfinite().all()
        assert not within(got, cu, groups, -3).isfinite().any()
    assert group_moments(*batch)[1][cu[3] : cu[4]].isnan().all()


def test_nothing_outside_the_sequences_is_read_or_written(device):
    length = 2 * launch(device)["BLOCK"] + 5
    x, groups = torch.randn(length, device=device), torch.tensor([4, 4, 4], device=device)
    inside = torch.tensor([0, 0, length // 2, length], device=device)
    around = torch.nn.functional.pad(x, (3, 3), value=torch.nan)
    for alone, wide in zip(group_moments(x, inside, groups), group_moments(around, inside + 3, groups), strict=True):
        assert torch.equal(wide[3:-3], alone)
        assert wide[:3].isnan().all()
        assert wide[-3:].isnan().all()


@pytest.mark.parametrize("B", [0, 1, 3])
def test_no_tokens(device, B):
    cu = torch.zeros(B + 1, dtype=torch.int64, device=device)
    for got in group_moments(torch.empty(0, device=device), cu, torch.arange(B, device=device)):
        assert got.shape == (0,)


def test_gradients(batch):
    """Around 0: the backward takes x - mean with a mean in float32, which far from 0 costs digits."""
    x, cu, groups = batch
    batch = x - 100, cu, groups
    upstream = torch.randn(2, len(x))

    def gradient(segments, x, cu, groups):
        x = x.detach().clone().requires_grad_()
        return torch.autograd.grad(
            segments.group_moments(x, cu, groups), x, list(upstream.to(x)), materialize_grads=True
        )[0].cpu()

    cpu = [tensor.cpu() for tensor in batch]
    truth, single = (gradient(reference, cpu[0].to(dtype), *cpu[1:]) for dtype in (torch.float64, torch.float32))
    allowed = 2 * (single - truth).abs().max() + 1e-6 * truth.abs().max()
    assert (gradient(ops, *batch) - truth).abs().max() <= allowed


def test_a_std_of_zero_passes_no_gradient(device):
    x = torch.full((4,), 0.1, device=device, requires_grad=True)
    mean, std = ops.group_moments(x, torch.tensor([0, 1, 4], device=device), torch.tensor([2, 2], device=device))
    assert torch.autograd.grad(std.sum(), x, retain_graph=True)[0].tolist() == [0, 0, 0, 0]
    assert torch.autograd.grad(mean.sum(), x)[0].tolist() == [1, 1, 1, 1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_opcheck(device):
    cu, groups = torch.tensor([0, 2, 2, 6], device=device), torch.tensor([1, 1, 0], device=device)
    torch.library.opcheck(ops.group_moments, (torch.randn(6, device=device, requires_grad=True), cu, groups))
