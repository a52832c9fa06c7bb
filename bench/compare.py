"""The library and its peers on one problem: time, memory, and the error against float64 beside each time."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor

import ipvrm_core
from ipvrm_core import PolicyLossConfig
from ipvrm_core.bench.cases import Setting
from ipvrm_core.bench.device import ROUNDS, Meter, describe, measure
from ipvrm_core.bench.peers import peers
from ipvrm_core.bench.peers.base import Loss, Peer
from ipvrm_core.bench.problems import Problem, make_problem
from ipvrm_core.bench.truth import deviations, step, truth

OURS, ROOMY, PRODUCTS, EAGER = "ours", "ours, 2 GiB buffer", "the products alone", "eager"
ROOMY_BUFFER = 2 << 30  # bytes; the default keeps within the memory aim
# A gradient whose relative error is above this is no result, and gets no speed-up. It is wide because a logit rounded
# to bfloat16 can move a ratio across its clip bound, and then the row's gradient differs: eager was seen 20% off.
WRONG = 0.5


@dataclass
class Run:
    """What every section gets."""

    device: torch.device
    backend: str
    toy: bool
    meter: Meter
    deadline: float = float("inf")  # of the section, on time.monotonic
    end: float = float("inf")  # of the whole run
    case_seconds: float = 6.0  # for the timed rounds of one case
    rounds: int = ROUNDS
    peer_names: list[str] | None = None  # None: all

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16, as in training; float32 on a CPU, whose products of bfloat16 have no float32 result."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def measure(self, functions: dict[str, Callable[[], object]]) -> dict[str, dict]:
        return measure(self.meter, functions, self.case_seconds, self.rounds)

    def available(self, level: str) -> list[Peer]:
        wanted = (p for p in peers(level) if self.peer_names is None or p.name in self.peer_names)
        return [p for p in wanted if p.unavailable(self.device) is None]


@dataclass(frozen=True)
class Provider:
    name: str
    loss: Loss
    computes: str = "the same loss"
    call: str = ""
    kind: str = "distrl"
    prepare: Callable[[Problem], Problem] = lambda problem: problem


def ours(run: Run, kind: str, max_buffer_bytes: int | None = None) -> Provider:
    """distrl_loss; kind "ppo" is alpha = 0 and no candidates, the GRPO loss."""
    config = PolicyLossConfig() if kind == "distrl" else PolicyLossConfig(alpha=0.0)
    options = {"backend": run.backend, "max_buffer_bytes": max_buffer_bytes}

    def loss(problem: Problem) -> Tensor:
        if problem.logits_NV is not None:
            return ipvrm_core.distrl_loss_from_logits(problem.logits_NV, problem.batch, config, **options).loss
        return ipvrm_core.distrl_loss(problem.hidden_ND, problem.weight_VD, problem.batch, config, **options).loss

    name = OURS if max_buffer_bytes is None else ROOMY
    call = f"backend={run.backend!r}" + (f", max_buffer_bytes={max_buffer_bytes}" if max_buffer_bytes else "")
    return Provider(name, loss, call=call, kind=kind)


def providers(run: Run, setting: Setting, level: str = "linear", compiling: bool = True) -> list[Provider]:
    """The library, then every available peer: its own loss like for like, or its emulation of DistRL."""
    result = [ours(run, setting.loss)]
    if level == "linear":
        result.append(ours(run, setting.loss, ROOMY_BUFFER))
    for peer in run.available(level):
        loss, kind = (peer.distrl, "distrl") if setting.loss == "distrl" else (peer.like_for_like, peer.kind)
        if loss is not None and (compiling or not peer.compiles_long):
            result.append(Provider(peer.name, loss, peer.computes, peer.call, kind, peer.prepare))
    return result


def compare(run: Run, setting: Setting, chosen: list[Provider] | None = None, level: str = "linear") -> list[dict]:
    """A row a provider. At the linear level one more for the matrix products alone: the time to divide by."""
    torch.compiler.reset()  # every case has shapes of its own, and torch.compile gives up after eight
    problem = make_problem(setting, run.device, run.dtype)
    problem = problem.at_logits() if level == "logits" else problem
    run.meter.release()
    chosen = providers(run, setting, level) if chosen is None else chosen
    facts = {p.name: {"computes": p.computes, "call": p.call, "kind": p.kind} for p in chosen}
    functions, failed = {}, {}
    for provider in chosen:
        try:
            functions[provider.name] = partial(_step, provider.loss, provider.prepare(problem))
        except Exception as error:
            failed[provider.name] = {"error": describe(error)}
    if level == "linear":
        functions[PRODUCTS] = products(problem)
        facts[PRODUCTS] = {"computes": f"{setting.products} products of 2 N D V", "call": "torch.mm", "kind": "-"}
    timed = run.measure(functions) | failed
    run.meter.release()
    exact = {}
    for provider in chosen:
        row = timed[provider.name]
        if "error" not in row:
            try:
                if provider.kind not in exact:
                    exact[provider.kind] = truth(problem, provider.kind)
                row["deviation"] = deviations(functions[provider.name](), exact[provider.kind])
                row["wrong"] = not max(row["deviation"].get(name, 0.0) for name in ("rows", "weight")) < WRONG
            except torch.OutOfMemoryError as error:  # the truth takes float64: no verdict, and no speed-up
                row |= {"wrong": None, "unverified": describe(error)}
    _judge_ours(timed)
    common = {"case": setting.name, "setting": asdict(setting), "level": level, "statistics": problem.statistics}
    rows = [{**common, "provider": name, **facts[name], **timed[name]} for name in facts]
    _add_rates(rows, setting, level, run.dtype.itemsize)
    return rows


def _judge_ours(timed: dict[str, dict]) -> None:
    """The library must also be within twice the error of eager PyTorch, where that was measured."""
    eager = timed.get(EAGER, {}).get("deviation", {})
    for name in (OURS, ROOMY):
        for part, error in timed.get(name, {}).get("deviation", {}).items():
            if part in eager and error > 2 * eager[part] + 1e-2:
                timed[name]["wrong"] = True


def _step(loss: Loss, problem: Problem) -> list[Tensor]:
    return step(loss(problem), problem)


def products(problem: Problem) -> Callable[[], None]:
    """The fewest products that give the loss and the gradients, by torch.mm into memory of its own."""
    hidden_ND, weight_VD = problem.hidden_ND.detach(), problem.weight_VD.detach()
    logits_NV = torch.empty(len(hidden_ND), len(weight_VD), dtype=hidden_ND.dtype, device=hidden_ND.device)
    dh_ND, dw_VD = torch.empty_like(hidden_ND), torch.empty_like(weight_VD)

    def run() -> None:
        torch.mm(hidden_ND, weight_VD.t(), out=logits_NV)
        torch.mm(logits_NV, weight_VD, out=dh_ND)
        if not problem.setting.frozen:
            torch.mm(logits_NV.t(), hidden_ND, out=dw_VD)

    return run


def _add_rates(rows: list[dict], setting: Setting, level: str, itemsize: int) -> None:
    """Linear: TFLOP/s on the fewest products, and the share of cuBLAS's rate. Logits: GB/s on the fewest bytes."""
    N, D, V = setting.shape.N, setting.shape.D, setting.shape.V
    measured = [row for row in rows if "cold_ms" in row]
    if level == "logits":
        for row in measured:
            row["bytes"] = f"{2 * itemsize} N V: the logits read once, the gradient written once"
            row["gb_per_s"] = 2 * itemsize * N * V / (row["cold_ms"]["median"] * 1e6)
        return
    alone = [row["cold_ms"]["median"] for row in measured if row["provider"] == PRODUCTS]
    for row in measured:
        row["tflop_per_s"] = setting.products * 2 * N * D * V / (row["cold_ms"]["median"] * 1e9)
        if alone:
            row["cublas_fraction"] = alone[0] / row["cold_ms"]["median"]


def with_shape(setting: Setting, **changes: int) -> Setting:
    return replace(setting, shape=replace(setting.shape, **changes))
