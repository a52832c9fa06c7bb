"""The public functions on packed sequences: triton against the reference, and what they refuse."""

import pytest
import torch
import triton

import ipvrm_core as ic
from ipvrm_core import objectives
from ipvrm_core.kernels.segments import launch
from ipvrm_core.packing import cu_seqlens_from_lengths

GROUPS, LABELS, PAIRS = torch.tensor([3, 0, 3, 0, 3]), torch.tensor([1, 0, 0, 1, 1]), torch.tensor([[0, 2], [4, 1]])
BOUNDARY, SIGMA = torch.tensor([0.5, -1.0, 0.0, 2.0, 0.1]), torch.tensor(1.7, dtype=torch.float64)

FUNCTIONS = {
    "prefix_values": lambda x, cu, to, **how: ic.prefix_values(x, cu, 10.0, **how),
    "mean_prefix_values": lambda x, cu, to, **how: ic.mean_prefix_values(x, cu, 10.0, **how),
    "gae": lambda x, cu, to, **how: ic.gae(x, cu, 0.99, 0.95, **how),
    "group_normalize": lambda x, cu, to, **how: ic.group_normalize(x, cu, to(GROUPS), 0.1, **how),
    "advantages, paper": lambda x, cu, to, **how: ic.process_advantages(
        x, cu, to(GROUPS), normalize="group", gamma=0.9, lam=0.8, **how
    ),
    "advantages, official": lambda x, cu, to, **how: ic.process_advantages(
        x, cu, to(GROUPS), normalize="batch", sigma=to(SIGMA), **how
    ),
    **{
        f"ipvrm_loss, {weighting}": lambda x, cu, to, weighting=weighting, **how: ic.ipvrm_loss(
            x, cu, to(LABELS), margin=2.0, weighting=weighting, boundary_B=to(BOUNDARY), **how
        )
        for weighting in ("uniform", "early", "late")
    },
    "implicit_prm_loss": lambda x, cu, to, **how: ic.implicit_prm_loss(x, cu, to(LABELS), beta=0.1, **how),
    "dpo_reward_loss": lambda x, cu, to, **how: ic.dpo_reward_loss(x, cu, to(PAIRS), beta=0.1, **how),
    "qrm_loss": lambda x, cu, to, **how: ic.qrm_loss(x, cu, to(PAIRS), **how),
    "repirl_loss": lambda x, cu, to, **how: ic.repirl_loss(x, cu, to(LABELS), **how),
}


@pytest.fixture
def batch(device):
    block = launch(device)["BLOCK"]
    cu = cu_seqlens_from_lengths(torch.tensor([block + 3, 1, 0, 2 * block, 7]))
    return torch.randn(int(cu[-1]), device=device), cu.to(device)


def value_and_gradient(name, x, cu, weights=None, **how):
    """The function's value and the gradient of sum(weights * value), both on the CPU."""
    x = x.detach().clone().requires_grad_()
    value = FUNCTIONS[name](x, cu, lambda other: other.to(x.device), **how)
    weights = torch.linspace(-1, 2, len(value)).to(value)
    return value.detach().cpu(), torch.autograd.grad(value, x, weights)[0].cpu()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_triton_against_the_reference(batch, name):
    """|truth - triton| <= 2 |truth - float32 reference| + 5e-7 of the largest entry, values and gradients."""
    x, cu = batch
    truth = value_and_gradient(name, x.cpu().double(), cu.cpu(), backend="reference")
    single = value_and_gradient(name, x.cpu(), cu.cpu(), backend="reference")
    got = value_and_gradient(name, x, cu, backend="triton")
    for ours, mine, torchs in zip(got, truth, single, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - mine).abs().max() <= 2 * (torchs - mine).abs().max() + 5e-7 * mine.abs().max()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_auto_is_triton_where_it_can_run(batch, name):
    expected = value_and_gradient(name, *batch, backend="triton")
    for auto, fused in zip(value_and_gradient(name, *batch), expected, strict=True):
        assert torch.equal(auto, fused)
    x, cu = (tensor.cpu() for tensor in batch)
    expected = value_and_gradient(name, x, cu, backend="reference")
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = False
        for auto, reference in zip(value_and_gradient(name, x, cu), expected, strict=True):
            assert torch.equal(auto, reference)


def test_chunked_is_the_reference(batch):
    x, cu = (tensor.cpu() for tensor in batch)
    assert torch.equal(ic.gae(x, cu, backend="chunked"), ic.gae(x, cu, backend="reference"))


CONSTANTS = {
    "repirl_weights": lambda x, cu, to, **how: ic.repirl_weights(
        x, 0.5 * x - 1, cu, to(LABELS), torch.full((5,), 0.2, device=x.device), **how
    ),
    "prime_advantages": lambda x, cu, to, **how: ic.prime_advantages(x, to(LABELS), cu, to(GROUPS), **how),
    "masked_step_advantages": lambda x, cu, to, **how: ic.masked_step_advantages(x, cu, to(GROUPS), **how),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_on_triton(batch, name):
    """Weights and advantages, which have no gradient."""
    x, cu = batch
    truth = CONSTANTS[name](x.cpu().double(), cu.cpu(), lambda other: other, backend="reference")
    got = CONSTANTS[name](x, cu, lambda other: other.to(x.device), backend="triton").cpu()
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5 * truth.abs().max().item())


@pytest.mark.parametrize("name", [name for name in objectives.names() if objectives.find(name).trains])
def test_objectives_use_the_kernels(batch, name, monkeypatch):
    from ipvrm_core.kernels import segments

    used, launchers = [], {name: getattr(segments, name) for name in ("scan", "total")}
    for kernel, launcher in launchers.items():
        monkeypatch.setattr(segments, kernel, lambda *a, launcher=launcher: used.append(launcher) or launcher(*a))
    x, cu = batch
    ones = torch.ones(5, device=x.device)
    labelled = objectives.RewardBatch(cu, LABELS.to(x.device), ones, None, PAIRS.to(x.device), ones[:2])
    objectives.find(name)().loss(x.requires_grad_(), labelled).backward()
    assert used == [launchers[kernel] for kernel in (("scan", "total", "scan") if name == "ipvrm" else ("total",))]


def test_what_is_refused(batch):
    x, cu = batch
    with pytest.raises(RuntimeError, match="float64"):
        ic.gae(x.double(), cu, backend="triton")
    with pytest.raises(ValueError, match="backend must be"):
        ic.gae(x, cu, backend="cuda")
    with pytest.raises(ValueError, match=r"token values must be floating point \[N\]; got torch.float32, shape"):
        ic.prefix_values(x[:, None], cu, 10.0)
    with pytest.raises(ValueError, match=r"token values must be floating point \[N\]; got torch.int64"):
        ic.prefix_values(x.long(), cu, 10.0)
    with pytest.raises(ValueError, match=r"groups must be integers \[B\] = \(5,\)"):
        ic.group_normalize(x, cu, GROUPS[:4].to(x.device))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_host_waits_for_nothing(batch):
    x, cu = batch
    weights = {name: value_and_gradient(name, x, cu)[0] for name in FUNCTIONS}  # compiles, moves the constants
    moved = {id(tensor): tensor.to(x.device) for tensor in (GROUPS, LABELS, PAIRS, BOUNDARY, SIGMA)}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name in weights:
            FUNCTIONS[name](x, cu, lambda tensor: moved[id(tensor)], backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
