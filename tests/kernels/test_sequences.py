"""The public functions on packed sequences: kernels against torch, and what they refuse."""

import pytest
import torch

import ipvrm_core as ic
from ipvrm_core import dispatch, objectives
from ipvrm_core.kernels.segments import launch
from ipvrm_core.packing import cu_seqlens_from_lengths
from ipvrm_core.sequences import segments

GROUPS, LABELS, PAIRS = torch.tensor([3, 0, 3, 0, 3]), torch.tensor([1, 0, 0, 1, 1]), torch.tensor([[0, 2], [4, 1]])
BOUNDARY, SIGMA = torch.tensor([0.5, -1.0, 0.0, 2.0, 0.1]), torch.tensor(1.7, dtype=torch.float64)

FUNCTIONS = {
    "prefix_values": lambda x, cu, to: ic.prefix_values(x, cu, 10.0),
    "mean_prefix_values": lambda x, cu, to: ic.mean_prefix_values(x, cu, 10.0),
    "gae": lambda x, cu, to: ic.gae(x, cu, 0.99, 0.95),
    "group_normalize": lambda x, cu, to: ic.group_normalize(x, cu, to(GROUPS), 0.1),
    "advantages, paper": lambda x, cu, to: ic.process_advantages(
        x, cu, to(GROUPS), normalize="group", gamma=0.9, lam=0.8
    ),
    "advantages, official": lambda x, cu, to: ic.process_advantages(
        x, cu, to(GROUPS), normalize="batch", sigma=to(SIGMA)
    ),
    **{
        f"ipvrm_loss, {weighting}": lambda x, cu, to, weighting=weighting: ic.ipvrm_loss(
            x, cu, to(LABELS), margin=2.0, weighting=weighting, boundary_B=to(BOUNDARY)
        )
        for weighting in ("uniform", "early", "late")
    },
    "implicit_prm_loss": lambda x, cu, to: ic.implicit_prm_loss(x, cu, to(LABELS), beta=0.1),
    "dpo_reward_loss": lambda x, cu, to: ic.dpo_reward_loss(x, cu, to(PAIRS), beta=0.1),
    "qrm_loss": lambda x, cu, to: ic.qrm_loss(x, cu, to(PAIRS)),
    "repirl_loss": lambda x, cu, to: ic.repirl_loss(x, cu, to(LABELS)),
}


@pytest.fixture
def batch(device):
    block = launch(device)["BLOCK"]
    cu = cu_seqlens_from_lengths(torch.tensor([block + 3, 1, 0, 2 * block, 7]))
    return torch.randn(int(cu[-1]), device=device), cu.to(device)


def value_and_gradient(name, x, cu, weights=None):
    """The function's value and the gradient of sum(weights * value), both on the CPU."""
    x = x.detach().clone().requires_grad_()
    value = FUNCTIONS[name](x, cu, lambda other: other.to(x.device))
    weights = torch.linspace(-1, 2, len(value)).to(value)
    return value.detach().cpu(), torch.autograd.grad(value, x, weights)[0].cpu()


@pytest.fixture
def in_torch(monkeypatch):
    """in_torch(function, ...) on the CPU and in torch, whatever could run."""

    def run(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(dispatch, "_INTERPRETING", False)
            return function(*arguments)

    return run


@pytest.mark.parametrize("name", FUNCTIONS)
def test_kernels_against_torch(batch, name, in_torch):
    """|truth - kernels| <= 2 |truth - torch in float32| + 5e-7 of the largest entry, values and gradients."""
    x, cu = batch
    truth = in_torch(value_and_gradient, name, x.cpu().double(), cu.cpu())
    single = in_torch(value_and_gradient, name, x.cpu(), cu.cpu())
    got = value_and_gradient(name, x, cu)
    for ours, mine, torchs in zip(got, truth, single, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - mine).abs().max() <= 2 * (torchs - mine).abs().max() + 5e-7 * mine.abs().max()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_kernels_run_where_they_can(batch, name, in_torch, monkeypatch):
    used = []
    for module, tag in ((segments.torch_segments, "torch"), (segments.triton_segments, "triton")):
        for function in ("segment_sum", "segment_cumsum", "segment_reverse_scan", "group_moments"):
            own = getattr(module, function)
            monkeypatch.setattr(module, function, lambda *a, own=own, tag=tag: used.append(tag) or own(*a))
    value_and_gradient(name, *batch)
    assert set(used) == {"triton"}
    used.clear()
    in_torch(value_and_gradient, name, *(tensor.cpu() for tensor in batch))
    assert set(used) == {"torch"}


CONSTANTS = {
    "repirl_weights": lambda x, cu, to: ic.repirl_weights(
        x, 0.5 * x - 1, cu, to(LABELS), torch.full((5,), 0.2, device=x.device)
    ),
    "prime_advantages": lambda x, cu, to: ic.prime_advantages(x, to(LABELS), cu, to(GROUPS)),
    "masked_step_advantages": lambda x, cu, to: ic.masked_step_advantages(x, cu, to(GROUPS)),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_on_triton(batch, name):
    """Weights and advantages, which have no gradient."""
    x, cu = batch
    truth = CONSTANTS[name](x.cpu().double(), cu.cpu(), lambda other: other)  # float64 is torch's
    got = CONSTANTS[name](x, cu, lambda other: other.to(x.device)).cpu()
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5 * truth.abs().max().item())


@pytest.mark.parametrize("name", [name for name in objectives.names() if objectives.find(name).trains])
def test_objectives_use_the_kernels(batch, name, monkeypatch):
    from ipvrm_core.kernels import segments as kernels

    used, launchers = [], {name: getattr(kernels, name) for name in ("scan", "total")}
    for kernel, launcher in launchers.items():
        monkeypatch.setattr(kernels, kernel, lambda *a, launcher=launcher: used.append(launcher) or launcher(*a))
    x, cu = batch
    ones = torch.ones(5, device=x.device)
    labelled = objectives.RewardBatch(cu, LABELS.to(x.device), ones, None, PAIRS.to(x.device), ones[:2])
    objectives.find(name)().loss(x.requires_grad_(), labelled).backward()
    assert used == [launchers[kernel] for kernel in (("scan", "total", "scan") if name == "ipvrm" else ("total",))]


def test_what_is_refused(batch):
    x, cu = batch
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
            FUNCTIONS[name](x, cu, lambda tensor: moved[id(tensor)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
