"""Limits of time and memory for code that comes with data: judges and chat templates."""

import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path


def limit_memory(gib: float) -> None:
    """Let this process take so much besides what it has: over it an allocation fails, as MemoryError in Python.

    What is limited is address space, which Linux alone enforces; elsewhere there is no limit.
    """
    if sys.platform != "linux":
        return
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = held + int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


@contextmanager
def limited(seconds: float, gib: float) -> Iterator[None]:
    """TimeoutError or MemoryError inside, for what takes longer (in the main thread alone) or more."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    in_main = threading.current_thread() is threading.main_thread()
    limit_memory(gib)
    try:
        with _alarm(seconds) if in_main else nullcontext():
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def over(*_) -> None:
        raise TimeoutError(f"it takes longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
