"""One worker process that runs a judging function, and can be killed at any moment.

Each worker has a pipe and a thread of its own, so that killing one cannot touch an item of another.
"""

import importlib
import signal
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection

from ipvrm_core.trainer.ending import die_with_parent
from ipvrm_core.trainer.limits import limit_memory
from ipvrm_core.trainer.verify.base import Verdict

Judge = Callable[[str, str], "bool | Verdict"]

START_TIMEOUT_S = 120.0
"""How long a process may take to import the judge's module."""

# Workers are started from threads beside CUDA and tokenizer threads, where a fork may deadlock.
_spawn = get_context("spawn")


class JudgeError(Exception):
    """The judge raised, returned something else than a verdict, or took its process down."""


class Worker:
    """Judges one item at a time in a process that starts with the first item, and anew after a kill.

    memory_gib: how much the process may take besides what it holds after its imports (Linux; elsewhere no limit).
    """

    def __init__(self, path: str, memory_gib: float = 2.0) -> None:
        self._path, self._memory_gib = path, memory_gib
        self._process = None
        self._pipe: Connection | None = None

    def judge(self, response: str, gold: str, timeout_s: float) -> Verdict:
        """The judge's verdict; status "timeout" if there is none in time. JudgeError if there is none at all."""
        if self._process is None or not self._process.is_alive():
            self.stop()
            self._start()
        try:
            self._pipe.send((response, gold))
            if not self._pipe.poll(timeout_s):
                self.stop()
                return Verdict(False, "timeout")
            verdict, failure = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            code = self._process.exitcode
            self.stop()
            raise JudgeError(f"the worker process ended with exit code {code}") from error
        if failure is not None:
            if failure.startswith(MemoryError.__name__):
                self.stop()  # what filled it may be there still, and is not the next item's fault
            raise JudgeError(failure)
        return verdict

    def stop(self) -> None:
        """Kills the process if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
            self._pipe.close()
            self._process = self._pipe = None

    def _start(self) -> None:
        self._pipe, remote = _spawn.Pipe()
        self._process = _spawn.Process(target=_serve, args=(self._path, self._memory_gib, remote), daemon=True)
        self._process.start()
        remote.close()
        failure = f"no sign of life within {START_TIMEOUT_S:.0f} s"
        try:
            if self._pipe.poll(START_TIMEOUT_S):
                failure = self._pipe.recv()
        except (EOFError, OSError):
            failure = "the process ended before it was ready"
        if failure is not None:
            self.stop()
            raise RuntimeError(f"a verifier worker could not start with {self._path!r}: {failure}")


def load_judge(path: str) -> Judge:
    """The function at "package.module:function". ValueError, ImportError or TypeError if there is none."""
    module_name, _, function_name = path.partition(":")
    if not (module_name and function_name):
        raise ValueError(f"expected 'package.module:function'; got {path!r}")
    module = importlib.import_module(module_name)
    if not hasattr(module, function_name):
        raise ImportError(f"module {module_name!r} has no function {function_name!r}")
    judge = getattr(module, function_name)
    if not callable(judge):
        raise TypeError(f"{path!r} must be callable; got {type(judge).__name__}")
    return judge


def _serve(path: str, memory_gib: float, pipe: Connection) -> None:
    """The life of a worker process: load, report, then one answer an item until the pipe closes."""
    # Ctrl-C reaches the whole process group; the parent decides what becomes of its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    try:
        judge = load_judge(path)
        limit_memory(memory_gib)
    except BaseException:
        pipe.send(traceback.format_exc())
        return
    pipe.send(None)
    while True:
        try:
            response, gold = pipe.recv()
        except EOFError:
            return
        pipe.send(_answer(judge, response, gold))


def _answer(judge: Judge, response: str, gold: str) -> tuple[Verdict | None, str | None]:
    """(verdict, None), or (None, what went wrong)."""
    try:
        result = judge(response, gold)
        if isinstance(result, Verdict):
            return result, None
        value = result.item() if hasattr(result, "item") else result  # of NumPy and torch
        if isinstance(value, bool | int | float) and value in (0, 1):
            return Verdict(bool(value), "ok"), None
        came = f"{str(result)[:80]} ({type(result).__name__})"
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    return None, f"a judge must return a bool, 0 or 1, or a Verdict; got {came}"
