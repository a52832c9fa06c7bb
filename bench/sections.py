"""What the GPU benchmark measures, a generator of rows for each section. A row without time left says so.

Shape letters: N rows, D hidden size, V vocabulary, K candidate slots.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

import ipvrm_core
from ipvrm_core.bench.cases import CANDIDATES, HEADS, TOY_HEADS, Setting
from ipvrm_core.bench.compare import EAGER, OURS, Run, compare, ours, providers, with_shape
from ipvrm_core.bench.problems import Problem, make_problem
from ipvrm_core.bench.truth import step as loss_step

ROWS = (1024, 2048, 4096, 8192, 16384, 32768)  # the last two: N V > 2^31
VOCABULARIES = (32768, 65536, 128256, 151936, 262144)
TOY_ROWS, TOY_VOCABULARIES = (1, 3), (64, 140)
SCALED = (OURS, EAGER, "TRL chunked log-prob", "Apple CCE")
Rows = Iterator[dict]


def rates(run: Run) -> Rows:
    """The device's own rates in this run: cuBLAS on a large square product, and a copy."""
    n, elements = (64, 1 << 16) if run.toy else (8192, 1 << 30)
    a, b, c = (torch.randn(n, n, device=run.device, dtype=run.dtype) for _ in range(3))
    source = torch.randn(elements, device=run.device, dtype=run.dtype)
    target = torch.empty_like(source)
    functions = {"product": lambda: torch.mm(a, b, out=c), "copy": lambda: target.copy_(source)}
    timed = run.measure(functions)
    for name, row in timed.items():
        if "cold_ms" in row and name == "product":
            row |= {"size": n, "tflop_per_s": 2 * n**3 / (row["cold_ms"]["median"] * 1e9)}
        elif "cold_ms" in row:
            moved = 2 * elements * run.dtype.itemsize
            row |= {"bytes": moved, "gb_per_s": moved / (row["cold_ms"]["median"] * 1e6)}
        yield {"provider": name, **row}


def loss(run: Run) -> Rows:
    """The loss, forward and backward, on every head: DistRL, then the sampled token alone.

    torch.compile takes long to compile every case anew, so it takes part in DistRL with a frozen head of two models.
    """
    order = [("Qwen3-8B", "Qwen3-0.6B"), ("Llama-3.2-1B", "Gemma-3-270M")]
    for models in order[:1] if run.toy else order:
        for kind in ("distrl", "ppo"):
            for frozen in (True, False):
                for model in models[:1] if run.toy else models:
                    compiling = models is order[0] and kind == "distrl" and frozen
                    yield from _compared(run, _setting(run, model, frozen=frozen, loss=kind), compiling=compiling)


def step(run: Run) -> Rows:
    """The step-cost table (the paper's Table 13): the passes of DistRL and of GRPO (alpha = 0, K = 0), same code."""
    for frozen in (True, False):
        for model in ("Qwen3-8B",) if run.toy else ("Qwen3-8B", "Qwen3-0.6B", "Llama-3.2-1B", "Gemma-3-270M"):
            setting = _setting(run, model, frozen=frozen)
            if run.late():
                yield _late(setting.name)
                continue
            problem = make_problem(setting, run.device, run.dtype)
            run.meter.release()
            timed = run.measure(_passes(run, problem))
            for name, row in timed.items():
                yield {"case": f"{model}, {'frozen' if frozen else 'trained'} head", "model": model, "frozen": frozen,
                       "provider": name, "statistics": problem.statistics, **row}  # fmt: skip


def _passes(run: Run, problem: Problem) -> dict[str, Callable[[], object]]:
    """The parts of a step. The reward model's pass is timed on the policy's head: only its shape matters."""
    hidden, weight, batch = problem.hidden_ND.detach(), problem.weight_VD.detach(), problem.batch
    sampled_alone = replace(problem, batch=_without_candidates(batch))
    logprobs, select = ipvrm_core.linear_logprobs, ipvrm_core.select_candidates
    sampled_N, ids_NS = problem.sampled.ids_N, batch.ids_NS
    return {
        "old policy, log-prob": lambda: logprobs(hidden, weight, sampled_N[:, None], backend=run.backend),
        "old policy, candidates": lambda: select(hidden, weight, sampled_N, backend=run.backend),
        "reward model, candidates": lambda: logprobs(hidden, weight, ids_NS, backend=run.backend),
        "loss, GRPO": lambda: loss_step(ours(run, "ppo").loss(sampled_alone), sampled_alone),
        "loss, DistRL": lambda: loss_step(ours(run, "distrl").loss(problem), problem),
    }


def _without_candidates(batch: ipvrm_core.PolicyBatch) -> ipvrm_core.PolicyBatch:
    names = ("ids_NS", "old_logprobs_NS", "advantages_NS")
    return replace(batch, **{name: getattr(batch, name)[:, :1].contiguous() for name in names})


def logits(run: Run) -> Rows:
    """The loss of given logits, in GB/s on the fewest bytes."""
    for kind in ("distrl", "ppo"):
        cases = (("Qwen3-0.6B", 8192), ("Llama-3.2-1B", 8192), ("Qwen3-0.6B", 16384))
        for model, N in cases[:1] if run.toy else cases:
            setting = _setting(run, model, loss=kind)
            setting = setting if run.toy else with_shape(setting, N=N, D=512)
            yield from _compared(run, setting, level="logits", compiling=N == 8192 and kind == "distrl")


def rows(run: Run) -> Rows:
    """Time and memory against N, frozen Qwen3-0.6B head."""
    for N in TOY_ROWS if run.toy else ROWS:
        yield from _compared(run, with_shape(_setting(run, "Qwen3-0.6B"), N=N), names=SCALED)


def vocabularies(run: Run) -> Rows:
    """Time and memory against V, hidden size 1024, frozen."""
    for V in TOY_VOCABULARIES if run.toy else VOCABULARIES:
        yield from _compared(run, with_shape(_setting(run, "Qwen3-0.6B"), V=V), names=SCALED)


def variants(run: Run) -> Rows:
    """Candidates, masked share, and flat or peaked rows, frozen Qwen3-0.6B head."""
    for peaked in (True, False):
        for candidates in CANDIDATES:
            for masked in (0.3,) if run.toy else (0.0, 0.3):
                setting = _setting(run, "Qwen3-0.6B", candidates=candidates, masked=masked, peaked=peaked)
                yield from _compared(run, setting, names=(OURS, EAGER))


def _compared(
    run: Run, setting: Setting, names: tuple[str, ...] | None = None, level: str = "linear", compiling: bool = True
) -> Rows:
    if run.late():
        yield _late(setting.name)
        return
    chosen = [p for p in providers(run, setting, level, compiling) if names is None or p.name in names]
    yield from compare(run, setting, chosen, level)


def _setting(run: Run, model: str, **settings) -> Setting:
    return Setting(model, (TOY_HEADS if run.toy else HEADS)[model], **settings)


def _late(name: str) -> dict:
    return {"case": name, "skipped": "no time left"}
