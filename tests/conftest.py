"""Shared by the trainer's tests: an experiment of a size that a test can afford."""

import pytest
import torch

from ipvrm_core.trainer.config import check
from ipvrm_core.trainer.data.tasks import ChainTask


@pytest.fixture
def tiny_config():
    """make(**sections) -> Config: the chain task, one layer of 32, everything else as given."""

    def make(**sections):
        task = {"task": "chain", "task_args": {"min_ops": 1, "max_ops": 2}}
        scratch = {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 2, "intermediate_size": 64}
        return check(
            {
                "device": "cpu",
                "model": {"scratch": scratch},
                "data": task,
                "test": task,
                "verifier": {"kind": "exact"},
                "generation": {"max_new_tokens": 12},
                **sections,
            }
        )

    return make


@pytest.fixture
def tiny_experiment(tiny_config, tmp_path):
    """make(**sections) -> Experiment of `tiny_config` in a folder of its own."""
    # Imported here: transformers takes seconds, and most tests of this repository do without it.
    from ipvrm_core.trainer.experiment import Experiment

    return lambda **sections: Experiment(tiny_config(**sections), tmp_path / "run")


@pytest.fixture
def tiny_model(tiny_config):
    """make(number, scale) -> a random model, different for every number, its weights scaled up.

    At the usual initialisation all distributions are nearly uniform, which would hide mistakes.
    """

    def make(number: int = 0, scale: float = 6.0):
        from ipvrm_core.trainer.models import build_scratch, load_tokenizer

        config = tiny_config()
        torch.manual_seed(number)
        model = build_scratch(config.model.scratch, load_tokenizer(config.model, ChainTask.alphabet))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(scale)
        return model.eval()

    return make
