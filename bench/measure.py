"""Time and memory on CPU.

Time: the candidates run in turn, round after round, so that a change of the machine's load meets all of them. Wall
time (median, 10th and 90th percentile), and the processor time of all threads, which a busy machine stretches less.

Memory: the kernel's own high-water mark of resident memory (VmHWM of /proc/self/status), reset just before the run,
less the resident memory at that moment. Resident pages are what a machine runs out of; a profiler of torch's allocator
would miss the buffers of BLAS. Each measurement has a process of its own: no allocator keeps pages of an earlier run.
"""

import ctypes
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Timing(NamedTuple):
    """Seconds: wall time, and the median processor time of all threads together."""

    median: float
    p10: float
    p90: float
    cpu_median: float
    rounds: int


def interleaved(functions: dict[str, Callable[[], object]], rounds: int, warm_ups: int = 1) -> dict[str, Timing]:
    """Times of every function, measured A B C A B C ..., each result dropped before the next starts."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for turn in range(warm_ups + rounds):
        for name, function in functions.items():
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            function()
            if turn >= warm_ups:
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: summarize(*zip(*pairs, strict=True)) for name, pairs in seconds.items()}


def summarize(wall: tuple[float, ...], cpu: tuple[float, ...]) -> Timing:
    """Of at least one round."""
    deciles = statistics.quantiles(wall, n=10, method="inclusive") if len(wall) > 1 else [*wall, *wall]
    return Timing(statistics.median(wall), deciles[0], deciles[-1], statistics.median(cpu), len(wall))


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
    ctypes.CDLL(None).malloc_trim(0)  # what making the inputs has left to malloc would be the run's, unseen
    CLEAR.write_text("5")  # resets VmHWM (man 5 proc)
    before = resident_bytes("VmRSS")
    result = run()
    sender.send(resident_bytes("VmHWM") - before)
    del result
