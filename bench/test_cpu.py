"""`pytest bench --benchmark-only`: the CPU cases at sizes that take seconds, naive beside chunked."""

import pytest

pytest.importorskip("pytest_benchmark")

from ipvrm_core.bench.cases import IMPLEMENTATIONS, Case, Shape, check_agreement, make_inputs, step

SHAPE = Shape(N=256, D=64, V=16001)
CASES = [Case(function, frozen, SHAPE) for function in ("distrl_loss", "linear_logprobs") for frozen in (True, False)]


@pytest.fixture(scope="module")
def inputs():
    return make_inputs(SHAPE)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_and_backward(benchmark, inputs, case, implementation):
    check_agreement(case, inputs)
    benchmark.group = case.name
    benchmark.pedantic(step(case, inputs, implementation), rounds=7, warmup_rounds=1)
