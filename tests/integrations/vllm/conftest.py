"""Engines in this process, one at a time: a test module shares one where it can."""

import pytest

from tests.integrations.vllm import cases


@pytest.fixture
def sampler_of():
    """make(policy, **settings) -> VllmSampler, closed afterwards."""
    made = []

    def make(*given, **settings):
        made.append(cases.sampler(*given, **settings))
        return made[-1]

    yield make
    for sampler in made:
        sampler.close()
