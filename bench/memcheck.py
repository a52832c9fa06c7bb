"""The correctness section at toy sizes under compute-sanitizer's memcheck, in a process of its own."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ipvrm_core.bench.compare import Run

LEAST_SECONDS = 60
FOUND = 86  # the exit status that stands for "memory errors found"


def section(run: Run) -> Iterator[dict]:
    """One row: {"tool", "passed", "detail"}, or why it did not run."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or run.device.type != "cuda":
        why = "compute-sanitizer is not on PATH" if tool is None else "no GPU"
        yield {"tool": "compute-sanitizer memcheck", "skipped": why}
        return
    with tempfile.TemporaryDirectory() as folder:
        checks = [sys.executable, "-m", "ipvrm_core.bench.gpu", "--toy", "--only", "correctness"]
        checks += ["--backend", run.backend, "--json", str(Path(folder) / "out.json")]
        command = [tool, "--tool", "memcheck", "--error-exitcode", str(FOUND), "--print-limit", "10", *checks]
        # Every tensor an allocation of its own, or a write past its end lands in a neighbour and goes unseen.
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        lines, status = _run(command, environment, max(LEAST_SECONDS, run.seconds_left()))
    if status is None:
        yield {"tool": "compute-sanitizer memcheck", "skipped": "not done in the time that was left"}
        return
    summary = [line for line in lines if "ERROR SUMMARY" in line or "Device not supported" in line] or lines[-3:]
    yield {
        "tool": "compute-sanitizer memcheck",
        "passed": status == 0,
        "detail": f"exit status {status}; {' | '.join(summary)}",
        "output": lines[-40:] if status else [],
    }


def _run(command: list[str], environment: dict[str, str], seconds: float) -> tuple[list[str], int | None]:
    """(lines of output, exit status), the status None where time ran out. The tool starts the program as its child."""
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return [], None
    return output.splitlines(), process.returncode
