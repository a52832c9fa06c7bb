"""`ipvrm run`: which phases, in which order, how many side by side, and what happens when one fails."""

import signal
import subprocess
import time

import pytest

from ipvrm_core.trainer import pipeline
from ipvrm_core.trainer.pipeline import jobs_of

FULL = {
    "sft": {},
    "rollout": {"prompts": 8, "held_out": 2},
    "rm": {"a": {}, "b": {}},
    "rl": {"plain": {}, "dist": {"reward_model": {"name": "b"}}},
}


VLLM = {"generation": {"max_new_tokens": 12, "sampler": "vllm"}}


def test_jobs_and_what_they_wait_for(tiny_config):
    jobs = {job.key: job for job in jobs_of(tiny_config(**FULL))}
    assert {key: job.after for key, job in jobs.items()} == {
        "sft": (),
        "rollout": ("sft",),
        "rm.a": ("rollout",),
        "rm.b": ("rollout",),
        "rl.plain": ("sft",),
        "rl.dist": ("rm.b",),
        "eval": ("sft", "rollout", "rm.a", "rm.b", "rl.plain", "rl.dist"),
        "report": ("eval",),
    }
    assert jobs["rm.b"].words == ("train-rm", "--name", "b")
    assert jobs["rl.dist"].words == ("rl", "--name", "dist")


def test_only_the_phases_of_the_configuration(tiny_config):
    assert [job.key for job in jobs_of(tiny_config(rl={"x": {}}))] == ["rl.x", "eval", "report"]
    assert jobs_of(tiny_config(rl={"x": {}}))[0].after == ()


@pytest.fixture
def faked(monkeypatch):
    """Replaces the phases by shell commands; gives back (key, started at, process)."""

    def use(commands: dict[str, str]) -> list[tuple[str, float, subprocess.Popen]]:
        started = []

        def start(job, run_folder, logs, beside):
            with open(logs / f"{job.key}.txt", "a") as log:
                process = subprocess.Popen(["sh", "-c", commands.get(job.key, "exit 0")], stdout=log, stderr=log)
            running = sum(process.poll() is None for _, _, process in started)
            assert running < beside
            started.append((job.key, time.perf_counter(), process))
            return process

        monkeypatch.setattr(pipeline, "_start", start)
        return started

    return use


