"""With a GPU every tensor of these tests is made on it, and the default backend is triton (not in the interpreter)."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    from ipvrm_core.bench.interpreter import patch_once

    patch_once()


@pytest.fixture(autouse=True)
def default_device():
    if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        yield
        return
    torch.set_default_device("cuda")
    yield
    torch.set_default_device("cpu")
