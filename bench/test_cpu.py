"""`pytest bench --benchmark-only`: the CPU cases at sizes that take seconds, naive beside chunked."""

import pytest

pytest.importorskip("pytest_benchmark")

from ipvrm_core.bench.cases import Shape
from ipvrm_core.bench.cpu import IMPLEMENTATIONS, cases, check_agreement, step


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", cases(Shape(N=256, D=64, V=16001)), ids=lambda case: case.name)
def test_forward_and_backward(benchmark, case, implementation):
    problem = case.problem()
    check_agreement(case, problem)
    benchmark.group = case.name
    benchmark.pedantic(step(case, problem, implementation), rounds=7, warmup_rounds=1)
