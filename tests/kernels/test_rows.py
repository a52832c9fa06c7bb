"""The row kernels by their launchers, against the reference in float64: values, borders, memory they may not touch.

Criterion: |truth - ours| <= 2 |truth - torch in float32| + a small absolute term. The settings of the loss, every dtype
of hidden states and whole backward passes are in tests/ops, on the public functions.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import ipvrm_core as ic
from ipvrm_core.fused.policy_terms import policy_terms
from ipvrm_core.kernels.candidates import candidate_rows, candidate_rows_kernel
from ipvrm_core.kernels.logit_gradient import logit_gradient
from ipvrm_core.kernels.logprobs import row_logprobs
from ipvrm_core.kernels.policy_rows import Clip, policy_rows
from ipvrm_core.kernels.rescale import rescale
from ipvrm_core.reference import candidates as ref_candidates
from ipvrm_core.reference import logprobs as ref_logprobs
from ipvrm_core.reference import policy_loss as ref_loss

N, K = 6, 4
VOCABULARIES = [1, 2, 127, 128, 129, 257, 1000]  # around one and several blocks, odd and even
CLIP = Clip(0.2, 0.28, math.inf)
CONFIG = ic.PolicyLossConfig(alpha=0.7, entropy_coef=0.3, kl_coef=0.2)
KINDS = ["flat", "peaked", "negative", "huge"]


def make_logits(kind: str, V: int, device, rows: int = N) -> Tensor:
    x = torch.randn(rows, V)
    if kind == "peaked":
        x *= 8
        x[torch.arange(rows), torch.randint(V, (rows,))] += 12
    return (x + {"negative": -300.0, "huge": 1e4}.get(kind, 0.0)).to(device)


def make_ids(V: int, device, rows: int = N) -> Tensor:
    """Some padding, the last token, and equal ids in a row."""
    ids = torch.randint(-1, V, (rows, K))
    ids[:, 0] = ids[:, 0].clamp(min=0)
    ids[0, :2] = V - 1
    ids[1, 1:] = -1
    return ids.to(device)


def close(got: Tensor, same: Tensor, truth: Tensor, tolerance: float) -> None:
    got, same, truth = (x.detach().double().cpu() for x in (got, same, truth))
    assert got.shape == truth.shape
    error, allowed = (got - truth).abs().max().item(), (same - truth).abs().max().item()
    assert error <= 2 * allowed + tolerance * max(1.0, truth.abs().max().item()), (
        f"error {error:.2e}, torch {allowed:.2e}"
    )


def reference(function, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of `function(logits)` in float32 and in float64, on the CPU."""
    return function(x.cpu().float()), function(x.cpu().double())


@pytest.mark.parametrize("V", VOCABULARIES)
@pytest.mark.parametrize("kind", KINDS)
def test_logprobs(kind, V, device):
    x, ids = make_logits(kind, V, device), make_ids(V, device)
    logprobs, lse, entropy, normalizer, _ = row_logprobs(x, ids, temperature=0.7)
    same, truth = reference(lambda z: ref_logprobs.logprobs_from_logits(z, ids.cpu(), temperature=0.7), x)
    for got, rough, exact in zip((logprobs, lse, entropy), same, truth, strict=True):
        close(got, rough, exact, 1e-6)
    assert torch.equal(normalizer[:, 0], x.amax(-1))
    assert (logprobs[ids < 0] == 0).all()


def test_td_errors(device):
    V, beta = 300, 10.0
    x, ids, old = make_logits("flat", V, device), make_ids(V, device), torch.randn(N, K).to(device)
    delta, *_ = row_logprobs(x, ids, old_logprobs_NK=old, beta=beta)
    plain, *_ = row_logprobs(x, ids)
    want = ic.td_errors(plain.double(), old.double(), beta).masked_fill(ids < 0, 0.0)
    torch.testing.assert_close(delta.double(), want, rtol=1e-6, atol=1e-6)
    assert (delta[ids < 0] == 0).all()


