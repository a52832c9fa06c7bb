"""Every public function on the device against the reference in float64, before any of its times counts.

The criterion, as in tests/: |truth - ours| <= 2 |truth - torch in the same dtype| + tolerance(dtype), by the largest
entry of every output and gradient. Fresh memory is NaN while it is checked, so an element that nothing wrote fails.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

import ipvrm_core as ic
from ipvrm_core import Candidates
from ipvrm_core.bench import functions
from ipvrm_core.bench.device import describe
from ipvrm_core.bench.functions import ALL, EVERYTHING, FROM_LOGITS, outputs_and_gradients
from ipvrm_core.bench.inputs import Inputs, make_inputs
from ipvrm_core.bench.invariants import Check, bit_checks, torch_checks
from ipvrm_core.sequences import segments, torch_segments

LOSSES = ("distrl_loss", "distrl_loss_from_logits")
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-3}  # of the largest entry of the truth


def section(run) -> Iterator[dict]:
    """A row a check: {"check", "function", "passed", "detail"}."""
    for check, function, body in [*value_checks(run), *sequence_checks(run), *bit_checks(run), *torch_checks(run)]:
        if run.late():
            yield {"check": check, "function": function, "passed": None, "detail": "no time left"}
            continue
        row = {"check": check, "function": function, "passed": True}
        try:
            row["detail"] = body()
        except AssertionError as error:
            row |= {"passed": False, "detail": str(error)}
        except Exception as error:  # a crash is a failed check
            row |= {"passed": False, "detail": describe(error)}
        yield row


def value_checks(run) -> Iterator[tuple[str, str, Check]]:
    shapes = {"odd V": (37, 13, 101, 10), "V 1187": (9, 32, 1187, 4), "one row": (1, 7, 129, 10), "K 0": (5, 8, 130, 0)}
    shapes = {"odd V": (2, 13, 101, 10), "K 0": (1, 8, 130, 0)} if run.toy else shapes
    for dtype in TOLERANCE:
        for name, shape in shapes.items():
            make = partial(make_inputs, *shape, run.device, dtype)
            yield from ((f"{name}, {_short(dtype)}", f, partial(agrees, run, f, make)) for f in ALL)
    special = {
        "every setting, T 1.7": {"config": EVERYTHING},
        "one temperature a row": {"row_temperatures": True},
        "all logits negative": {"scale": 0.1, "shift": -50.0},
        "|z| 1e4": {"shift": -1e4, "tolerance": 1e-4},  # a tenth of the spacing of float32 numbers there
        "|z| 3e3, peaked": {"scale": 3000.0, "tolerance": 1e-4},
        "all rows masked": {"change": _masked},
        "equal candidates": {"change": _equal_candidates},
        "rows apart in memory": {"change": _strided},
        "KL times the ratio": {"config": replace(EVERYTHING, kl_ratio=True), "of": LOSSES},
        "on-policy": {"change": _on_policy, "of": LOSSES},
    }
    for name, knobs in special.items():
        tolerance, change, names = knobs.pop("tolerance", None), knobs.pop("change", None), knobs.pop("of", ALL)
        shape = (2, 5, 101, 6) if run.toy else (21, 5, 131, 6)
        make = partial(make_inputs, *shape, run.device, torch.float32, **knobs)
        yield from ((name, f, partial(agrees, run, f, make, change, tolerance)) for f in names)
    if run.toy:
        return
    for name, shape in {"Qwen3 vocabulary": (64, 64, 151936, 10), "70000 rows": (70000, 8, 129, 3)}.items():
        make = partial(make_inputs, *shape, run.device, torch.bfloat16)
        yield from ((name, f, partial(agrees, run, f, make)) for f in ALL)
    yield from (("N V > 2^31", f, partial(beyond_int32, run, f)) for f in FROM_LOGITS[:2])


def agrees(
    run, function: str, make: Callable[[], Inputs], change: Callable | None = None, tolerance: float | None = None
) -> None:
    x = make().at_logits() if function in FROM_LOGITS else make()
    x = change(x) if change else x
    exact = outputs_and_gradients(function, x.to(torch.float64), "reference")
    same = functions.torch_in_the_same_dtype(function, x)
    with nan_memory():
        ours = outputs_and_gradients(function, x, run.backend)
    tolerance = tolerance or TOLERANCE[x.wanted[0].dtype]
    if "select" in function:
        _same_candidates(*(Candidates(*values) for values in (ours, same, exact)))
        ours, same, exact = ([values[1][:, 0], values[3]] for values in (ours, same, exact))
    no_worse(ours, same, exact, tolerance)


def no_worse(ours: list[Tensor], same: list[Tensor], exact: list[Tensor], tolerance: float) -> None:
    for i, (got, torch_same, true) in enumerate(zip(ours, same, exact, strict=True)):
        assert got.shape == true.shape, f"output {i}: shape {tuple(got.shape)}, not {tuple(true.shape)}"
        if not true.numel():
            continue
        error, allowed = (got.double() - true).abs().max().item(), (torch_same.double() - true).abs().max().item()
        bound = 2 * allowed + tolerance * max(true.abs().max().item(), 1.0)
        assert error <= bound, f"output {i}: error {error:.1e} > {bound:.1e} (torch in the same dtype: {allowed:.1e})"


def _same_candidates(ours: Candidates, same: Candidates, exact: Candidates, p_min: float = 0.1) -> None:
    """Equal ids and counts, except in rows where the rounding of the logits can move a token across P_min."""
    noise = (same.sampled_logprobs_N.double() - exact.sampled_logprobs_N).abs().max().item()
    margin_NK = (exact.logprobs_NS - math.log(p_min)).abs()[:, 1:]
    near_N = (margin_NK < 4 * noise + 1e-3).any(-1) & (exact.counts_N > 0)
    sure_N = ~near_N & (noise < 0.1)  # a token just below P_min is not in the list, so much noise excuses every row
    assert torch.equal(ours.ids_NS[sure_N], exact.ids_NS[sure_N]), "other candidates than the reference"
    assert torch.equal(ours.counts_N[sure_N], exact.counts_N[sure_N]), "other counts than the reference"


def beyond_int32(run, function: str) -> None:
    """Gradients of the last rows: their offset in the logits is above 2^31. A row's gradient is its own affair."""
    N, V = 16384, 151936
    logits = torch.randn(N, V, dtype=torch.bfloat16, device=run.device).requires_grad_()
    x, rows = replace(make_inputs(N, 1, 2, 2, run.device, torch.bfloat16), logits=logits), slice(N - 8, N)
    part = replace(x, logits=logits.detach()[rows].requires_grad_(), batch=x.batch.rows(rows))

    def gradient(inputs: Inputs, backend: str) -> Tensor:
        if "distrl" in function:
            total = functions.call(function, inputs, backend)[1]
        else:
            total = sum(x.sum() for x in ic.logprobs_from_logits(inputs.logits, inputs.batch.ids_NS, backend=backend))
        return torch.autograd.grad(total, inputs.wanted)[0]

    exact, same = gradient(part.to(torch.float64), "reference"), gradient(part, "reference")
    no_worse([gradient(x, run.backend)[rows]], [same], [exact], 0.0)


