"""Names of cases; shared by the trainer's tests, an experiment of a size that a test can afford."""

from pathlib import Path

import pytest
import torch

from ipvrm_core.trainer.config import Chats, ConfigError, check, load
from ipvrm_core.trainer.data.tasks import ChainTask
from tests.chats import write

DTYPES = {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
NUMBER = bool | int | float | None


def pytest_make_parametrize_id(config, val, argname):
    """Cases that say what they are: N37-D13-V101-K10-bf16, softcap=None; None leaves the rest to pytest."""
    if isinstance(val, torch.dtype):
        return DTYPES.get(val, str(val))
    if argname == "shape":
        return "-".join(f"{letter}{size}" for letter, size in zip("NDVK", val, strict=True))
    if isinstance(val, NUMBER):
        return f"{argname}={val}"
    if isinstance(val, dict) and val and all(isinstance(value, NUMBER | str) for value in val.values()):
        return ",".join(f"{key}={value}" for key, value in val.items())
    if isinstance(val, list) and val and all(isinstance(word, str) for word in val):
        return " ".join(val)
    return None


@pytest.fixture
def base() -> Path:
    """A configuration with every phase."""
    return Path(__file__).parent / "base.toml"


@pytest.fixture
def refused(base):
    """refused(*overrides) -> the message."""

    def message(*overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load(base, list(overrides))
        return str(caught.value)

    return message


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


@pytest.fixture
def source(tmp_path):
    """make(rows, **settings) -> Chats of a file with these rows, parquet or jsonl."""

    def make(rows: list[dict], kind: str = "pointwise", suffix: str = ".jsonl", **settings) -> Chats:
        return Chats(path=write(tmp_path / f"chats{suffix}", rows), kind=kind, **settings)

    return make


@pytest.fixture
def experiment_of(tiny_experiment, source):
    """make(rows, kind, data settings, **settings of the reward model) -> Experiment with rm.x"""

    def make(rows, kind="pointwise", data=None, **settings):
        chats = source(rows, kind, **(data or {})).model_dump()
        values = {"steps": 6, "batch": 8, "optim": {"lr": 1e-2}, "validate_every": 2, **settings}
        return tiny_experiment(rm={"x": {"data": chats, **values}}, checkpoint_every=2)

    return make
