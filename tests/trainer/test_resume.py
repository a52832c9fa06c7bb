"""Kill any phase at any moment and go on: the same numbers as without the kill, through the real command line.

Run A is not interrupted: one process makes all of it. Run B loses every phase to SIGKILL, some of them twice and one in
the middle of writing a checkpoint; then another process goes on with --resume. Both are made once and shared.
"""

import contextlib
import hashlib
import io
import json
import os
import signal
from pathlib import Path

import pytest
from safetensors import safe_open

from ipvrm_core.trainer.commands.main import main
from ipvrm_core.trainer.metrics import computed
from tests import killable

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
name = "tiny"
device = "cpu"
checkpoint_every = 2
micro_batch_tokens = 1024
model.scratch = { hidden_size = 32, layers = 1, heads = 2, kv_heads = 2, intermediate_size = 64 }
data = { task = "chain", task_args = { min_ops = 1, max_ops = 2 } }
test = { task = "chain", task_args = { min_ops = 1, max_ops = 2 } }
verifier = { kind = "exact" }
generation = { max_new_tokens = 20, batch = 64 }
sft = { steps = 60, batch = 32, stop_accuracy = 0.1, optim = { lr = 1e-2, warmup = 5, schedule = "cosine" } }
rollout = { prompts = 24, samples = 8, held_out = 8, batch = 2 }
eval = { prompts = 16, samples = 4, traces = 40 }

[rm.prefix]
steps = 21
batch = 16
validate_every = 5
optim = { lr = 1e-3 }

