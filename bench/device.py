"""Time and memory on a GPU; on a CPU (toy runs) the wall time of one call, cold and hot alike, and no memory.

Time: CUDA events around a call. Every call is measured twice in a row: `cold`, after a write over a buffer several
times the L2 cache, and `hot`, right behind it. Before that the device sleeps while the host issues both calls, so that
none of its time is between the events. The functions take turns, round after round, so that a change of clocks meets
all of them.

Memory: torch.cuda.max_memory_allocated over one call, less what was allocated before it. Outputs and gradients count.
"""

import gc
import statistics
import time
from collections.abc import Callable

import torch

FLUSH_BYTES = 256 << 20  # L2 of an H200: 60 MB
SLEEP_CYCLES = 10_000_000  # 5 ms at 2 GHz: longer than the Python of two calls of a loss
WARM_UPS, WARM_UP_SECONDS = 20, 0.3  # calls before measuring, fewer of slow functions
ROUNDS, LEAST_ROUNDS = 50, 5

Function = Callable[[], object]


class Meter:
    """Measures on one device. `peak_extra_bytes` is None on a CPU: bench/measure.py measures there."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self._flush = torch.empty(FLUSH_BYTES if self.cuda else 0, dtype=torch.uint8, device=device)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def cold_and_hot(self, function: Function) -> tuple[float, float]:
        """Milliseconds of two calls, the first with a flushed L2."""
        if not self.cuda:
            begun = time.perf_counter()
            function()
            milliseconds = (time.perf_counter() - begun) * 1e3
            return milliseconds, milliseconds
        start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        torch.cuda._sleep(SLEEP_CYCLES)
        self._flush.zero_()
        start.record()
        function()
        middle.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(middle), middle.elapsed_time(end)

    def peak_extra_bytes(self, function: Function) -> int | None:
        if not self.cuda:
            return None
        gc.collect()
        self.synchronize()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        result = function()
        self.synchronize()
        peak = torch.cuda.max_memory_allocated(self.device)
        del result
        return peak - before

    def release(self) -> None:
        """Give cached memory back, so that the next case starts from nothing."""
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()

    def warm_up(self, function: Function) -> None:
        """At least two calls on a GPU: the first compiles. None on a CPU, where nothing does."""
        if not self.cuda:
            return
        function()
        self.synchronize()
        start = time.perf_counter()
        for _ in range(WARM_UPS):
            function()
            self.synchronize()
            if time.perf_counter() - start > WARM_UP_SECONDS:
                break


def measure(meter: Meter, functions: dict[str, Function], seconds: float, rounds: int = ROUNDS) -> dict[str, dict]:
    """A row for every function: {"cold_ms", "hot_ms", "rounds", "peak_extra_bytes"}, or {"error"} if it raised.

    Each function gets an equal share of `seconds`; one that has used it up stops after LEAST_ROUNDS rounds.
    """
    rows: dict[str, dict] = {}
    samples: dict[str, list[tuple[float, float]]] = {}

    def failed(name: str, error: Exception) -> None:
        """A peer that fails is a result, and is recorded as one."""
        rows[name] = {"error": describe(error)}
        samples.pop(name, None)
        meter.release()

    for name, function in functions.items():
        try:
            meter.warm_up(function)
            rows[name], samples[name] = {"peak_extra_bytes": meter.peak_extra_bytes(function)}, []
        except Exception as error:
            failed(name, error)
    share = seconds / max(1, len(samples)) * 1e3
    for turn in range(rounds):
        for name, taken in list(samples.items()):
            if turn < min(LEAST_ROUNDS, rounds) or sum(map(sum, taken)) < share:
                try:
                    taken.append(meter.cold_and_hot(functions[name]))
                except Exception as error:
                    failed(name, error)
    for name, taken in samples.items():
        cold, hot = zip(*taken, strict=True)
        rows[name] |= {"cold_ms": spread(cold), "hot_ms": spread(hot), "rounds": len(taken)}
    return rows


def spread(values: tuple[float, ...]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    deciles = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [*values, *values]
    return {"median": statistics.median(values), "p10": deciles[0], "p90": deciles[-1]}


def describe(error: Exception) -> str:
    """Type and first line; the whole text of a CUDA or compiler error fills pages."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else ''}"