def sequence_checks(run) -> Iterator[tuple[str, str, Check]]:
    lengths = [1, 140, 17, 3, 0, 2] if run.toy else [1, 70000, 17, 3, 0, 4096, 1025, 2]
    x_N = 0.1 * torch.randn(sum(lengths), generator=torch.Generator().manual_seed(0)).to(run.device)

    def body(function: Callable[[Tensor], Tensor]) -> None:
        def value_and_gradient(x: Tensor) -> list[Tensor]:
            value = function(x.requires_grad_())
            return [value.detach(), *torch.autograd.grad(functions._weighted(value), [x])]

        exact = value_and_gradient(x_N.double())  # which the kernels do not take
        with patch.object(segments, "triton_segments", torch_segments):
            same = value_and_gradient(x_N.clone())
        with nan_memory():
            ours = value_and_gradient(x_N.clone())
        no_worse(ours, same, exact, 1e-6)

    for name, function in functions.sequence_functions(lengths, run.device).items():
        yield "long, short and empty sequences", name, partial(body, function)


@contextmanager
def nan_memory() -> Iterator[None]:
    """torch.empty gives NaN (integers: the largest) inside."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # operators that have no deterministic form
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _masked(x: Inputs) -> Inputs:
    zeros = torch.zeros_like(x.batch.token_weights_N)
    return replace(x, batch=replace(x.batch, token_weights_N=zeros, candidate_weights_N=zeros))


def _on_policy(x: Inputs) -> Inputs:
    return replace(x, batch=replace(x.batch, old_logprobs_NS=None))


def _equal_candidates(x: Inputs) -> Inputs:
    ids_NS = x.batch.ids_NS
    return replace(x, batch=replace(x.batch, ids_NS=ids_NS[:, :1].expand_as(ids_NS).contiguous()))


def _strided(x: Inputs) -> Inputs:
    def apart(leaf: Tensor) -> Tensor:
        return torch.cat([leaf.detach(), leaf.detach()], dim=1)[:, : leaf.shape[1]].requires_grad_()

    return replace(x, hidden=apart(x.hidden), logits=None if x.logits is None else apart(x.logits))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
