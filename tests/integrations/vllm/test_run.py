"""The trainer from a configuration with `sampler = "vllm"`: a start that can do something, RL steps, an end, a kill."""

import json

import pytest
from safetensors.torch import load_file

from ipvrm_core.trainer.commands.main import main
from ipvrm_core.trainer.config import load
from ipvrm_core.trainer.evaluation.policy.accuracy import policy_accuracy
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.metrics import MetricsLog
from ipvrm_core.trainer.models import load_pretrained
from ipvrm_core.trainer.sampling.vllm import VllmSampler
from tests.integrations.vllm.runs import CONFIG, Runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    """Run a: everything without an interruption."""
    made = Runs(tmp_path_factory.mktemp("runs"))
    for phase in ("sft", "rl", "eval"):
        assert made.does(phase, "a") == 0
    return made


def test_the_start_can_do_something(runs):
    """Fine-tuning ended early because the engine's answers, of weights that it got on the way, were right."""
    checks = [line["accuracy"] for line in runs.lines("a", "sft") if "accuracy" in line]
    assert checks[-1] >= 0.05
    assert len(runs.lines("a", "sft")) < 60


def test_the_policy_moves_and_every_step_says_how_far_sampler_and_trainer_are_apart(runs):
    lines = runs.lines("a", "rl/grpo")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert line["grad_norm"] > 0
        assert line["mismatch"] < 1e-5
        assert line["mismatch_max"] < 1e-4
        assert line["mismatch_ess"] == pytest.approx(1, abs=1e-5)
        assert line["mismatch_ratio_max"] == pytest.approx(1, abs=1e-4)
        assert line["corrected"] == 0
    start, end = (load_file(runs.folder / "a" / name / "model.safetensors") for name in ("sft/model", "rl/grpo/model"))
    assert all((start[name] - end[name]).abs().max() > 1e-4 for name in start)


def test_the_configuration_that_is_kept_says_what_corrects(runs):
    kept = json.loads((runs.folder / "a" / "config.json").read_text())
    assert kept["rl"]["grpo"]["correction"] == {"level": "token", "mode": "cap", "limit": 2.0}


@pytest.mark.parametrize(("name", "model"), [("start", "sft/model"), ("grpo", "rl/grpo/model")])
def test_an_evaluation_by_the_engine_finds_what_transformers_finds(runs, name, model):
    kept = json.loads((runs.folder / "a" / "eval" / f"policy-{name}.json").read_text())
    experiment = Experiment(load(runs.config, ["generation.sampler=generate"]), runs.folder / f"generate-{name}")
    policy = experiment.language_model(load_pretrained(runs.folder / "a" / model))
    found = policy_accuracy(experiment, policy, experiment.test_examples(64))
    experiment.close()
    assert found["greedy"] == kept["greedy"] > 0
    assert found["all_steps_greedy"] == kept["all_steps_greedy"]
    assert 0 < kept["avg@2"] < 1


def test_a_run_that_is_cut_off_goes_on_to_the_same_numbers(runs, monkeypatch):
    log = MetricsLog.log

    def ends_after_three(self, step, **numbers):
        log(self, step, **numbers)
        if step == 3:
            raise RuntimeError("cut off")

    assert runs.does("sft", "b") == 0
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "log", ends_after_three)
        with pytest.raises(RuntimeError, match="cut off"):
            runs.does("rl", "b")
    assert (runs.folder / "b/rl/grpo/step-0000002").is_dir()
    assert runs.does("rl", "b", "--resume") == 0
    assert runs.lines("b", "rl/grpo") == runs.lines("a", "rl/grpo")
    whole, resumed = (load_file(runs.folder / run / "rl/grpo/model/model.safetensors") for run in "ab")
    assert all(whole[name].equal(resumed[name]) for name in whole)


def test_adapters_are_served_as_adapters(runs, monkeypatch):
    """Adapters on the start that run a has made."""
    handed = []
    hand = VllmSampler._hand_adapter
    monkeypatch.setattr(VllmSampler, "_hand_adapter", lambda self, model: handed.append(1) or hand(self, model))
    model = f'model = {{ path = "{runs.folder}/a/sft/model", lora = {{ rank = 4, alpha = 8.0 }} }}\n'
    kept = [line for line in CONFIG.splitlines() if not line.startswith(("model.", "sft "))]
    path = runs.folder / "adapters.toml"
    path.write_text(model + "\n".join(kept).replace("lr = 5e-4", "lr = 1e-2").replace("steps = 4", "steps = 3"))
    assert main(["--traceback", "rl", str(path), "--run", str(runs.folder / "c")]) == 0
    assert len(handed) == 1 + 1 + 3  # at the start, when the phase begins, after every step
    lines = runs.lines("c", "rl/grpo")
    assert len(lines) == 3
    assert all(line["mismatch"] < 1e-5 and line["grad_norm"] > 0 for line in lines)
    start, end = (load_file(runs.folder / name / "model.safetensors") for name in ("a/sft/model", "c/rl/grpo/model"))
    moved = {name for name in start if (start[name] - end[name]).abs().max() > 1e-4}
    assert moved == {name for name in start if "_proj." in name}


def test_the_engines_end_ends_the_run_with_its_words(runs, monkeypatch, capsys):
    """An engine that dies while it samples: the command says what it said, and a checkpoint stays."""
    sample = VllmSampler.sample

    def dies(self, prompts, drawing):
        self.engine.ask(lambda worker: setattr(worker.model_runner, "model", None))
        return sample(self, prompts, drawing)

    assert runs.does("sft", "d") == 0
    monkeypatch.setattr(VllmSampler, "sample", dies)
    assert main(["rl", str(runs.config), "--run", str(runs.folder / "d")]) == 2
    assert "ipvrm rl: vLLM's engine could not sample: " in capsys.readouterr().err
