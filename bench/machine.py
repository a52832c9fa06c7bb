"""Where a report was made: machine, versions and commit; and the GPU's clock and power while it was made."""

import os
import platform
import shutil
import statistics
import subprocess
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

HERE = Path(__file__).parent
SAMPLED = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")  # MHz, MHz, W, degrees C


def environment(device: torch.device | None = None) -> dict:
    """Facts that every number of a report depends on."""
    facts = {
        "cpu": next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), "?"),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        **commit(),
    }
    if device is None or device.type != "cuda":
        return facts
    properties = torch.cuda.get_device_properties(device)
    return facts | {
        "gpu": properties.name,
        "gpu_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "driver": _ask("driver_version"),
        "max_sm_mhz": _ask("clocks.max.sm"),
        "power_limit_w": _ask("power.limit"),
        "cuda": torch.version.cuda,
        "cublas_float32": torch.get_float32_matmul_precision(),
    }


def commit() -> dict:
    """The commit, and whether files differ from it. "unknown" outside a repository or without git."""
    head, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    return {"commit": head or "unknown", "uncommitted_changes": None if changes is None else bool(changes)}


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


class ClockLog:
    """nvidia-smi beside the run, four lines a second. `summary`: of the lines since the last call, None without it."""

    def __init__(self, device: torch.device) -> None:
        self._lines, self._process = None, None
        if device.type == "cuda" and shutil.which("nvidia-smi"):
            self._lines = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open until close())
            query = ["--query-gpu=" + ",".join(SAMPLED), "--format=csv,noheader,nounits", "-lms", "250"]
            command = ["nvidia-smi", "-i", _index(device), *query]
            self._process = subprocess.Popen(command, stdout=self._lines, stderr=subprocess.DEVNULL)
        self._read = 0

    def summary(self) -> dict | None:
        """Median, least and greatest of each quantity."""
        if self._lines is None:
            return None
        # The process writes at the end of the file that it shares with us: read by position, never move it.
        text = os.pread(self._lines.fileno(), 1 << 24, self._read).decode()
        text = text[: text.rfind("\n") + 1]  # a line that is still being written waits for the next call
        self._read += len(text.encode())
        rows = [parsed for line in text.splitlines() if (parsed := _numbers(line)) is not None]
        columns = zip(*rows, strict=True)
        return {
            name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
            for name, values in zip(SAMPLED, columns, strict=bool(rows))
        } or None

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._lines.close()


def _numbers(line: str) -> list[float] | None:
    """None for a line without numbers ("[N/A]")."""
    try:
        values = [float(cell) for cell in line.split(",")]
    except ValueError:
        return None
    return values if len(values) == len(SAMPLED) else None


def _index(device: torch.device) -> str:
    """The GPU's UUID, because nvidia-smi counts GPUs that CUDA_VISIBLE_DEVICES hides."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return str(device.index or 0) if uuid is None else "GPU-" + str(uuid).removeprefix("GPU-")


def _ask(field: str) -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True)
    return answer.stdout.splitlines()[0].strip() if answer.returncode == 0 and answer.stdout else None


def _git(*arguments: str) -> str | None:
    if shutil.which("git") is None:
        return None
    answer = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=HERE)
    return answer.stdout.strip() if answer.returncode == 0 else None


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
