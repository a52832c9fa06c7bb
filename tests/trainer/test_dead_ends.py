"""Steps without anything to learn from, and rollouts without a verdict: training goes on without them."""

import json

import pytest

from ipvrm_core.trainer.files import write_json
from ipvrm_core.trainer.metrics import MetricsLog, computed, read_metrics
from ipvrm_core.trainer.phases import rl, rollout
from ipvrm_core.trainer.phases.rm_data import from_rollouts
from ipvrm_core.trainer.sampling.verified import Asker
from ipvrm_core.trainer.shards import Shards
from ipvrm_core.trainer.verify import Verdict

BATCH = {"prompts": 4, "keep_prompts": 2, "rollouts": 4, "max_rounds": 1}


@pytest.fixture
def policy_run(tiny_config, tmp_path, monkeypatch):
    """make(folder, mixed, **settings) -> Experiment with rl.x, from random weights.

    The rounds whose numbers are in `mixed` have mixed prompts, in the others every answer is right.
    """
    from ipvrm_core.trainer.experiment import Experiment

    def make(folder: str, mixed: set[int], **settings) -> Experiment:
        def ask(asker, sampler, examples, drawing):
            made, _ = own(asker, sampler, examples, drawing)
            number = int(examples[0].id.rsplit("-", 1)[1]) // BATCH["prompts"]
            return made, [Verdict(number not in mixed or index % 2 == 0, "ok") for index in range(len(made))]

        monkeypatch.setattr(Asker, "ask", ask)
        policy = {"batch": BATCH, "minibatch": 8, "optim": {"lr": 1e-2}, **settings}
        return Experiment(tiny_config(rl={"x": policy}, checkpoint_every=1), tmp_path / folder)

    own = Asker.ask
    return make


def _lines(experiment) -> list[dict]:
    lines = read_metrics(experiment.run / "rl/x/metrics.jsonl")
    return [computed(line) for line in lines]


def _weights(experiment) -> bytes:
    return (experiment.run / "rl/x/model/model.safetensors").read_bytes()


def test_a_step_without_mixed_prompts_is_skipped_and_a_resume_is_bit_equal(policy_run, monkeypatch, capsys):
    mixed = {0, 3, 4}
    straight = policy_run("a", mixed, steps=6, max_skipped=3)
    rl.run(straight, "x")
    said = capsys.readouterr().out
    assert "rl/x step 2 is skipped: none of 4 prompts had both right and wrong answers (accuracy 1, 0 prompts " in said
    lines = _lines(straight)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["kept_prompts"] for line in lines] == [2, 0, 0, 2, 2, 0]
    assert [line["accuracy"] for line in lines] == [0.5, 1, 1, 0.5, 0.5, 1]
    assert [("loss" in line) for line in lines] == [True, False, False, True, True, False]

    class StoppedError(Exception):
        pass

    def stopping(log, step, **numbers):
        write(log, step, **numbers)
        if step == 3:
            log.close()
            raise StoppedError

    write = MetricsLog.log
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "log", stopping)
        with pytest.raises(StoppedError):
            rl.run(policy_run("b", mixed, steps=6, max_skipped=3), "x")
    resumed = policy_run("b", mixed, steps=6, max_skipped=3)
    rl.run(resumed, "x", resume=True)
    assert _lines(resumed) == lines
    assert _weights(resumed) == _weights(straight)


def test_training_ends_early_after_steps_without_mixed_prompts(policy_run, capsys):
    """The first skipped step stands alone, the next two are in a row."""
    experiment = policy_run("a", {0, 2}, steps=50, max_skipped=2)
    rl.run(experiment, "x")
    assert "rl/x ends early at step 5 of 50: 2 steps in a row were skipped" in capsys.readouterr().out
    assert [line["kept_prompts"] for line in _lines(experiment)] == [2, 0, 2, 0, 0]
    rl.run(experiment, "x", resume=True)  # finished, as after any other run
    assert len(_lines(experiment)) == 5


def test_rollouts_of_a_prompt_without_all_verdicts_are_left_out(tiny_experiment):
    """Prompts 1 and 3 of four have an answer without a verdict; the last two are held out, whatever is left of them."""
    experiment = tiny_experiment(
        rollout={"prompts": 4, "samples": 2, "held_out": 2},
        rm={"x": {"pairing": "none"}},
    )
    status = {1: "timeout", 3: "error"}
    rows = [
        {
            "prompt": prompt,
            "prompt_ids": [1],
            "response_ids": [2, prompt],
            "ref_logprobs": [0.0, 0.0],
            "correct": sample == 0,
            "status": status.get(prompt, "ok") if sample else "ok",
            "finished": True,
        }
        for prompt in range(4)
        for sample in range(2)
    ]
    folder = experiment.run / "rollout"
    folder.mkdir()
    shards = Shards(folder)
    shards.add(0, rows)
    summary = rollout.summarize(shards.rows())
    counts = {"prompts": 4, "unjudged_prompts": 2, "answers": 8, "verdict_timeout": 1, "verdict_error": 1}
    assert counts.items() <= summary.items()
    assert (summary["accuracy"], summary["mixed_prompts"]) == (4 / 6, 1.0)
    write_json(folder / "summary.json", summary)
    assert [group.prompt for group in rollout.read(folder)] == [0, 2]
    data = from_rollouts(experiment, experiment.config.rm["x"])
    assert [row.answer.response_ids for unit in data.units for row in unit] == [[2, 0], [2, 0]]
    assert [group.prompt for group in data.held_out] == [2]
    assert json.loads((folder / "summary.json").read_text())["unjudged_prompts"] == 2
