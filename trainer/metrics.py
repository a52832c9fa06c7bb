"""The numbers of a run: one JSON line a step, TensorBoard, a progress bar, and one readable line."""

import json
import math
import time
from pathlib import Path

from tqdm import tqdm

from ipvrm_core.trainer.files import write_text
from ipvrm_core.trainer.progress import Progress


class MetricsLog:
    """Appends to folder/metrics.jsonl. After a kill, lines past the checkpoint's step are dropped and written again.

    Every line holds "step", the given numbers, and "seconds" and "peak_memory_mb" of this process; the latter two are
    the only ones that differ between an interrupted and an uninterrupted run.
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
        self.file.close()
        self.board.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict]:
    """All whole lines; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def peak_memory_mb() -> float:
    """Peak of this process so far: of the GPU allocator where there is a GPU, else resident memory."""
    import resource

    import torch

    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
