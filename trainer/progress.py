"""How far long work has come: a bar on a terminal, and elsewhere a line now and then."""

import sys
import threading
import time
from collections.abc import Collection, Iterator

from tqdm import tqdm

EVERY = 30.0  # seconds between two lines


class Progress:
    """A context whose `update` counts finished units of `total`, `done` of them before it began.

    On a terminal it is a bar of tqdm. Without one (a file, a pipe, a batch system) a line is written to stderr every
    `every` seconds, whether or not a unit has been finished since; work that is over before that writes nothing.
    """

    def __init__(self, label: str, total: int, done: int = 0, unit: str = "step", every: float = EVERY):
        self.label, self.total, self.done, self.unit, self.every = label, total, done, unit, every
        self.first, self.began, self.over = done, time.monotonic(), threading.Event()
        shared = {"delay": 0.5, "dynamic_ncols": True, "disable": None, "leave": None}
        self.bar = tqdm(total=total, initial=done, desc=label, unit=unit, **shared)
        if self.bar.disable:
            threading.Thread(target=self._lines, daemon=True).start()

    def update(self, count: int = 1) -> None:
        self.done += count
        self.bar.update(count)

    def line(self) -> str:
        seconds, made = time.monotonic() - self.began, self.done - self.first
        left = f", {_minutes(seconds * (self.total - self.done) / made)} left" if made else ""
        return f"{self.label} {self.done}/{self.total} {self.unit}s  {_minutes(seconds)}{left}"

    def _lines(self) -> None:
        while not self.over.wait(self.every):
            print(self.line(), file=sys.stderr, flush=True)

    def close(self) -> None:
        self.over.set()
        self.bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def progress(items: Collection, label: str, unit: str = "step") -> Iterator:
    """The items, each counted once the loop comes back for the next."""
    with Progress(label, len(items), unit=unit) as counted:
        for item in items:
            yield item
            counted.update()


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