[rl.dist]
steps = 8
minibatch = 16
method = { alpha = 1.0 }
batch = { prompts = 16, keep_prompts = 4, rollouts = 8 }
optim = { lr = 1e-3, warmup = 2 }
reward_model = { name = "prefix", update = "before", batch = 16, optim = { lr = 1e-3 } }
"""


pytestmark = pytest.mark.slow

PHASES = ("sft", "rollout", "train-rm", "rl", "eval")
TRAINED = ("sft", "rm/prefix", "rl/dist")
LIMIT = 300  # seconds for one process


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _files(folder: Path) -> dict[str, tuple[str, int]]:
    """Digest and time of change of every file but the locks."""
    return {
        str(path.relative_to(folder)): (_digest(path), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def _lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


class Runs:
    """The uninterrupted run `a`, the interrupted run `b`, and what was seen on the way."""

    def __init__(self, folder: Path):
        self.config = folder / "tiny.toml"
        self.config.write_text(CONFIG)
        self.a, self.b = folder / "a", folder / "b"
        self.seen: dict[str, object] = {}

    def words(self, phase: str, run: Path, *more: str) -> list[str]:
        return [phase, str(self.config), *more, "--run", str(run)]

    @contextlib.contextmanager
    def process(self, run: Path, lines: list[list[str]], *how):
        """A process that says `lines` to the command line; see `killable.run`. It is gone afterwards."""
        process = killable.FORKS.Process(target=killable.run, args=(lines, run.with_suffix(".txt"), *how))
        process.start()
        try:
            yield process
        finally:
            process.kill()
            process.join()

    def on(self, *phases: str, at=None, begins=True) -> None:
        """Run B goes on with the phases, the last of which is killed at `at`; `begins`: it has not begun before."""
        lines = [self.words(phase, self.b, "--resume") for phase in phases]
        if at and begins:
            lines[-1].remove("--resume")
        with self.process(self.b, lines, at) as process:
            process.join(LIMIT)
            assert process.exitcode == (-signal.SIGKILL if at else 0), self.log(self.b)

    def log(self, run: Path) -> str:
        return run.with_suffix(".txt").read_text()[-3000:]

    def refusal(self, phase: str, *more: str) -> str:
        """What the command line says in this process when it refuses; asserts that nothing was touched."""
        before, text = _files(self.b), io.StringIO()
        with contextlib.redirect_stderr(text):
            assert main(self.words(phase, self.b, *more)) == 2
        assert _files(self.b) == before
        return text.getvalue()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    made = Runs(tmp_path_factory.mktemp("runs"))
    with pytest.MonkeyPatch.context() as patch:  # of the process that all others are forked from
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT))
        killable.FORKS.set_forkserver_preload(killable.PRELOAD)
        whole = made.process(made.a, [made.words(phase, made.a) for phase in PHASES])
        with whole as straight:  # beside run B
            _interrupted(made)
            straight.join(LIMIT)
            assert straight.exitcode == 0, made.log(made.a)
    return made


def _interrupted(made: Runs) -> None:
    """Run B. Every assertion here makes sure that a kill came where it was meant to."""
    b, seen = made.b, made.seen

    made.on("sft", at=("written", "config.json"))  # very early: nothing but the configuration
    assert (b / "config.json").exists()
    assert not (b / "sft").exists()

    metrics, reached = b / "sft" / "metrics.jsonl", killable.FORKS.Event()
    with made.process(b, [made.words("sft", b, "--resume")], ("line", 3), reached) as alive:
        assert reached.wait(LIMIT), made.log(b)
        os.kill(alive.pid, signal.SIGSTOP)  # its other threads too
        seen["second process"] = made.refusal("sft", "--resume")
    seen["started"] = made.refusal("sft")
    assert _lines(metrics) == 3
    with open(metrics, "a") as file:
        file.write('{"step": 39, "nl')  # a line cut short, as a kill within write() would leave it
    made.on("sft", at=("rename", 2), begins=False)  # rename 1: a checkpoint, 2: the next one
    assert list((b / "sft").glob(".step-*.tmp/state.json"))

    made.on("sft", "rollout", at=("line", 4))
    assert len(list((b / "rollout/shards").glob("*.json"))) == 3  # the line comes before its shard

    made.on("rollout", "train-rm", at=("line", 3))

    made.on("train-rm", "rl", at=("line", 5))
    made.on("rl", at=("rename", 2), begins=False)  # the new checkpoint is there, the oldest one not gone yet
    assert len(list((b / "rl/dist").glob("step-*"))) == 3

    made.on("rl", "eval", at=("written", "policy-start.json"))
    assert not (b / "eval/results.json").exists()
    made.on("eval")


@pytest.mark.parametrize("folder", TRAINED)
def test_final_weights_are_bit_identical(runs, folder):
    assert _digest(runs.a / folder / "model/model.safetensors") == _digest(runs.b / folder / "model/model.safetensors")


@pytest.mark.parametrize("folder", TRAINED)
def test_training_moved_the_weights(runs, folder):
    start = "init" if folder == "sft" else "sft"
    if start == "init":
        lines = _metrics(runs.a / folder)
        assert lines[-1]["nll"] < 0.7 * lines[0]["nll"]
    else:
        assert _digest(runs.a / folder / "model/model.safetensors") != _digest(runs.a / "sft/model/model.safetensors")


def _metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [computed(line) for line in lines]


@pytest.mark.parametrize(("folder", "least", "most"), [("sft", 20, 59), ("rm/prefix", 21, 21), ("rl/dist", 8, 8)])
def test_metrics_are_equal_line_by_line(runs, folder, least, most):
    """Supervised training stops itself early, by a mean over the last ten steps, which a kill must not forget."""
    straight, interrupted = _metrics(runs.a / folder), _metrics(runs.b / folder)
    assert least <= len(straight) <= most
    assert [line["step"] for line in straight] == list(range(1, len(straight) + 1))
    assert interrupted == straight


def test_rollouts_are_equal(runs):
    shards = sorted((runs.a / "rollout/shards").iterdir())
    assert len(shards) == 12
    for path in shards:
        assert (runs.b / path.relative_to(runs.a)).read_text() == path.read_text()
    assert _metrics(runs.b / "rollout") == _metrics(runs.a / "rollout")
    straight, interrupted = (json.loads((run / "rollout/summary.json").read_text()) for run in (runs.a, runs.b))
    assert straight.keys() == interrupted.keys()
    own = {"seconds", "tokens_per_second", "peak_memory_mb"}
    assert all(straight[key] == interrupted[key] for key in straight.keys() - own)
    assert straight["tokens"] == sum(
        len(row["response_ids"]) for path in shards for row in json.loads(path.read_text())
    )


def test_evaluation_is_equal(runs):
    names = sorted(path.name for path in (runs.a / "eval").glob("*.json"))
    assert names == ["online-dist.json", "policy-dist.json", "policy-start.json", "results.json", "rm-prefix.json"]
    for name in names:
        assert (runs.b / "eval" / name).read_text() == (runs.a / "eval" / name).read_text()


def test_nothing_is_left_behind(runs):
    """The same files in both runs: no temporary folders, no superseded checkpoints."""

    def kept(run: Path) -> set[str]:
        return {name for name in _files(run) if "tensorboard" not in name}

    assert kept(runs.b) == kept(runs.a)
    suffixes = {Path(name).suffix for name in kept(runs.a)}
    assert suffixes == {".html", ".json", ".jsonl", ".safetensors"}  # no pickle, no rubbish


def test_the_last_checkpoint_holds_both_models_and_both_optimisers(runs):
    _, newest = sorted((runs.a / "rl/dist").glob("step-*"))
    state = json.loads((newest / "state.json").read_text())
    assert state["step"] == 8
    assert state["cursor"] >= 8 * 16  # prompts already used; never asked again
    for name in ("policy", "reward_model", "policy.optimizer", "reward_model.optimizer"):
        with safe_open(newest / f"{name}.safetensors", "pt") as file:
            assert len(list(file.keys())) > 0


def test_a_second_process_on_the_same_phase_is_refused(runs):
    assert "in use" in runs.seen["second process"]
    assert str(runs.b / "sft") in runs.seen["second process"]


def test_a_killed_phase_is_not_started_again_without_resume(runs):
    assert "--resume" in runs.seen["started"]


@pytest.mark.parametrize("phase", PHASES)
def test_a_finished_phase_is_refused_without_resume_and_kept_with_it(runs, phase):
    assert "--resume" in runs.refusal(phase)
    before = _files(runs.b)
    assert main(runs.words(phase, runs.b, "--resume")) == 0
    assert _files(runs.b) == before


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("sft.steps=61", "sft.steps"),
        ("rl.dist.method.alpha=0.5", "rl.dist.method.alpha"),
        ("data.task_args.max_ops=3", "data.task_args.max_ops"),
        ("seed=1", "seed"),
    ],
)
def test_another_configuration_in_the_same_folder_is_refused(runs, override, key):
    for more in ([override], [override, "--resume"]):
        message = runs.refusal("sft", *more)
        assert key in message
        assert str(runs.b) in message


def test_the_resolved_configuration_of_the_run_is_accepted(runs):
    assert main(["sft", str(runs.b / "config.json"), "--run", str(runs.b), "--resume"]) == 0