@pytest.mark.parametrize("ids_per_row", [0, 1, 65, 200])
def test_any_number_of_ids(ids_per_row, device):
    V = 150
    x, ids = make_logits("flat", V, device), torch.randint(-1, V, (N, ids_per_row)).to(device)
    logprobs, _, entropy, normalizer, _ = row_logprobs(x, ids)
    c, g = torch.randn(N, ids_per_row).to(device), torch.randn(N).to(device)
    out = torch.empty_like(x)
    logit_gradient(x, out, ids, c, normalizer, entropy, grad_lse_N=g)

    def function(z):
        z.requires_grad_()
        rows = ref_logprobs.logprobs_from_logits(z, ids.cpu())
        total = (rows.logprobs_NK * c.cpu()).sum() + (rows.lse_N * g.cpu()).sum()
        return [rows.logprobs_NK, *torch.autograd.grad(total, z)]

    same, truth = reference(function, x)
    if ids_per_row:
        close(logprobs, same[0], truth[0], 1e-6)
    close(out, same[1], truth[1], 1e-6)


@pytest.mark.parametrize("V", VOCABULARIES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient(kind, V, device):
    x, ids = make_logits(kind, V, device), make_ids(V, device)
    c, g, e = torch.randn(N, K), torch.randn(N), torch.randn(N)
    _, _, entropy, normalizer, _ = row_logprobs(x, ids)
    out = torch.empty_like(x)
    grads = {"grad_lse_N": g.to(device), "grad_entropy_N": e.to(device)}
    logit_gradient(x, out, ids, c.to(device), normalizer, entropy, **grads)

    def function(z):
        z.requires_grad_()
        rows = ref_logprobs.logprobs_from_logits(z, ids.cpu())
        return torch.autograd.grad(
            (rows.logprobs_NK * c).sum() + (rows.lse_N * g).sum() + (rows.entropy_N * e).sum(), z
        )

    same, truth = reference(function, x)
    close(out, same[0], truth[0], 1e-6)


def make_batch(V: int, device, rows: int = N) -> ic.PolicyBatch:
    ids, weights = make_ids(V, device, rows), torch.rand(2, rows).to(device)
    weights[0, 2], weights[1, 3], weights[:, 4] = 0, 0, 0
    old, advantages = -torch.rand(rows, K).to(device), torch.randn(rows, K).to(device)
    return ic.PolicyBatch(ids, old, advantages, *weights, old[:, 0])


def run_policy(
    x: Tensor, out: Tensor | None, batch: ic.PolicyBatch, scale: Tensor | None = None, entropy: float = 0.3
) -> Tensor:
    """With a scale: in one visit, which makes no entropy gradient."""
    return policy_rows(
        x,
        out,
        batch.ids_NS,
        batch.old_logprobs_NS,
        batch.advantages_NS,
        batch.token_weights_N,
        batch.candidate_weights_N,
        batch.ref_logprobs_N,
        alpha=CONFIG.alpha,
        clip=CLIP,
        candidate_clip=CLIP,
        kl_coef=CONFIG.kl_coef,
        entropy_coef=entropy if scale is None else 0.0,
        scale_N=scale,
    )


def policy_reference(batch: ic.PolicyBatch):
    def function(z):
        z.requires_grad_()
        output = ref_loss.distrl_loss_from_logits(z, batch.to("cpu"), CONFIG)
        return [torch.stack(list(output.metrics.values())), *torch.autograd.grad(output.loss, z)]

    return function


@pytest.mark.parametrize("V", VOCABULARIES)
@pytest.mark.parametrize("kind", KINDS)
def test_policy_rows(kind, V, device):
    x, batch = make_logits(kind, V, device), make_batch(V, device)
    batch.ids_NS[5, 0] = -1  # log-prob 0 and no gradient, also where the row has weight
    # The old policy is near the new one, so that ratios lie on both sides of the clip bounds.
    near, *_ = row_logprobs(x, batch.ids_NS)
    noise = 0.3 * torch.randn(N, K).to(device)
    batch.old_logprobs_NS.copy_(near + noise)
    out = torch.empty_like(x)
    metrics = run_policy(x, out, batch)
    same, truth = reference(policy_reference(batch), x)
    # log p is rounded twice at its own size (40 in peaked rows), and rho is its exponential.
    rounding = 2 * torch.finfo(torch.float32).eps * near.abs().max().item()
    close(metrics.sum(0), same[0], truth[0], 2e-6 + rounding)
    close(out, same[1], truth[1], 2e-6 + rounding)
    assert torch.equal(run_policy(x, None, batch), metrics)
    assert (out[4] == 0).all()  # both weights are 0


NEAR = {"exact": 0.0, "15 nats below": -15.0, "15 nats above": 15.0, "of another world": -1e3, "positive": 1e3}


@pytest.mark.parametrize("V", [1, 128, 257])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("near", [*NEAR, "unknown"])
def test_one_visit(near, kind, V, device):
    """Where log p of one token is known beforehand, rightly or not: the same statistics, and the whole gradient."""
    x, ids = make_logits(kind, V, device), make_ids(V, device)
    ids[2, 0] = -1
    logp = row_logprobs(x, ids)[0][:, 0]
    given = torch.full_like(logp, math.nan) if near == "unknown" else logp + NEAR[near]
    out = torch.full_like(x, math.nan)
    logprobs, lse, entropy, normalizer, total = row_logprobs(x, ids, near_N=given, out_NV=out)
    # About exp(near - log p) for a near in [-20, 0], which may be too much of a sum; e^-20 is the least.
    shift = (given.clamp(-20, 0) - logp).masked_fill(ids[:, 0] < 0, math.nan)
    assert ((total > 0) == (shift < 40 * math.log(2))).all()
    torch.testing.assert_close(total.log()[total > 0], shift[total > 0], rtol=1e-4, atol=1e-4)
    c, g = torch.randn(N, K).to(device), torch.randn(N).to(device)
    c[3], g[3] = 0.0, 0.0
    scale = logit_gradient(x, out, ids, c, normalizer, entropy, total_N=total, grad_lse_N=g)

    def function(z):
        z.requires_grad_()
        rows = ref_logprobs.logprobs_from_logits(z, ids.cpu())
        (dz,) = torch.autograd.grad((rows.logprobs_NK * c.cpu()).sum() + (rows.lse_N * g.cpu()).sum(), z)
        return [rows.logprobs_NK, rows.lse_N, rows.entropy_N, dz]

    same, truth = reference(function, x)
    # log p is a difference of two numbers of the size of the shift.
    size = max(1.0, shift.nan_to_num(0.0, posinf=0.0, neginf=0.0).clamp(-20, 30).abs().max().item())
    for got, rough, exact in zip((logprobs, lse, entropy, scale[:, None] * out), same, truth, strict=True):
        close(got, rough, exact, 1e-6 * size)


def test_an_entropy_or_a_coefficient_that_is_all_there_is(device):
    """Coefficients that cancel, to nothing or nearly, and one below what float32 can divide by: written whole."""
    V = 300
    x, ids = make_logits("flat", V, device, rows=4), make_ids(V, device, rows=4).clamp(min=0)
    c = torch.zeros(4, K)
    c[0, :2] = torch.tensor([1.0, -1.0])
    c[1, :2] = torch.tensor([1e20, -1e20])
    c[2, 0] = 1e-35
    c[3, 0] = 0.25
    near, out = row_logprobs(x, ids)[0][:, 0], torch.empty_like(x)
    *_, entropy, normalizer, total = row_logprobs(x, ids, near_N=near, out_NV=out)
    g = torch.tensor([0.0, 1.0, 0.0, 0.0], device=device)
    scale = logit_gradient(x, out, ids, c.to(device), normalizer, entropy, total_N=total, grad_lse_N=g)
    assert (scale[:3] == 1).all()
    assert scale[3] != 1
    whole = torch.empty_like(x)
    logit_gradient(x, whole, ids, c.to(device), normalizer, entropy, grad_lse_N=g)
    assert torch.equal(out[:3], whole[:3])
    torch.testing.assert_close(scale[3] * out[3], whole[3], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("V", [2, 129, 1000])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("far", [0.0, 30.0, -30.0])
def test_policy_rows_in_one_visit(far, kind, V, device):
    """Like two visits, also where the old log-probs are far off, or NaN where a weight of 0 lets them."""
    x, batch = make_logits(kind, V, device), make_batch(V, device)
    near, *_ = row_logprobs(x, batch.ids_NS)
    batch.old_logprobs_NS.copy_((near + 0.3 * torch.randn(N, K).to(device) + far).clamp(max=0))
    batch.old_logprobs_NS[2, 0] = math.nan  # of weight 0, while the candidates of that row count
    x[4] = math.nan
    for weights in (batch.token_weights_N, batch.candidate_weights_N):
        weights[5] *= 1e-35  # coefficients that float32 cannot divide by: that row is written whole
    out, scale = torch.full_like(x, math.nan), torch.empty(N, device=device)
    metrics = run_policy(x, out, batch, scale)
    whole = torch.empty_like(x)
    torch.testing.assert_close(metrics, run_policy(x, whole, batch, entropy=0.0), rtol=2e-5, atol=2e-5)
    got = scale[:, None] * out
    # c (1 - p) at p = 1 is all rounding: that of log p, a difference of numbers of the size of the shift.
    c = policy_terms(near, torch.zeros(N, device=device), batch, replace(CONFIG, entropy_coef=0.0)).c_NS
    bound = 1e-5 * whole.abs().amax(1) + 2e-7 * (1 + abs(far)) * c.abs().sum(1)
    assert ((got - whole).abs() <= bound[:, None]).all()
    assert (got[4] == 0).all()
    assert scale[5] == 1 or far


def test_a_gradient_in_bfloat16(device):
    """Rounded to nearest where it is stored: half a unit of the last place."""
    x, batch = make_logits("peaked", 1000, device), make_batch(1000, device)
    wide, narrow = torch.empty_like(x), torch.empty_like(x, dtype=torch.bfloat16)
    scales = torch.empty(2, N, device=device)
    run_policy(x, wide, batch, scales[0])
    run_policy(x, narrow, batch, scales[1])
    assert torch.equal(scales[0], scales[1])
    assert torch.equal(narrow, wide.bfloat16())


def test_in_place_is_the_same(device):
    x, batch = make_logits("flat", 300, device), make_batch(300, device)
    apart = torch.empty_like(x)
    run_policy(x, apart, batch)
    run_policy(x, x, batch)
    assert torch.equal(x, apart)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_read_exactly(dtype, device):
    x, batch = make_logits("flat", 300, device).to(dtype), make_batch(300, device)
    assert torch.equal(run_policy(x, None, batch), run_policy(x.float(), None, batch))
    assert all(map(torch.equal, row_logprobs(x, batch.ids_NS)[:4], row_logprobs(x.float(), batch.ids_NS)[:4]))


def test_rows_apart_in_memory_leave_what_lies_between(device):
    """x and out are columns of wider tensors; the rest of `out` stays as it was."""
    V = 200
    wide, batch = make_logits("flat", V + 50, device), make_batch(V, device)
    x = wide[:, 10 : V + 10]
    target = torch.full((N, V + 7), 5.0, device=device)
    metrics = run_policy(x, target[:, :V], batch)
    compact = torch.empty(N, V, device=device)
    assert torch.equal(run_policy(x.contiguous(), compact, batch), metrics)
    assert torch.equal(target[:, :V], compact)
    assert (target[:, V:] == 5.0).all()


def test_masked_rows_are_not_read(device):
    """NaN logits, ids beyond the vocabulary and infinite old log-probs in a row of weight 0 come out as zeros."""
    x, batch = make_logits("flat", 300, device), make_batch(300, device)
    clean, want = torch.empty_like(x), run_policy(x, None, batch)
    run_policy(x, clean, batch)
    x[4] = math.nan
    batch.ids_NS[4, 0], batch.old_logprobs_NS[4] = 10**6, -math.inf
    out = torch.empty_like(x)
    assert torch.equal(run_policy(x, out, batch), want)
    assert torch.equal(out, clean)


def test_an_id_beyond_the_vocabulary_shows(device):
    """It reads no foreign memory and makes the row's results NaN, and only that row's."""
    V = 300
    x, batch = make_logits("flat", V, device), make_batch(V, device)
    batch.ids_NS[0, 0] = V
    metrics = run_policy(x, None, batch)
    assert metrics[0, 0].isnan()
    assert not metrics[1:].isnan().any()
    logprobs, *_ = row_logprobs(x, torch.tensor([[V], [V + 10**9]] * 3, device=device))
    assert logprobs.isnan().all()
    sampled = candidate_rows(x, torch.full((N,), V, device=device), 10, threshold=math.log(0.1))[3]
    assert sampled.isnan().all()


@pytest.mark.parametrize("V", VOCABULARIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p_min", [0.004, 0.1])
def test_candidates(p_min, kind, V, device):
    slots = min(V, math.floor(1 / p_min))
    x, sampled = make_logits(kind, V, device), make_ids(V, device)[:, 0]
    ids, logprobs, counts, sampled_logprobs, entropy = candidate_rows(
        x, sampled, slots, threshold=ref_candidates.log_threshold(p_min)
    )
    same, truth = reference(lambda z: ref_candidates.select_candidates_from_logits(z, sampled.cpu(), p_min), x)
    assert torch.equal(ids.cpu(), truth.ids_NS[:, 1:])
    assert torch.equal(counts.cpu(), truth.counts_N)
    close(logprobs, same.logprobs_NS[:, 1:], truth.logprobs_NS[:, 1:], 1e-6)
    close(sampled_logprobs, same.sampled_logprobs_N, truth.sampled_logprobs_N, 1e-6)
    close(entropy, same.entropy_N, truth.entropy_N, 1e-6)


def test_candidates_at_the_borders_of_blocks(device):
    """Ten equal tokens, each first or last of a block, of a part of one or of the row; a row with none."""
    V = 1000
    x = torch.full((3, V), -40.0)
    members = [0, 127, 128, 255, 256, 511, 512, 640, 767, V - 1]
    x[0, members] = 0.0
    x[2, :5] = 5.0
    ids, _, counts, *_ = candidate_rows(
        x.to(device), torch.zeros(3, dtype=torch.int64, device=device), 20, threshold=math.log(0.05)
    )
    assert ids[0].tolist() == members + [-1] * 10
    assert counts.tolist() == [10, 0, 5]


@pytest.mark.parametrize(("threshold", "count"), [(0.0, 1), (1e-5, 0)])
def test_a_probability_equal_to_the_threshold(threshold, count, device):
    """log p = 0 is exact in every arithmetic."""
    x = torch.full((1, 300), -math.inf)
    x[0, 130] = 3.0
    _, _, counts, *_ = candidate_rows(x.to(device), torch.tensor([130], device=device), 1, threshold=threshold)
    assert counts.item() == count


def test_more_members_than_slots_stay_within_the_row(device):
    """Five members, room for two: the two lowest ids are kept and nothing is written behind them."""
    x = torch.full((1, 300), -40.0)
    x[0, [3, 50, 130, 200, 299]] = 0.0
    ids, logprobs = torch.full((8,), 7, device=device), torch.full((8,), 7.0, device=device)
    count, sampled = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(2, device=device)
    tensors = (None, ids, logprobs, count, sampled[:1], sampled[1:])
    candidate_rows_kernel[(1,)](
        x.to(device), 300, 300, 2, torch.zeros_like(count), *tensors, 1.0, 1.0, math.log(0.1),
        BLOCK=128, BLOCKS=4, PART=128, BLOCK_K=2, CAPPED=False, ROW_TEMPERATURE=False,
    )  # fmt: skip
    assert ids.tolist() == [3, 50, 7, 7, 7, 7, 7, 7]
    assert (logprobs[2:] == 7).all()
    assert count.item() == 2


def test_minus_infinity(device):
    """A first block, and columns beyond, that are all -inf: as if they were not there."""
    V = 500
    x, batch = make_logits("flat", V, device), make_batch(V - 200, device)
    x[:, :200] = -math.inf
    cut = x[:, 200:].contiguous()
    shifted = replace(batch, ids_NS=batch.ids_NS + 200 * (batch.ids_NS >= 0))
    out, want = torch.empty_like(x), torch.empty_like(cut)
    torch.testing.assert_close(run_policy(x, out, shifted), run_policy(cut, want, batch), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out[:, 200:], want, rtol=1e-5, atol=1e-7)
    assert (out[:, :200] == 0).all()


def test_rows_beyond_two_to_the_31st_element(device):
    """Two rows 2^31 elements apart; the memory between them is never touched."""
    V, apart = 130, 2**31
    if device.type == "cpu":
        flat = torch.from_numpy(np.zeros(apart + V, dtype=np.int16)).view(torch.bfloat16)  # pages come when touched
    else:
        flat = torch.zeros(apart + V, dtype=torch.bfloat16, device=device)
    x = flat.as_strided((2, V), (apart, 1))
    values, batch = make_logits("flat", V, device, rows=2).bfloat16(), make_batch(V, device).rows(slice(0, 2))
    x.copy_(values)
    out = torch.empty_like(values)
    want = run_policy(values, out, batch)
    assert torch.equal(run_policy(x, x, batch), want)
    assert torch.equal(x.clone(), out)


@pytest.mark.parametrize("scale", [1.0, -0.5, 0.0])
@pytest.mark.parametrize("contiguous", [True, False])
def test_rescale(contiguous, scale, device):
    wide = torch.randn(3, 5000).to(device)
    x = wide if contiguous else wide[:, :4500]
    before = wide.clone()
    rescale(x, torch.tensor(scale, device=device))
    assert torch.equal(x, before[:, : x.shape[1]] * scale)
    assert torch.equal(wide[:, x.shape[1] :], before[:, x.shape[1] :])


def test_rescale_by_one_touches_nothing(device):
    x = torch.randn(3, 50).to(device)
    version, before = x._version, x.clone()
    rescale(x, torch.ones((), device=device))
    assert (x._version, torch.equal(x, before)) == (version, True)


def test_the_same_bits_twice(device):
    x, batch = make_logits("flat", 1000, device), make_batch(1000, device)
    runs = []
    for _ in range(2):
        out = torch.empty_like(x)
        runs.append(
            [run_policy(x, out, batch), out, *candidate_rows(x, batch.ids_NS[:, 0], 10, threshold=math.log(0.1))]
        )
    assert all(map(torch.equal, *runs))


def test_no_rows(device):
    x, ids = torch.empty(0, 50, device=device), torch.empty(0, K, dtype=torch.int64, device=device)
    assert [tuple(y.shape) for y in row_logprobs(x, ids)[:4]] == [(0, K), (0,), (0,), (0, 2)]
    assert [len(y) for y in candidate_rows(x, ids[:, 0], 10, threshold=math.log(0.1))] == [0] * 5
    rescale(x, torch.ones((), device=device))
