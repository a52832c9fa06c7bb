"""What to tune with: every row kernel over launch configurations, and the loss over its buffer budget.

The table in kernels/launch.py and the default budget of fused/head.py are chosen from register counts and arithmetic;
this section is what a GPU says to them. The configuration in use stands first.
"""

from collections.abc import Callable, Iterator
from functools import partial
from math import inf, log

import torch
from torch import Tensor

import ipvrm_core
from ipvrm_core.bench.cases import HEADS, TOY_HEADS, Setting
from ipvrm_core.bench.compare import Run
from ipvrm_core.bench.problems import make_problem
from ipvrm_core.bench.truth import step
from ipvrm_core.kernels.candidates import candidate_rows
from ipvrm_core.kernels.launch import Launch, architecture_of, row_launch
from ipvrm_core.kernels.logprobs import row_logprobs
from ipvrm_core.kernels.policy_rows import Clip, policy_rows

LAUNCHES = tuple(
    Launch(*pair) for pair in ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16), (8192, 32))
)
BUDGETS_MIB = (223, 334, 446, 557, 668, 892, 1783, 3565)  # 256, 384, 512, 640, 768, 1024, 2048 and 4096 rows of Qwen3
TOY_BUDGETS_MIB = (128, 256)
UNCLIPPED = Clip(1.0, inf, inf)  # a clipped row would not be read a second time
K = 11


def section(run: Run) -> Iterator[dict]:
    """ms and GB/s of the row kernels at [2048, 151936], then ms of the 8B loss over the budget."""
    n, V = (1, 200) if run.toy else (2048, 151936)
    launches = (Launch(64, 1), Launch(128, 1)) if run.toy else LAUNCHES
    for dtype in (torch.float32, torch.bfloat16):
        x_nV = torch.randn(n, V, device=run.device, dtype=dtype) * 3
        used = row_launch(architecture_of(run.device), dtype.itemsize, V)
        for kernel, (function, moved) in row_kernels(x_nV).items():
            if run.late():
                yield {"case": f"{kernel}, {dtype}", "skipped": "no time left"}
                continue
            chosen = dict.fromkeys((used, *launches))
            for launch, row in run.measure({choice: partial(function, launch=choice) for choice in chosen}).items():
                rate = {"gb_per_s": moved / (row["cold_ms"]["median"] * 1e6)} if "cold_ms" in row else {}
                facts = {"launch": launch._asdict(), "in_use": launch == used, "bytes": moved}
                yield {
                    "case": f"{kernel}, {dtype}",
                    "provider": f"{launch.block} / {launch.num_warps}",
                    **facts,
                    **row,
                    **rate,
                }
    yield from budgets(run)


def row_kernels(x_nV: Tensor) -> dict[str, tuple[Callable[..., object], int]]:
    """Name -> (function of `launch`, least bytes). The policy kernel writes bfloat16, in one visit and in two."""
    n, V = x_nV.shape
    ids_nK = torch.randint(V, (n, K), device=x_nV.device)
    ones_nK, weights_n = torch.ones(n, K, device=x_nV.device), torch.full((n,), 1 / n, device=x_nV.device)
    out_nV = torch.empty_like(x_nV, dtype=torch.bfloat16)
    near_nK = row_logprobs(x_nV, ids_nK)[0]
    policy = partial(
        policy_rows, x_nV, out_nV, ids_nK, near_nK, ones_nK, weights_n, weights_n, None,
        alpha=0.1, clip=UNCLIPPED, candidate_clip=UNCLIPPED,
    )  # fmt: skip
    one_visit = partial(policy, scale_N=torch.empty_like(weights_n))
    return {
        "candidates": (partial(candidate_rows, x_nV, ids_nK[:, 0], 10, threshold=log(0.1)), x_nV.nbytes),
        "log-probs": (partial(row_logprobs, x_nV, ids_nK), x_nV.nbytes),
        "log-probs, near known": (partial(row_logprobs, x_nV, ids_nK, near_N=near_nK[:, 0]), x_nV.nbytes),
        "policy, one visit": (one_visit, x_nV.nbytes + out_nV.nbytes),
        "policy, two visits": (policy, x_nV.nbytes + out_nV.nbytes),
    }


def budgets(run: Run) -> Iterator[dict]:
    """distrl_loss over its buffers; what the weight's gradient adds up to wants larger ones (fused/head.py)."""
    for model, frozen in (("Qwen3-8B", True), ("Qwen3-8B", False), ("Qwen3-0.6B", True)):
        case = f"max_buffer_bytes, {model} {'frozen' if frozen else 'trained'}"
        if run.late():
            yield {"case": case, "skipped": "no time left"}
            continue
        setting = Setting(model, (TOY_HEADS if run.toy else HEADS)[model], frozen=frozen)
        for provider, row in _budgets(run, setting):
            yield {"case": case, "provider": provider, **row}


def _budgets(run: Run, setting: Setting) -> Iterator[tuple[str, dict]]:
    problem = make_problem(setting, run.device, run.dtype)

    def loss(mib: int) -> list[Tensor]:
        options = {"backend": run.backend, "max_buffer_bytes": mib << 20}
        return step(
            ipvrm_core.distrl_loss(problem.hidden_ND, problem.weight_VD, problem.batch, **options).loss, problem
        )

    budgets_mib = TOY_BUDGETS_MIB if run.toy else BUDGETS_MIB
    for mib, row in run.measure({mib: partial(loss, mib) for mib in budgets_mib}).items():
        yield f"{mib} MiB", row
