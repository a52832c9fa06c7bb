"""The chain of phases of one experiment, each in its own process, independent ones side by side."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ipvrm_core.trainer.config import Config
from ipvrm_core.trainer.ending import GRACE_SECONDS

STATUS_SECONDS = 20


@dataclass(frozen=True)
class Job:
    """One phase: its command-line words, the jobs that must have finished, and whether it has an engine that samples.

    An engine takes its share of the device as if it were alone there: jobs that have one run one after the other.
    """

    key: str
    words: tuple[str, ...]
    after: tuple[str, ...]
    engine: bool = False


def jobs_of(config: Config) -> list[Job]:
    """sft -> rollout -> rm.* -> rl.* -> eval -> report, as far as the configuration has them."""
    jobs = []
    start: tuple[str, ...] = ()
    vllm = config.generation.sampler == "vllm"
    if config.sft:
        jobs.append(Job("sft", ("sft",), (), vllm and config.sft.stop_accuracy is not None))
        start = ("sft",)
    if config.rollout:
        jobs.append(Job("rollout", ("rollout",), start, vllm))
    for name, rm in config.rm.items():
        jobs.append(Job(f"rm.{name}", ("train-rm", "--name", name), start if rm.data else ("rollout",)))
    for name, rl in config.rl.items():
        needs = (f"rm.{rl.reward_model.name}",) if rl.reward_model else start
        jobs.append(Job(f"rl.{name}", ("rl", "--name", name), needs, vllm))
    jobs.append(Job("eval", ("eval",), tuple(job.key for job in jobs), vllm))
    jobs.append(Job("report", ("report",), ("eval",)))
    return jobs


def chains(jobs: list[Job]) -> dict[str, int]:
    """How many jobs wait for each, one after the other: the longest chain is what the end of all waits for."""
    found: dict[str, int] = {}
    for job in reversed(jobs):  # no job stands before one that it needs
        found[job.key] = max((found[other.key] + 1 for other in jobs if job.key in other.after), default=0)
    return found


def run(config: Config, run_folder: Path, parallel: int) -> None:
    """Run all jobs, at most `parallel` at a time and of those with an engine one, finished ones skipped; of those that
    can start, the one first that the longest chain waits for. RuntimeError names the job that failed.

    Each job's output goes to RUN/logs/<job>.txt; the newest line of every running job is shown from time to time.
    """
    pending = jobs_of(config)
    total, waiting = len(pending), chains(pending)
    finished: set[str] = set()
    running: dict[Job, tuple[subprocess.Popen, float]] = {}
    engines = [job.key for job in pending if job.engine]
    if parallel > 1 and len(engines) > 1:
        print(f"{', '.join(engines)}: one at a time, for each has an engine of vLLM on the device", flush=True)
    shown = time.perf_counter()
    logs = run_folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    try:
        while pending or running:
            ready = [job for job in pending if set(job.after) <= finished]
            kept_back = max(0, sum(job.engine for job in [*running, *ready]) - 1)
            beside = min(parallel, len(running) + len(ready) - kept_back)
            for job in sorted(ready, key=lambda job: -waiting[job.key]):
                if len(running) == parallel or (job.engine and any(other.engine for other in running)):
                    continue
                pending.remove(job)
                print(
                    f"[{len(finished) + len(running) + 1}/{total}] {job.key} starts, log: {logs / (job.key + '.txt')}",
                    flush=True,
                )
                running[job] = (_start(job, run_folder, logs, beside), time.perf_counter())
            time.sleep(0.2)
            if time.perf_counter() - shown > STATUS_SECONDS:
                shown = time.perf_counter()
                for job in running:
                    print(f"    {_last_line(logs / f'{job.key}.txt')}", flush=True)
            for job, (process, began) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[job]
                log = logs / f"{job.key}.txt"
                if process.returncode:
                    tail = log.read_text().splitlines()[-15:]
                    raise RuntimeError("\n".join([f"{job.key} failed with exit status {process.returncode}:", *tail]))
                finished.add(job.key)
                print(f"{job.key} finished in {time.perf_counter() - began:.0f} s: {_last_line(log)}", flush=True)
    finally:
        _end([process for process, _ in running.values()])


def _end(processes: list[subprocess.Popen]) -> None:
    """Give each the time to write a checkpoint."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS + 5
    for process in processes:
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _last_line(path: Path) -> str:
    return (path.read_text().splitlines() or [""])[-1]


def _start(job: Job, run_folder: Path, logs: Path, beside: int) -> subprocess.Popen:
    """beside: jobs that share the cores, this one among them."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // beside))
    command = [
        sys.executable,
        "-m",
        "ipvrm_core.trainer.commands.main",
        "--with-parent",
        *job.words,
        str(run_folder / "config.json"),
        "--run",
        str(run_folder),
        "--resume",
    ]
    with open(logs / f"{job.key}.txt", "a") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=environment)
