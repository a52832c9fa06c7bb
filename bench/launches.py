"""The launches that this library ships, for bench/resources.py: calls of the launchers in kernels/.

Adding a kernel: a function that calls its launcher, with `launch=` of the target if it has one; a Shipped for every
combination of dtype and options whose code differs; the budget of its jit function in BUDGETS.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ipvrm_core.kernels.candidates import candidate_rows
from ipvrm_core.kernels.launch import Launch, row_launch
from ipvrm_core.kernels.logit_gradient import logit_gradient
from ipvrm_core.kernels.logprobs import row_logprobs
from ipvrm_core.kernels.moments import group_moments
from ipvrm_core.kernels.policy_rows import Clip, policy_rows
from ipvrm_core.kernels.rescale import rescale
from ipvrm_core.kernels.segments import scan, total

N, B, K = 4096, 256, 11  # rows, sequences, and the sampled token with 10 candidates, as many as p_min = 0.1 allows
QWEN, GPT2 = 151936, 50257  # rows that begin at multiples of 16 bytes; an odd vocabulary, loaded element by element
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Shipped(NamedTuple):
    """`launch(target)` calls a launcher with what that architecture would run."""

    case: str
    launch: Callable[[str], object]


class Budget(NamedTuple):
    """Registers of a thread and shared bytes of a program on sm_90; nothing may spill there."""

    registers: int
    shared: int


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """On the device meta: aligned, of full size, and without memory. Launchers take only "cpu" for the interpreter."""
    return torch.empty(shape, dtype=dtype, device="meta")


def ids(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.int64)


def logprobs(target: str, x_NV: Tensor, **options) -> None:
    row_logprobs(x_NV, ids(N, K), launch=_launch(target, x_NV), **options)


def gradient(target: str, x_NV: Tensor, out: torch.dtype | None = None, **options) -> None:
    statistics = (empty(N, 2), empty(N))
    out_NV = empty(*x_NV.shape, dtype=out or x_NV.dtype)
    logit_gradient(x_NV, out_NV, ids(N, K), empty(N, K), *statistics, launch=_launch(target, x_NV), **options)


def policy(
    target: str,
    x_NV: Tensor,
    out: torch.dtype | None = None,
    metrics_only: bool = False,
    on_policy: bool = False,
    slots: int = K,
    ref=None,
    **options,
) -> None:
    """`out`: one visit, the exponentials in that type; otherwise the gradient takes the place of the logits."""
    given = (ids(N, slots), None if on_policy else empty(N, slots), empty(N, slots)), (empty(N), empty(N))
    clips = {"clip": Clip(0.2, 0.28, 3.0), "candidate_clip": Clip(0.2, 0.28, 3.0)}
    out_NV = None if metrics_only else x_NV
    if out is not None:
        out_NV, options["scale_N"] = empty(N, x_NV.stride(0), dtype=out)[:, : x_NV.shape[1]], empty(N)
    launch = _launch(target, x_NV)
    policy_rows(x_NV, out_NV, *given[0], *given[1], ref, alpha=1.0, **clips, launch=launch, **options)


def candidates(target: str, x_NV: Tensor, **options) -> None:
    candidate_rows(x_NV, ids(N), K - 1, threshold=math.log(0.1), launch=_launch(target, x_NV), **options)


def _launch(target: str, x_NV: Tensor) -> Launch:
    return row_launch(target, x_NV.element_size(), x_NV.shape[1])


def rows(name: str, function: Callable, every_option: dict) -> list[Shipped]:
    """A sweep over logits: both dtypes, without and with its options, and with them on an odd vocabulary."""
    return [
        Shipped(
            f"{name}{' + options' if options else ''}, {dtype}, V {V}",
            partial(function, x_NV=empty(N, V, dtype=DTYPES[dtype]), **options),
        )
        for dtype in DTYPES
        for V, options in ((QWEN, {}), (QWEN, every_option), (GPT2, every_option))
    ]


def logits(dtype: str) -> Tensor:
    return empty(N, QWEN, dtype=DTYPES[dtype])


def packed(name: str, function: Callable, *arguments) -> Shipped:
    """A reduction or scan over sequences: the same on every target."""
    return Shipped(name, lambda target: function(*arguments))


HEAD = {"temperatures_N": empty(N), "softcap": 30.0}
GRADS = {"grad_lse_N": empty(N), "grad_entropy_N": empty(N)}
POLICY = {"ref": empty(N), "kl_coef": 0.1, "kl_ratio": True, "entropy_coef": 0.1}
CU_SEQLENS = empty(B + 1, dtype=torch.int32)

LAUNCHES = [
    *rows("log-probs", logprobs, {**HEAD, "old_logprobs_NK": empty(N, K)}),
    *rows("gradient", gradient, {**HEAD, **GRADS}),
    *(
        Shipped(f"log-probs, near known, {dtype}", partial(logprobs, x_NV=logits(dtype), near_N=empty(N)))
        for dtype in DTYPES
    ),
    *(
        Shipped(
            f"log-probs, one visit, {dtype} to bfloat16",
            partial(logprobs, x_NV=logits(dtype), near_N=empty(N), out_NV=logits("bfloat16")),
        )
        for dtype in DTYPES
    ),
    Shipped("gradient, float32 to bfloat16", partial(gradient, x_NV=logits("float32"), out=torch.bfloat16)),
    *(
        Shipped(
            f"gradient after one visit of {dtype}",
            partial(gradient, x_NV=logits(dtype), out=torch.bfloat16, total_N=empty(N), grad_lse_N=empty(N)),
        )
        for dtype in DTYPES
    ),
    *rows("policy loss", policy, {**HEAD, **POLICY}),
    *(
        Shipped(f"policy loss, on-policy, {dtype}", partial(policy, x_NV=logits(dtype), on_policy=True))
        for dtype in DTYPES
    ),
    *(
        Shipped(f"policy loss, one visit, {dtype} to bfloat16", partial(policy, x_NV=logits(dtype), out=torch.bfloat16))
        for dtype in DTYPES
    ),
    Shipped(
        "policy loss, one visit, 101 slots", partial(policy, x_NV=logits("float32"), out=torch.bfloat16, slots=101)
    ),
    *(
        Shipped(
            f"policy loss, one visit{' + options' if options else ''}, V 50257 in rows of 50304",
            partial(policy, x_NV=empty(N, 50304)[:, :GPT2], out=torch.bfloat16, **options),
        )
        for options in ({}, HEAD)
    ),
    Shipped("policy loss, metrics only, bfloat16", partial(policy, x_NV=logits("bfloat16"), metrics_only=True)),
    *rows("candidates", candidates, HEAD),
    *(packed(f"rescale, {dtype}", rescale, logits(dtype), empty()) for dtype in DTYPES),
    packed("scan", scan, empty(N), CU_SEQLENS),
    packed("scan, reverse, decay", scan, empty(N), CU_SEQLENS, 0.95, True),
    packed("total", total, empty(N), CU_SEQLENS),
    packed("group moments", group_moments, empty(N), CU_SEQLENS, ids(B)),
]

# 128 registers leave room for 2 programs of 8 warps on an SM, each with a block of 16 KiB on its way; 64 for 4.
BUDGETS = {
    "row_logprobs_kernel": Budget(registers=128, shared=1024),
    "logit_gradient_kernel": Budget(registers=128, shared=1024),
    "policy_rows_kernel": Budget(registers=128, shared=1024),
    "candidate_rows_kernel": Budget(registers=128, shared=1024),
    "rescale_kernel": Budget(registers=64, shared=0),
    "scan_kernel": Budget(registers=96, shared=1024),
    "total_kernel": Budget(registers=96, shared=1024),
    "sequence_moments_kernel": Budget(registers=96, shared=1024),
    "group_moments_kernel": Budget(registers=96, shared=1024),
}
