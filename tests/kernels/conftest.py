"""The kernels on what is here: a GPU, or the Triton interpreter on the CPU (`make test` sets TRITON_INTERPRET=1)."""

import os
import random

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it in deterministic mode
GPU = torch.cuda.is_available()
INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETER:
    from ipvrm_core.bench.interpreter import patch_once

    patch_once()


def pytest_collection_modifyitems(items):
    if GPU or INTERPRETER:
        return
    here = os.path.dirname(__file__) + os.sep
    skip = pytest.mark.skip(reason="needs a GPU, or TRITON_INTERPRET=1 as in `make test`")
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(skip)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETER else "cuda")


@pytest.fixture(autouse=True)
def nan_memory():
    """Fresh memory is NaN (integers: the largest), so an element that no kernel wrote cannot pass for a result."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def seed(request) -> int:
    """Fresh inputs in every run; a failing test prints its seed, and IPVRM_TEST_SEED=<seed> repeats it."""
    number = int(os.environ.get("IPVRM_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"IPVRM_TEST_SEED={number}")
    torch.manual_seed(number)
    return number
