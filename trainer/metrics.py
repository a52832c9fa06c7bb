"""The numbers of a run: one JSON line a step, TensorBoard, a progress bar, and one readable line."""

import json
import math
import time
from pathlib import Path

from tqdm import tqdm

from ipvrm_core.trainer.files import naming, write_text
from ipvrm_core.trainer.progress import Progress


class MetricsLog:
    """Appends to folder/metrics.jsonl. After a kill, lines past the checkpoint's step are dropped and written again.

    Every line holds "step", the given numbers, and "seconds" and "peak_memory_mb" of this process. Those and the
    seconds of parts are the only ones that differ between an interrupted and an uninterrupted run: see `computed`.
    """

    def __init__(
        self,
        folder: Path,
        label: str,
        total: int,
        done: int = 0,
        *,
        show: tuple[str, ...] = (),
        every: int = 1,
        wandb_run=None,
    ):
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.label, self.total, self.show, self.every = folder / "metrics.jsonl", label, total, show, every
        kept = [line for line in read_metrics(self.path) if line["step"] <= done]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = open(self.path, "a")  # noqa: SIM115 - closed in close()
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
        self.wandb = wandb_run
        self.bar = Progress(label, total, done)
        self.first = done
        self.clock = self.began = time.perf_counter()

    def log(self, step: int, **numbers: float) -> None:
        now = time.perf_counter()
        for name, value in numbers.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise FloatingPointError(f"{self.label} step {step}: {name} is {value}")
        line = {"step": step, **numbers, "seconds": round(now - self.clock, 4), "peak_memory_mb": peak_memory_mb()}
        self.clock = now
        with naming(self.path):
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        for name, value in line.items():
            if name != "step":
                self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(line, step=step)
        self.bar.update(1)
        if step % self.every == 0 or step == self.total:
            shown = "  ".join(f"{name} {numbers[name]:.4g}" for name in self.show if name in numbers)
            left = (self.total - step) * (now - self.began) / (step - self.first)
            tqdm.write(f"{self.label} {step}/{self.total}  {shown}  {line['seconds']:.2f}s, {left / 60:.1f} min left")

    def close(self) -> None:
        self.bar.close()
        with naming(self.path):
            self.file.close()
        self.board.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict]:
    """All whole lines; a last line that a kill or a full disk spoilt is left out. ValueError names any other."""
    if not path.exists():
        return []
    data = path.read_bytes()
    rows = data[: data.rfind(b"\n") + 1].splitlines()
    lines = []
    for number, row in enumerate(rows, start=1):
        try:
            lines.append(_line(row))
        except ValueError as error:
            if number == len(rows):
                tqdm.write(f"{path}, line {number}: the last line is damaged and left out")
                break
            raise ValueError(f"{path}, line {number}: not a line of metrics: {error}") from None
    return lines


def computed(line: dict) -> dict:
    """A line without what depends on the process: equal runs have equal ones."""
    return {name: x for name, x in line.items() if not name.startswith("seconds") and name != "peak_memory_mb"}


def _line(row: bytes) -> dict:
    line = json.loads(row)
    if not (isinstance(line, dict) and isinstance(line.get("step"), int)):
        raise ValueError(f"an object with a step was expected; got {line!r}")
    return line


def peak_memory_mb() -> float:
    """Peak of this process so far: of the GPU allocator where there is a GPU, else resident memory."""
    import resource

    import torch

    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
