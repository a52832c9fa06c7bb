"""The verifier that calls a judging function in worker processes, with a wall-clock limit an item."""

import logging
import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

from ipvrm_core.trainer.verify.base import Verdict, check_lengths
from ipvrm_core.trainer.verify.worker import JudgeError, Worker, load_judge

_log = logging.getLogger(__name__)


class PooledVerifier:
    """Calls `judge(response, gold)` in worker processes.

    judge      "package.module:function"; it returns a bool or a Verdict. The module is imported here as well, so that
               a wrong path fails at construction.
    timeout_s  seconds one item may take, not counting the start of a process. Over it the process is killed, and the
               item's verdict is "timeout".
    workers    how many processes; they start with the first items and live until `close`.

    A judge that raises, returns something else or takes its process down gives the verdict "error"; each call logs how
    many there were and the first of them. The processes are spawned, so a script needs the usual `__main__` guard.
    Threads may call at the same time and share the workers.
    """

    def __init__(self, judge: str, *, timeout_s: float = 5.0, workers: int = 2) -> None:
        if timeout_s <= 0:
            raise ValueError(f"timeout_s must be positive; got {timeout_s}")
        if workers < 1:
            raise ValueError(f"workers must be at least 1; got {workers}")
        load_judge(judge)
        self._judge = judge
        self._timeout_s = timeout_s
        self._workers = [Worker(judge) for _ in range(workers)]
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="verifier")

    def __call__(self, responses: Sequence[str], golds: Sequence[str]) -> list[Verdict]:
        check_lengths(responses, golds)
        outcomes = list(self._threads.map(self._judge_item, responses, golds))
        failures = [(index, failure) for index, (_, failure) in enumerate(outcomes) if failure is not None]
        if failures:
            _log.warning(
                "%s failed on %d of %d items; the first, item %d: %s",
                self._judge,
                len(failures),
                len(outcomes),
                *failures[0],
            )
        return [verdict for verdict, _ in outcomes]

    def close(self) -> None:
        """Waits for items in work, drops those not begun, and ends the processes."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _judge_item(self, response: str, gold: str) -> tuple[Verdict, str | None]:
        # There are as many threads as workers, so one is idle.
        worker = self._idle.get()
        try:
            return worker.judge(response, gold, self._timeout_s), None
        except JudgeError as error:
            return Verdict(False, "error"), str(error)
        finally:
            self._idle.put(worker)
