"""Command lines in processes of their own, which end by SIGKILL where a test wants it.

The processes are forked from one that has imported everything already: starting one costs nothing.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ipvrm_core.trainer.commands.main import main
from ipvrm_core.trainer.metrics import MetricsLog

FORKS = multiprocessing.get_context("forkserver")
PRELOAD = [
    __name__,
    "accelerate",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.generation.utils",
    *(f"ipvrm_core.trainer.phases.{phase}" for phase in ("sft", "rollout", "train_rm", "rl", "evaluate")),
]


def run(lines: list[list[str]], log: Path, at: tuple[str, int | str] | None = None, reached=None) -> None:
    """The command lines one after another; exits with the status of the first that fails.

    at: the moment of the last one at which the process is no more. ("line", n): behind its n-th line of metrics.
    ("rename", n): before its n-th rename of a folder, a checkpoint that is complete under its temporary name.
    ("written", name): behind the first file of that name. With the event `reached` it waits there instead.
    """
    torch.set_num_threads(1)
    with open(log, "a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)

    def end() -> None:
        if reached:
            reached.set()
        while reached:
            signal.pause()
        os.kill(os.getpid(), signal.SIGKILL)  # which leaves no time for any clean-up

    for index, words in enumerate(lines):
        if at and index == len(lines) - 1:
            _watch(*at, end)
        status = main(words)
        if status:
            sys.exit(status)


def _watch(kind: str, which: int | str, end: Callable[[], None]) -> None:
    """Call `end` at the moment; see `run`."""
    seen = []

    def count() -> None:
        seen.append(None)
        if len(seen) == which:
            end()

    rename, replace, log = os.rename, os.replace, MetricsLog.log

    def renaming(source, target):
        count()
        rename(source, target)

    def replacing(source, target):
        replace(source, target)
        if Path(target).name == which:
            end()

    def logging(self, step, **numbers):
        log(self, step, **numbers)
        count()

    owner, name, function = {
        "rename": (os, "rename", renaming),
        "written": (os, "replace", replacing),
        "line": (MetricsLog, "log", logging),
    }[kind]
    setattr(owner, name, function)
