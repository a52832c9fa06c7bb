"""Rollouts one step ahead: what they are sampled from, that a run goes on to the same numbers, and how it ends."""

import os
import shutil
import threading
import time
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from ipvrm_core.trainer.commands.main import main
from ipvrm_core.trainer.config import load
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.metrics import MetricsLog
from ipvrm_core.trainer.models import load_pretrained
from ipvrm_core.trainer.rl import step as step_module
from ipvrm_core.trainer.rl.ahead import Ahead
from ipvrm_core.trainer.rl.collect import collect
from ipvrm_core.trainer.sampling.verified import Asker
from ipvrm_core.trainer.sampling.vllm import VllmSampler
from tests.integrations.vllm.runs import CONFIG, Runs

AHEAD = CONFIG.replace("steps = 4", "steps = 5\nahead = true")


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    """Run a: five steps ahead, without an interruption. weights: what the engine was given; batches: what it made."""
    made = Runs(tmp_path_factory.mktemp("runs"), AHEAD)
    made.weights, made.batches, made.rested = [], [], []
    sync, take, rest = VllmSampler.sync, Ahead.take, VllmSampler.rest

    def keeps_weights(self, policy):
        made.weights.append({name: weight.clone() for name, weight in policy.model.state_dict().items()})
        sync(self, policy)

    def keeps_batches(self, step, cursor):
        made.batches.append(take(self, step, cursor))
        return made.batches[-1]

    assert made.does("sft", "a") == 0
    for run in "bcd":
        shutil.copytree(made.folder / "a", made.folder / run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VllmSampler, "sync", keeps_weights)
        patch.setattr(VllmSampler, "rest", lambda self: made.rested.append(1) or rest(self))
        patch.setattr(Ahead, "take", keeps_batches)
        assert made.does("rl", "a") == 0
    del made.weights[0]  # that the engine started with
    return made


def test_the_first_batch_is_fresh_and_every_other_one_an_update_old(runs):
    lines = runs.lines("a", "rl/grpo")
    assert [line["staleness"] for line in lines] == [0, 1, 1, 1, 1]
    assert lines[0]["mismatch"] < 1e-5
    assert all(line["mismatch"] > 1e-4 for line in lines[1:])  # pi_old is a step on from the answers' policy
    assert all(line["grad_norm"] > 0 for line in lines)


def test_the_engine_samples_while_the_policy_learns_so_it_does_not_rest(runs):
    assert not runs.rested


def test_a_batch_is_what_the_engine_samples_from_the_weights_before_the_last_update(runs):
    """By an engine that samples when it is asked, in this thread."""
    assert len(runs.weights) == 6  # W_0 .. W_5
    experiment = Experiment(load(runs.config), runs.folder / "a")
    policy = experiment.language_model(load_pretrained(runs.folder / "a/sft/model"))
    sampler, cursor = experiment.sampler(policy), 0
    try:
        for step, batch in enumerate(runs.batches, 1):
            made = []
            for index in (max(0, step - 2), step - 1):
                policy.model.load_state_dict(runs.weights[index])
                sampler.sync(policy)
                experiment.seed("rl", "grpo", step)
                again = collect(experiment, sampler, experiment.config.rl["grpo"].batch, cursor, "rl")
                made.append(again.to_json() | {"staleness": batch.staleness})
            assert made[0] == batch.to_json()
            assert (made[1] == made[0]) == (step == 1)
            cursor = batch.cursor
    finally:
        sampler.close()
        experiment.close()


def test_a_run_that_is_cut_off_goes_on_to_the_same_numbers(runs, monkeypatch):
    """The batch that was sampled ahead of the checkpoint's step belongs to the checkpoint."""
    log = MetricsLog.log

    def ends_after_three(self, step, **numbers):
        log(self, step, **numbers)
        if step == 3:
            raise RuntimeError("cut off")

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "log", ends_after_three)
        with pytest.raises(RuntimeError, match="cut off"):
            runs.does("rl", "b")
    assert [path.name for path in (runs.folder / "b/rl/grpo").glob("step-*")] == ["step-0000002"]
    assert runs.does("rl", "b", "--resume") == 0
    assert runs.lines("b", "rl/grpo") == runs.lines("a", "rl/grpo")
    whole, resumed = (load_file(runs.folder / run / "rl/grpo/model/model.safetensors") for run in "ab")
    assert all(whole[name].equal(resumed[name]) for name in whole)


def test_the_engines_end_in_its_thread_ends_the_run_with_its_words(runs, monkeypatch, capsys):
    """It dies while it samples the batch of step 4, which step 3 does not see."""
    sample, threads = VllmSampler.sample, []

    def dies(self, prompts, drawing):
        threads.append(threading.current_thread().name)
        if len(threads) == 4:
            self.engine.ask(lambda worker: setattr(worker.model_runner, "model", None))
        return sample(self, prompts, drawing)

    monkeypatch.setattr(VllmSampler, "sample", dies)
    assert main(["rl", str(runs.config), "--run", str(runs.folder / "c")]) == 2
    assert "ipvrm rl: vLLM's engine could not sample: " in capsys.readouterr().err
    assert len(threads) == 4
    assert all(name.startswith("ahead") for name in threads)
    assert len(runs.lines("c", "rl/grpo")) == 2


def test_the_judges_failure_in_its_thread_ends_the_run_with_its_words(runs, monkeypatch, tmp_path, capsys):
    """It raises from step 2 on; what is being sampled for step 4 by then has been judged before."""
    (tmp_path / "moody.py").write_text(
        "import os\nfrom pathlib import Path\n\n\n"
        "def judge(response, gold):\n"
        "    if Path(os.environ['MOOD']).exists():\n"
        "        raise ValueError('not today')\n"
        "    return gold in response\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")
    monkeypatch.setenv("MOOD", str(tmp_path / "mood"))
    log = MetricsLog.log
    monkeypatch.setattr(
        MetricsLog, "log", lambda self, step, **numbers: log(self, step, **numbers) or (tmp_path / "mood").touch()
    )
    kept = [line for line in AHEAD.splitlines() if not line.startswith(("model.", "sft ", "verifier "))]
    model = f'model = {{ path = "{runs.folder}/a/sft/model" }}\nverifier = {{ kind = "moody:judge" }}\n'
    config = tmp_path / "moody.toml"
    config.write_text(model + "\n".join(kept))
    assert main(["rl", str(config), "--run", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "moody:judge gave no verdict on" in said
    assert "not today" in said
    assert len((tmp_path / "run/rl/grpo/metrics.jsonl").read_text().splitlines()) == 1


def test_a_failure_of_the_training_does_not_wait_for_what_is_being_sampled(runs, monkeypatch):
    """The batch of step 2 would have 12,000 answers."""
    update, ask = step_module.update_policy, Asker.ask
    asked, at = [], []

    def asks(self, sampler, examples, drawing):
        asked.append(1)
        return ask(self, sampler, examples, drawing if len(asked) == 1 else replace(drawing, samples=1000))

    def fails(*given):
        update(*given)
        while len(asked) < 2:
            time.sleep(0.1)
        time.sleep(1)
        at.append(time.perf_counter())
        raise FloatingPointError("loss is nan")

    monkeypatch.setattr(Asker, "ask", asks)
    monkeypatch.setattr(step_module, "update_policy", fails)
    with pytest.raises(FloatingPointError, match="rl/grpo step 1: loss is nan"):
        runs.does("rl", "d")
    assert time.perf_counter() - at[0] < 10
