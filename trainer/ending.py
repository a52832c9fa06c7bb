"""How a process ends before its time: Ctrl-C, SIGTERM, the death of the process that started it.

A signal becomes an exception, so that every `finally` runs; a training phase writes a checkpoint on its way out.
"""

import ctypes
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

GRACE_SECONDS = 25  # for the end of an update; what sends SIGTERM is said to wait for 30

_asked: signal.Signals | None = None
_busy: Callable[[], bool] = bool  # False


class Ended(KeyboardInterrupt):
    """This process was asked to end; `signal` is what asked it."""

    def __init__(self, number: int):
        self.signal = signal.Signals(number)
        super().__init__(self.signal.name)


@contextmanager
def signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise Ended, at once or, while there is something to `wait_while`, at the next `may_end`.

    The same signal once more does not wait. Another one does: Ctrl-C reaches a phase twice, as SIGINT from the
    terminal and as SIGTERM from `ipvrm run`.
    """
    global _asked
    if threading.current_thread() is not threading.main_thread():  # where Python hands signals out
        yield
        return
    _asked = None
    old = {number: signal.signal(number, _on_signal) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    try:
        yield
    finally:
        signal.alarm(0)
        wait_while(bool)
        for number, handler in old.items():
            signal.signal(number, handler)


def wait_while(busy: Callable[[], bool]) -> None:
    """From now on signals wait for `may_end` while `busy()`, at most GRACE_SECONDS."""
    global _busy
    _busy = busy


def may_end() -> None:
    """Raise Ended if a signal came."""
    if _asked is not None:
        signal.alarm(0)
        raise Ended(_asked)


def _on_signal(number: int, _) -> None:
    global _asked
    if number == signal.SIGALRM:
        raise Ended(_asked or number)
    if _asked is None:
        _asked = signal.Signals(number)
        if _busy():
            signal.alarm(GRACE_SECONDS)
            return
    elif number != _asked:
        return
    raise Ended(number)


# ---- with the parent


def end_with_parent() -> None:
    """SIGTERM for this process once the one that started it is gone; stdin must be a pipe that only that one holds."""
    if _signal_of_death(signal.SIGTERM):
        if select.select([sys.stdin], [], [], 0)[0]:  # nothing is ever written: this is the end of the pipe
            raise Ended(signal.SIGTERM)
        return
    threading.Thread(target=_watch, args=(sys.stdin.fileno(),), daemon=True).start()


def die_with_parent() -> None:
    """SIGKILL for this process of `multiprocessing` once its parent is gone: what it runs may hang for ever.

    On Linux the thread that started it is meant; it must live as long as this process is needed.
    """
    from multiprocessing import parent_process

    if not _signal_of_death(signal.SIGKILL):
        watch = threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True)
        watch.start()
    elif not parent_process().is_alive():
        os._exit(1)


def _signal_of_death(number: int) -> bool:
    """Have the kernel send it when the parent dies; False where the kernel cannot."""
    if sys.platform != "linux":
        return False
    pr_set_pdeathsig = 1
    if ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, int(number), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    return True


def _watch(pipe: int) -> None:
    while os.read(pipe, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
