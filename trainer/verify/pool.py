"""The verifier that calls a judging function in worker processes, with a wall-clock limit an item."""

import logging
import math
import queue
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Self

from ipvrm_core.trainer.verify.base import Verdict, check_lengths
from ipvrm_core.trainer.verify.worker import JudgeError, Worker, load_judge

_log = logging.getLogger(__name__)

GIVE_UP = 20
"""How many items more than `max_errors` allows may be without a verdict before a call is over."""


class BrokenJudgeError(RuntimeError):
    """Too many items have no verdict: the judge is at fault, not the responses."""


class PooledVerifier:
    """Calls `judge(response, gold)` in worker processes.

    judge       "package.module:function"; it returns a bool, 0 or 1, or a Verdict. The module is imported here as well,
                so that a wrong path fails at construction.
    timeout_s   seconds one item may take, not counting the start of a process. Over it the process is killed, and the
                item's verdict is "timeout".
    workers     how many processes; they start with the first items and live until `close`.
    memory_gib  what a process may take besides its imports.
    max_errors  share of a call's items, rounded up to whole ones, that may stay without a verdict.

    A judge that raises, returns something else or takes its process down gives the verdict "error". BrokenJudgeError
    with the first such item when there are too many: at the end of a call, or as soon as there are GIVE_UP more than
    the items judged so far allow, so that a judge that always hangs costs GIVE_UP time-outs and not one an item. Items
    are judged in an order of their own for this, or the answers to one bad problem would look like a broken judge.

    The processes are spawned, so a script needs the usual `__main__` guard. Threads may call at the same time and share
    the workers.
    """

    def __init__(
        self,
        judge: str,
        *,
        timeout_s: float = 5.0,
        workers: int = 2,
        memory_gib: float = 2.0,
        max_errors: float = 0.05,
    ) -> None:
        for name, value in (("timeout_s", timeout_s), ("memory_gib", memory_gib)):
            if value <= 0:
                raise ValueError(f"{name} must be positive; got {value}")
        if workers < 1:
            raise ValueError(f"workers must be at least 1; got {workers}")
        load_judge(judge)
        self._judge, self._timeout_s, self._max_errors = judge, timeout_s, max_errors
        self._workers = [Worker(judge, memory_gib) for _ in range(workers)]
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="verifier")

    def __call__(self, responses: Sequence[str], golds: Sequence[str]) -> list[Verdict]:
        check_lengths(responses, golds)
        total = len(responses)
        order = random.Random(0).sample(range(total), total)
        verdicts: dict[int, Verdict] = {}
        failures: dict[int, str] = {}
        made = self._threads.map(self._judge_item, *zip(*((responses[i], golds[i]) for i in order), strict=True))
        with closing(made):  # items not begun are dropped when this is left early
            for index, (verdict, failure) in zip(order, made, strict=True):
                verdicts[index] = verdict
                if failure is not None:
                    failures[index] = failure
                allowed = math.ceil(self._max_errors * len(verdicts))
                if len(failures) > allowed + (GIVE_UP if len(verdicts) < total else 0):
                    raise BrokenJudgeError(self._complaint(failures, len(verdicts), responses, golds))
        if failures:
            first, text = min(failures.items())
            _log.warning(
                "%s failed on %d of %d items; the first, item %d: %s", self._judge, len(failures), total, first, text
            )
        return [verdicts[index] for index in range(total)]

    def _complaint(self, failures: dict[int, str], done: int, responses: Sequence[str], golds: Sequence[str]) -> str:
        total, (index, failure) = len(responses), min(failures.items())
        cut = "..." if len(responses[index]) > 200 else ""
        judged = f"all {total} answers" if done == total else f"the first {done} of {total} answers"
        return (
            f"{self._judge} gave no verdict on {len(failures)} of {judged}, more than max_errors = "
            f"{self._max_errors:g} allows. The first, answer {index}: {failure}; "
            f"its gold answer is {golds[index]!r}, it ends in {cut}{responses[index][-200:]!r}"
        )

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
            verdict = worker.judge(response, gold, self._timeout_s)
        except JudgeError as error:
            return Verdict(False, "error"), str(error)
        finally:
            self._idle.put(worker)
        if verdict.decided:
            return verdict, None
        return verdict, f"no verdict within {self._timeout_s:g} s" if verdict.status == "timeout" else "its own verdict"