@pytest.mark.parametrize(("own", "expected"), [(None, "3"), ("1", "1")])
def test_threads_are_shared_out_unless_the_user_says_how_many(tiny_config, tmp_path, monkeypatch, own, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if own:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    monkeypatch.setattr(pipeline.os, "cpu_count", lambda: 6)
    found = {}
    monkeypatch.setattr(pipeline.subprocess, "Popen", lambda *_, env, **__: found.update(env))
    pipeline._start(jobs_of(tiny_config(rl={"x": {}}))[0], tmp_path, tmp_path, 2)
    assert found["OMP_NUM_THREADS"] == expected


@pytest.mark.parametrize("parallel", [1, 3])
def test_jobs_run_after_what_they_need(tiny_config, tmp_path, faked, parallel):
    started = faked({})
    config = tiny_config(**FULL)
    pipeline.run(config, tmp_path, parallel)
    order = [key for key, _, _ in started]
    assert sorted(order) == sorted(job.key for job in jobs_of(config))
    for job in jobs_of(config):
        assert all(order.index(need) < order.index(job.key) for need in job.after)


def test_the_longest_chain_goes_first(tiny_config, tmp_path, faked):
    """rl.dist waits for rm.b, which waits for rollout: they start before rl.plain and rm.a, which nothing waits for."""
    config = tiny_config(**FULL)
    waiting = pipeline.chains(jobs_of(config))
    assert waiting == {
        "sft": 5,
        "rollout": 4,
        "rm.a": 2,
        "rm.b": 3,
        "rl.plain": 2,
        "rl.dist": 2,
        "eval": 1,
        "report": 0,
    }
    started = faked({})
    pipeline.run(config, tmp_path, 1)
    assert [key for key, _, _ in started] == ["sft", "rollout", "rm.b", "rm.a", "rl.plain", "rl.dist", "eval", "report"]


def test_a_job_that_is_alone_has_all_cores(tiny_config, tmp_path, monkeypatch):
    shares = {}

    def start(job, run_folder, logs, beside):
        shares[job.key] = beside
        (logs / f"{job.key}.txt").write_text("")
        return subprocess.Popen(["true"])

    monkeypatch.setattr(pipeline, "_start", start)
    pipeline.run(tiny_config(**FULL), tmp_path, 2)
    assert {key for key, beside in shares.items() if beside == 1} >= {"sft", "eval", "report"}
    assert shares["rollout"] == 2  # rl.plain can start as well
    shares.clear()
    pipeline.run(tiny_config(**{**FULL, "rm": {}, "rl": {"plain": {}}}, **VLLM), tmp_path, 2)
    assert set(shares.values()) == {1}  # those that sample have engines


def test_jobs_with_an_engine_run_one_at_a_time(tiny_config, tmp_path, faked, capsys):
    """Reward models beside them: rm.c, on chats of its own, need not wait for the rollouts' engine."""
    rms = {**FULL["rm"], "c": {"data": {"path": "chats.jsonl", "kind": "pointwise"}}}
    sections = {**FULL, "rm": rms, "rl": {**FULL["rl"], "dist": {"reward_model": {"name": "a"}}}}
    config = tiny_config(**sections, **VLLM)
    engines = {"rollout", "rl.plain", "rl.dist", "eval"}
    assert {job.key for job in jobs_of(config) if job.engine} == engines
    assert not any(job.engine for job in jobs_of(tiny_config(**FULL)))
    started = faked(dict.fromkeys([*engines, "rm.b"], "exec sleep 0.7"))
    alive, start = [], pipeline._start

    def starts(job, *given):
        alive.append((job.key, {key for key, _, process in started if process.poll() is None}))
        return start(job, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_start", starts)
        pipeline.run(config, tmp_path, 3)
    assert sorted(key for key, _ in alive) == sorted(job.key for job in jobs_of(config))
    for key, others in alive:
        assert key not in engines or not others & engines
    assert "rm.b" in dict(alive)["rl.plain"]  # what has none runs beside it
    assert "rollout" in dict(alive)["rm.c"]
    assert "rollout, rl.plain, rl.dist, eval: one at a time" in capsys.readouterr().out


def test_fine_tuning_has_an_engine_where_it_is_checked(tiny_config):
    assert [job_of(tiny_config(sft=sft, rl={"x": {}}, **VLLM)).engine for sft in ({}, {"stop_accuracy": 0.5})] == [
        False,
        True,
    ]


def job_of(config, key: str = "sft"):
    return next(job for job in jobs_of(config) if job.key == key)


def test_a_failure_is_named_with_its_last_lines_and_ends_the_others(tiny_config, tmp_path, faked):
    started = faked({"rm.a": "sleep 0.3; echo the reason; exit 3", "rm.b": "exec sleep 60"})
    with pytest.raises(RuntimeError, match=r"rm\.a failed with exit status 3:\n(.*\n)*the reason"):
        pipeline.run(tiny_config(**{**FULL, "rl": {}}), tmp_path, 2)
    processes = {key: process for key, _, process in started}
    assert set(processes) == {"sft", "rollout", "rm.a", "rm.b"}
    assert processes["rm.b"].poll() is not None


def test_a_phase_that_does_not_end_is_killed(monkeypatch):
    monkeypatch.setattr(pipeline, "GRACE_SECONDS", -4.5)  # half a second in all
    code = "trap '' TERM; echo ready; while :; do sleep 0.1; done"
    deaf = subprocess.Popen(["sh", "-c", code], stdout=subprocess.PIPE)
    deaf.stdout.readline()
    pipeline._end([deaf])
    deaf.stdout.close()
    assert deaf.returncode == -signal.SIGKILL
