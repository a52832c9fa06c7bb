"""Where the time of a step goes."""

import time

import torch


class Clock:
    """`seconds` of the parts of a step, {"seconds_<part>": wall time}. On a GPU a part ends when its work is done."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def read(self, part: str) -> None:
        """What has passed since the reading before belongs to this part; a part that comes again adds up."""
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # not of an engine that samples ahead
        now = time.perf_counter()
        name = f"seconds_{part}"
        self.seconds[name] = round(self.seconds.get(name, 0.0) + now - self._last, 4)
        self._last = now
