"""Ends before their time: signals, parents that die, losses that explode. Work is kept, what is destroyed is not."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from ipvrm_core.trainer import ending
from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.config import Optim
from ipvrm_core.trainer.optim import apply_step, make_optimizer
from ipvrm_core.trainer.phases import sft
from ipvrm_core.trainer.phases.training import Training, phase_folder

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
OPTIM = Optim(lr=1e-3)
BATCH = [Answer([2, 3], [4, 5, 1])]


@pytest.fixture
def trained(tiny_experiment):
    """run(step function, total=4, checkpoint_every=100): the steps of a phase, as the phases have them."""

    def run(each, total: int = 4, checkpoint_every: int = 100):
        experiment = tiny_experiment(checkpoint_every=checkpoint_every)
        model = experiment.base_model().model
        optimizer = make_optimizer(model, OPTIM)
        folder = experiment.run / "phase"
        with ending.signals(), phase_folder(folder, "model", resume=True) as todo:
            training = Training(experiment, folder, total, {"m": model}, {"m": optimizer}, show=(), state={"seen": 0})
            todo.enter_context(training)
            for step in training.steps():
                training.uses(BATCH)
                training.state["seen"] += 1
                each("before", step)
                model(input_ids=torch.tensor([[2, 3, 4]]), labels=torch.tensor([[2, 3, 4]])).loss.backward()
                apply_step(optimizer, OPTIM, step, total)
                each("after", step)
                training.log(step, loss=1.0)
        return folder

    return run


def _send(number: int, where: str, at: int):
    def each(place, step):
        if (place, step) == (where, at):
            os.kill(os.getpid(), number)

    return each


def _checkpoints(folder) -> list[str]:
    return sorted(path.name for path in folder.glob("*step-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("where", "kept"), [("before", 2), ("after", 3)])
def test_asked_to_end_a_phase_leaves_the_last_whole_step(trained, tmp_path, number, where, kept):
    """At once while the weights are those of step 2; after an update has begun, at the end of step 3."""
    with pytest.raises(ending.Ended) as caught:
        trained(_send(number, where, 3))
    folder = tmp_path / "run" / "phase"
    assert caught.value.signal == number
    assert _checkpoints(folder) == [f"step-000000{kept}"]
    assert json.loads((folder / f"step-000000{kept}" / "state.json").read_text()) == {"step": kept, "seen": kept}
    steps = []
    trained(lambda place, step: steps.append(step))
    assert sorted(set(steps)) == list(range(kept + 1, 5))


def test_an_ended_and_an_uninterrupted_phase_are_equal(trained, tmp_path):
    straight = trained(lambda *_: None) / "step-0000004" / "m.safetensors"
    expected = straight.read_bytes()
    (tmp_path / "run").rename(tmp_path / "straight")
    with pytest.raises(ending.Ended):
        trained(_send(signal.SIGTERM, "before", 3))
    folder = trained(lambda *_: None)
    assert (folder / "step-0000004" / "m.safetensors").read_bytes() == expected


def test_the_same_signal_twice_does_not_wait(trained, tmp_path):
    def each(place, step):
        if (place, step) == ("after", 3):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)  # what `ipvrm run` sends after a Ctrl-C that both got
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("waited")

    with pytest.raises(ending.Ended):
        trained(each)
    assert _checkpoints(tmp_path / "run" / "phase") == []


def test_an_update_that_takes_too_long_is_not_waited_for(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(ending, "GRACE_SECONDS", 1)

    def each(place, step):
        if (place, step) == ("after", 3):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)

    began = time.monotonic()
    with pytest.raises(ending.Ended) as caught:
        trained(each)
    assert time.monotonic() - began < 20
    assert caught.value.signal == signal.SIGTERM
    assert _checkpoints(tmp_path / "run" / "phase") == []


def test_handlers_are_put_back(trained):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ending.Ended):
        trained(_send(signal.SIGTERM, "before", 2))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# ---- losses and weights that are none


def _sft(tiny_experiment, **optim):
    return tiny_experiment(sft={"steps": 12, "batch": 8, "optim": optim}, checkpoint_every=1)


@pytest.mark.parametrize("lr", [1e9, 1e4])
def test_an_exploding_loss_names_step_phase_and_batch(tiny_experiment, tmp_path, lr):
    experiment = _sft(tiny_experiment, lr=lr)
    with pytest.raises(
        FloatingPointError, match=r"^sft step 1: .*The batch of step 1 \(8 answers\) is kept in"
    ) as error:
        sft.run(experiment)
    folder = tmp_path / "run" / "sft"
    path = folder / "failed-step-0000001.json"
    assert str(path) in str(error.value)
    kept = json.loads(path.read_text())
    assert (kept["phase"], kept["step"], len(kept["examples"])) == ("sft", 1, 8)
    expected = [experiment.text.demonstration(example)._asdict() for example in experiment.examples("sft", 0, 8)]
    assert kept["answers"] == expected
    assert _checkpoints(folder) == ["failed-step-0000001.json"]


@pytest.mark.parametrize("value", [math.nan, math.inf, 2e4, -2e4])
def test_a_loss_beyond_all_measure_is_refused(trained, tmp_path, value, monkeypatch):
    log = Training.log
    monkeypatch.setattr(Training, "log", lambda self, step, **_: log(self, step, loss=value if step == 3 else 1.0))
    with pytest.raises(FloatingPointError, match=r"phase step 3: .*loss is.*newest checkpoint is step-0000002"):
        trained(lambda *_: None, checkpoint_every=1)
    assert _checkpoints(tmp_path / "run" / "phase") == ["failed-step-0000003.json", "step-0000001", "step-0000002"]


def test_a_gradient_that_is_no_number_makes_no_step(tiny_model):
    model = tiny_model()
    optimizer = make_optimizer(model, OPTIM)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    with pytest.raises(FloatingPointError, match="the norm of the gradient is nan"):
        apply_step(optimizer, OPTIM, 1, 10)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True))


def test_destroyed_weights_turn_another_failure_into_theirs(trained, tmp_path, tiny_model, monkeypatch):
    """Sampling from such a policy fails with an error about probabilities, a step later."""

    def each(place, step):
        if (place, step) == ("before", 3):
            with torch.no_grad():
                next(iter(models[0].parameters())).fill_(math.nan)
            raise RuntimeError("probability tensor contains nan")

    models, init = [], Training.__init__

    def keeping(self, experiment, folder, total, given, *more, **settings):
        models.append(given["m"])
        init(self, experiment, folder, total, given, *more, **settings)

    monkeypatch.setattr(Training, "__init__", keeping)
    with pytest.raises(FloatingPointError, match=r"step 3: the weights m\.\S+ went from 0\.0\d+ to inf"):
        trained(each)


# ---- parents


def _gone(pid: int, seconds: float = 20) -> bool:
    """Whether the process ends in this time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                time.sleep(0.02)
                continue
        return True
    return False


PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""
CHILD = """
import sys, time
from ipvrm_core.trainer import ending
{patch}
with ending.signals():
    try:
        ending.end_with_parent()
        print("ready", flush=True)  # from here on the signal may come
        time.sleep(60)
    except KeyboardInterrupt as error:
        open({path!r}, "w").write(error.signal.name)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("patch", ["", "sys.platform = 'elsewhere'"], ids=["kernel", "pipe"])
def test_a_phase_ends_with_the_process_that_started_it(tmp_path, patch):
    """SIGKILL of the parent; the child is asked to end and has the time to keep its work."""
    note = tmp_path / "note"
    code = CHILD.format(patch=patch, path=str(note))
    parent = subprocess.Popen([sys.executable, "-c", PARENT, code], stdout=subprocess.PIPE, env=ENVIRONMENT, cwd=ROOT)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert _gone(child)
    assert note.read_text() == "SIGTERM"


JUDGING = """
import re
from ipvrm_core.trainer.verify.worker import Worker
def hang(response, gold):  # and lets no other thread of its process run
    return bool(re.match(r"(a+)+$", "a" * 60 + "b"))
if __name__ == "__main__":
    worker = Worker("judging:hang")
    worker._start()
    print(worker._process.pid, flush=True)
    worker.judge("a", "b", 60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_hanging_judge_ends_with_its_phase(tmp_path):
    path = tmp_path / "judging.py"
    path.write_text(JUDGING)
    parent = subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, env=ENVIRONMENT, cwd=ROOT)
    worker = int(parent.stdout.readline())
    time.sleep(0.3)  # it hangs by now
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert _gone(worker)
