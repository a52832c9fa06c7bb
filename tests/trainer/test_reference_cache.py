"""The cache of the reference's log-probs: what its key knows, and what a kill leaves."""

import subprocess

import pytest
import torch
from safetensors.torch import save_file

from ipvrm_core.trainer import reference_cache
from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.language_model import LanguageModel

ANSWERS = [Answer([3, 4], [5, 6, 7]), Answer([3, 4, 5], [6])]


def test_the_cache_is_read_the_second_time(tiny_experiment, tiny_model, tmp_path, monkeypatch):
    experiment, model = tiny_experiment(), LanguageModel(tiny_model())
    first = reference_cache.reference_logprobs(experiment, model, ANSWERS, tmp_path / "cache")
    torch.testing.assert_close(first, model.logprobs(ANSWERS))

    def never(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr(LanguageModel, "logprobs", never)
    assert torch.equal(reference_cache.reference_logprobs(experiment, model, ANSWERS, tmp_path / "cache"), first)
    others = {
        "another model": (experiment, LanguageModel(tiny_model(1)), ANSWERS),
        "other data": (experiment, model, ANSWERS[:1]),
        "another prompt": (experiment, model, [ANSWERS[0], Answer([3, 4, 6], [6])]),
        "the border elsewhere": (experiment, model, [Answer([3], [4, 5, 6, 7]), ANSWERS[1]]),
    }
    for arguments in others.values():
        with pytest.raises(AssertionError, match="computed again"):
            reference_cache.reference_logprobs(*arguments, tmp_path / "cache")


def test_the_key_has_the_temperature(tiny_config, tiny_model, tmp_path):
    from ipvrm_core.trainer.experiment import Experiment

    model = LanguageModel(tiny_model())
    keys = {
        reference_cache.cache_key(
            Experiment(tiny_config(generation={"temperature": t}), tmp_path / str(t)), model, ANSWERS
        )
        for t in (0.7, 1.0)
    }
    assert len(keys) == 2


def test_a_kill_while_writing_leaves_nothing_that_would_be_read(tiny_experiment, tiny_model, tmp_path, monkeypatch):
    experiment, model, folder = tiny_experiment(), LanguageModel(tiny_model()), tmp_path / "cache"

    def cut_short(tensors, path):
        save_file(tensors, path)
        path.write_bytes(path.read_bytes()[:-4])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reference_cache, "save_file", cut_short)
        with pytest.raises(KeyboardInterrupt):
            reference_cache.reference_logprobs(experiment, model, ANSWERS, folder)
    assert list(folder.iterdir()) == []
    dead = subprocess.Popen(["true"])
    dead.wait()
    name = f"reference-{reference_cache.cache_key(experiment, model, ANSWERS)}.safetensors"
    (folder / f".{name}.{dead.pid}.tmp").write_bytes(b"cut short")  # what SIGKILL leaves
    reference_cache.reference_logprobs(experiment, model, ANSWERS, folder)
    (path,) = folder.iterdir()  # what the killed process left is gone
    save_file({"logprobs": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"must hold 4 log-probs; got \(3,\). Delete it"):
        reference_cache.reference_logprobs(experiment, model, ANSWERS, folder)
