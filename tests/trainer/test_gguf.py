"""What a GGUF file needs is said, and nothing else needs it."""

import sys
from types import ModuleType

import pytest
import transformers

from ipvrm_core.trainer.models import load, load_pretrained


@pytest.fixture
def older(monkeypatch):
    """transformers without GgufConfig, as before 5.17."""

    def attribute(name: str):
        if name == "GgufConfig":
            raise AttributeError(name)
        return getattr(transformers, name)

    module = ModuleType("transformers")
    module.__getattr__ = attribute
    monkeypatch.setitem(sys.modules, "transformers", module)


def test_an_older_transformers_is_named(older, monkeypatch, tmp_path):
    monkeypatch.setattr(load, "find_spec", lambda _: object())  # the package gguf is there
    with pytest.raises(ValueError, match=r"x.gguf needs transformers >= 5.17; got 5\.\d+"):
        load_pretrained(tmp_path, gguf_file="x.gguf")


def test_an_older_transformers_loads_everything_else(older, tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    assert load_pretrained(tmp_path / "model").config.hidden_size == 32
