"""Batches one step ahead, without an engine: what is sampled when, what a checkpoint keeps, and what is refused."""

import json
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ipvrm_core.trainer.config import ConfigError
from ipvrm_core.trainer.rl import ahead as ahead_module
from ipvrm_core.trainer.rl.ahead import Ahead
from ipvrm_core.trainer.rl.collect import Collected
from ipvrm_core.trainer.rl.step import Learner
from tests.batches import two_prompts

VLLM = {"generation": {"max_new_tokens": 12, "sampler": "vllm"}}


@pytest.mark.parametrize(
    ("sampler", "correction", "message"),
    [
        ("generate", {"level": "token"}, "rl.x.ahead = true needs generation.sampler = 'vllm'.*; got 'generate'"),
        ("vllm", {"level": "none"}, r"rl.x.ahead = true needs rl.x.correction.level = 'token' or 'sequence'.*'none'"),
    ],
)
def test_what_ahead_needs(tiny_config, sampler, correction, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(
            generation={"max_new_tokens": 12, "sampler": sampler}, rl={"x": {"ahead": True, "correction": correction}}
        )


def test_ahead_is_off_unless_it_is_asked_for(tiny_config):
    config = tiny_config(**VLLM, rl={"x": {}, "y": {"ahead": True}})
    assert [config.rl[name].ahead for name in "xy"] == [False, True]


def test_a_batch_survives_json_to_the_bit():
    made = replace(
        two_prompts(), sampler_logprobs_N=torch.randn(20) / 3, due_N=torch.arange(20), staleness=1, numbers={"a": 0.1}
    )
    again = Collected.from_json(json_of(made))
    for name, value in vars(made).items():
        kept = getattr(again, name)
        assert (kept.equal(value) and kept.dtype == value.dtype) if isinstance(value, torch.Tensor) else kept == value
    assert Collected.from_json(json_of(two_prompts())).due_N is None
    moved = made.to(torch.device("meta"))
    assert all(value.is_meta for value in vars(moved).values() if isinstance(value, torch.Tensor))


def json_of(batch: Collected) -> dict:
    return json.loads(json.dumps(batch.to_json()))


@pytest.fixture
def ahead(tiny_experiment, monkeypatch):
    """make(steps, empty, kept) -> (Ahead, log): log has (step's seed, cursor) of every batch, whose thread it names.

    Batches whose number is in `empty` have no answers. A batch takes one prompt.
    """
    opened = []

    def make(steps: int = 9, empty: tuple = (), kept: dict | None = None):
        log = []
        sampler = SimpleNamespace(generator=None, stop=lambda: log.append("stopped"))

        def collects(experiment, given, batch, cursor, stream):
            assert given is sampler
            assert threading.current_thread().name.startswith("ahead")
            log.append((given.generator.initial_seed(), cursor, stream))
            if cursor == 99:
                raise RuntimeError("the judge is broken")
            made = replace(two_prompts(), cursor=cursor + 1, numbers={})
            return replace(made, answers=[]) if cursor in empty else made

        monkeypatch.setattr(ahead_module, "collect", collects)
        experiment = tiny_experiment(**VLLM, rl={"x": {"ahead": True, "steps": steps}})
        rl = experiment.config.rl["x"]
        learner = Learner("x", rl, rl.resolved(), None, sampler, {})
        opened.append(Ahead(experiment, learner, sampler, kept))
        return opened[-1], log

    yield make
    for each in opened:
        each.__exit__(None, None, None)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_the_next_batch_is_begun_when_one_is_taken_and_none_after_the_last_step(ahead, tiny_experiment):
    made, log = ahead(steps=3)
    for step in (1, 2, 3):
        batch = made.take(step, cursor=step - 1)
        made.wait()
        assert batch.cursor == step
        assert batch.staleness == min(1, step - 1)
        assert len(log) == min(3, step + 1)
    seeds = [made.experiment.generator("rl", "x", step).initial_seed() for step in (1, 2, 3)]
    assert log == [(seeds[0], 0, "rl"), (seeds[1], 1, "rl"), (seeds[2], 2, "rl")]
    assert made.to_json() is None


def test_after_a_step_without_an_update_the_next_batch_is_fresh(ahead):
    made, _ = ahead(empty=(1,))
    taken = []
    for step in range(1, 5):
        taken.append(made.take(step, step - 1))
        if taken[-1].answers:
            made.wait()
    assert [bool(batch.answers) for batch in taken] == [True, False, True, True]
    assert [batch.staleness for batch in taken] == [0, 1, 0, 1]


def test_a_kept_batch_is_taken_and_not_sampled_again(ahead):
    made, _ = ahead()
    made.take(1, 0)
    made.wait()
    later, log = ahead(kept=made.to_json())
    batch = later.take(2, 1)
    assert (batch.cursor, batch.staleness) == (2, 1)
    later.wait()
    assert [cursor for _, cursor, _ in log] == [2]


def test_what_goes_wrong_in_the_thread_is_raised_by_who_waits(ahead):
    made, log = ahead(kept=replace(two_prompts(), cursor=99).to_json())
    made.take(1, 0)
    with pytest.raises(RuntimeError, match="the judge is broken"):
        made.wait()
    with pytest.raises(RuntimeError, match="the judge is broken"):
        made.to_json()
    made.__exit__(None, None, None)
    assert log[-1] == "stopped"
