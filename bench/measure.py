"""Time and memory on CPU.

Time: the candidates run in turn, round after round, so that a change of the machine's load meets all of them; median and
10th / 90th percentile in seconds.

Memory: the kernel's own high-water mark of resident memory (VmHWM of /proc/self/status), reset just before the run, minus
the resident memory at that moment. Resident pages are what a machine runs out of; a profiler of torch's allocator would
miss the buffers of BLAS. Each measurement has a process of its own, so no allocator keeps pages of an earlier run.
"""

import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Timing(NamedTuple):
    """Seconds."""

    median: float
    p10: float
    p90: float
    rounds: int


def interleaved(functions: dict[str, Callable[[], object]], rounds: int, warm_ups: int = 1) -> dict[str, Timing]:
    """Times of every function, measured A B C A B C ..., each result dropped before the next starts."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warm_ups + rounds):
        for name, function in functions.items():
            gc.collect()
            start = time.perf_counter()
            function()
            if turn >= warm_ups:
                seconds[name].append(time.perf_counter() - start)
    return {name: summarize(values) for name, values in seconds.items()}


def summarize(seconds: list[float]) -> Timing:
    """Median and percentiles of at least one value."""
    if len(seconds) == 1:
        return Timing(*seconds * 3, 1)
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    return Timing(statistics.median(seconds), deciles[0], deciles[-1], len(seconds))


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (highest since the last reset) of this process."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no {field}: memory is measured on Linux only")


def peak_extra_bytes(prepare: Callable[..., Callable[[], object]], *args) -> int:
    """Highest resident memory while `prepare(*args)()` runs, above what its inputs need. Runs in a new process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_peak, args=(sender, prepare, args))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"the measuring process of {prepare.__name__}{args} died") from None
    finally:
        process.join()


def _measure_peak(sender, prepare: Callable[..., Callable[[], object]], args: tuple) -> None:
    run = prepare(*args)
    gc.collect()
    CLEAR.write_text("5")  # resets VmHWM (man 5 proc)
    before = resident_bytes("VmRSS")
    result = run()
    sender.send(resident_bytes("VmHWM") - before)
    del result
