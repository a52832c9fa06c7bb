"""`python -m ipvrm_core.bench.probe [PART ...]`: what the design rests on and no one has measured, as JSON lines.

Two minutes on a GPU; on a CPU tiny sizes, to see that it runs. Times are medians of events behind a sleep of the
device, so that no host time is in them. Shape letters: n rows of a chunk, D hidden size, V vocabulary.
"""

import json
import sys
from collections.abc import Callable

import torch

import ipvrm_core
from ipvrm_core.bench.cases import Setting, Shape
from ipvrm_core.bench.device import SLEEP_CYCLES
from ipvrm_core.bench.problems import make_problem
from ipvrm_core.bench.truth import step
from ipvrm_core.kernels.policy_rows import Clip, policy_rows

TOY = not torch.cuda.is_available()
DEVICE = torch.device("cpu" if TOY else "cuda")
DTYPE = torch.float32 if TOY else torch.bfloat16
N, V, WIDTHS = (8, 141, (16,)) if TOY else (8192, 151936, (1024, 2048, 4096))
ROWS = (2, 4, 8) if TOY else (256, 384, 512, 640, 768, 1024, 2048, 4096)
WIDE = {} if TOY else {"out_dtype": torch.float32}  # a CPU's float32 products have no other result
REPEATS = 7


def milliseconds(function: Callable[[], object]) -> float:
    if TOY:
        function()
        return 0.0
    times = []
    for _ in range(REPEATS + 2):
        torch.cuda._sleep(SLEEP_CYCLES)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[2:])[REPEATS // 2]


def say(**facts) -> None:
    print(json.dumps(facts), flush=True)


def products() -> None:
    """Each product of the loop by rows a chunk, and what its output type costs. Which n is the best for which D?"""
    for D in WIDTHS:
        W_VD, dW_VD = torch.randn(V, D, device=DEVICE, dtype=DTYPE), torch.zeros(V, D, device=DEVICE)
        for n in ROWS:
            h_nD, x_nV = torch.randn(n, D, device=DEVICE, dtype=DTYPE), torch.empty(n, V, device=DEVICE)
            g_nV = torch.randn(n, V, device=DEVICE, dtype=DTYPE)
            calls = {
                "logits, float32": lambda: torch.mm(h_nD, W_VD.t(), out=x_nV, **WIDE),  # noqa: B023
                "logits, bfloat16": lambda: torch.mm(h_nD, W_VD.t(), out=g_nV),  # noqa: B023
                "dh, float32": lambda: torch.mm(g_nV, W_VD, **WIDE),  # noqa: B023
                "dh, bfloat16": lambda: torch.mm(g_nV, W_VD),  # noqa: B023
                "dW, float32": lambda: torch.mm(g_nV.t(), h_nD, out=dW_VD, **WIDE),  # noqa: B023
                "dW, added": lambda: torch.addmm(dW_VD, g_nV.t(), h_nD, out=dW_VD, **WIDE),  # noqa: B023
            }
            times = {name: milliseconds(call) for name, call in calls.items()}
            say(D=D, n=n, tflops={name: round(2e-9 * n * D * V / t, 1) if t else None for name, t in times.items()})


def visits() -> None:
    """The row kernel at n rows: one visit with a known shift, and two; GB/s over the bytes that each must move."""
    for n in ROWS:
        batch = make_problem(Setting("probe", Shape(n, 16, V)), DEVICE, DTYPE).batch
        x_nV = torch.randn(n, V, device=DEVICE) * 3
        x_nV.scatter_(1, batch.ids_NS[:, :1], 12.0)
        old_nS = torch.log_softmax(x_nV, -1).gather(1, batch.ids_NS.clamp(min=0))
        out_nV, scale_n = torch.empty(n, V, device=DEVICE, dtype=DTYPE), torch.empty(n, device=DEVICE)
        clip = Clip(1.0, float("inf"), float("inf"))  # no row is quiet
        given = (batch.ids_NS, old_nS, batch.advantages_NS, batch.token_weights_N, batch.candidate_weights_N, None)
        kind = {"alpha": 0.1, "clip": clip, "candidate_clip": clip}
        one = milliseconds(lambda: policy_rows(x_nV, out_nV, *given, **kind, scale_N=scale_n))  # noqa: B023
        two = milliseconds(lambda: policy_rows(x_nV, out_nV, *given, **kind))  # noqa: B023
        size = n * V * (4 + out_nV.element_size())
        gb_per_s = {name: round(size / t / 1e6) if t else None for name, t in (("one", one), ("two", two))}
        say(n=n, one_visit_ms=round(one, 4), two_visits_ms=round(two, 4), least_bytes_gb_per_s=gb_per_s)


def loops() -> None:
    """The whole loss by rows a chunk, and the kernels of one call by their time: what lies between them?"""
    for D in WIDTHS:
        problem = make_problem(Setting("probe", Shape(N, D, V)), DEVICE, DTYPE)

        def loss(n: int):
            budget = n * V * (4 + DTYPE.itemsize)
            out = ipvrm_core.distrl_loss(problem.hidden_ND, problem.weight_VD, problem.batch, max_buffer_bytes=budget)  # noqa: B023
            return step(out.loss, problem)  # noqa: B023

        for n in ROWS:
            say(D=D, n=n, loss_ms=round(milliseconds(lambda: loss(n)), 3))  # noqa: B023
        if TOY:
            continue
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as log:
            loss(512)
            torch.cuda.synchronize()
        for event in sorted(log.key_averages(), key=lambda e: -e.self_device_time_total)[:12]:
            say(D=D, kernel=event.key[:90], calls=event.count, ms=round(event.self_device_time_total / 1e3, 3))


def split_k() -> None:
    """Whether cuBLAS may add the partial sums of dh in bfloat16, and what that costs in error."""
    n, D = ROWS[2], WIDTHS[0]
    g_nV, W_VD = (torch.randn(*size, device=DEVICE, dtype=DTYPE) for size in ((n, V), (V, D)))
    exact = g_nV.double() @ W_VD.double()
    for allowed in (True, False):
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = allowed
        error = (torch.mm(g_nV, W_VD).double() - exact).norm() / exact.norm()
        ms = milliseconds(lambda: torch.mm(g_nV, W_VD))
        say(reduced_precision_reduction=allowed, error=f"{error:.2e}", dh_ms=round(ms, 3))


def in_place() -> None:
    """Equal bits of the in-place gradient, where a warp may still gather a logit that another overwrites."""
    n, columns = (4, 130) if TOY else (2048, 2048)
    x_nV, first = torch.randn(n, columns, device=DEVICE), None
    problem = make_problem(Setting("race", Shape(n, 16, columns)), DEVICE, DTYPE)
    for call in range(2 if TOY else 300):
        leaf = x_nV.clone().requires_grad_()
        loss = ipvrm_core.distrl_loss_from_logits(leaf * 1.0, problem.batch, inplace=True).loss
        (gradient,) = torch.autograd.grad(loss, leaf)
        first = gradient.clone() if first is None else first
        if not torch.equal(gradient, first):
            say(in_place="DIFFERENT BITS", call=call)
            return
    say(in_place="equal bits", calls=call + 1)


def one_loss() -> None:
    """For a profiler: the loss of the small head, twice, the first to compile."""
    problem = make_problem(Setting("probe", Shape(N, WIDTHS[0], V)), DEVICE, DTYPE)
    for _ in range(2):
        step(ipvrm_core.distrl_loss(problem.hidden_ND, problem.weight_VD, problem.batch).loss, problem)


PARTS = {part.__name__: part for part in (products, visits, split_k, in_place, loops)}
if __name__ == "__main__":
    for name in sys.argv[1:] or PARTS:
        {**PARTS, "one_loss": one_loss}[name]()
