"""`ipvrm plan` counts what a real engine holds."""

import pytest
import torch

from ipvrm_core.trainer.config import Vllm
from ipvrm_core.trainer.plan.engine import Engine
from tests.integrations.vllm import cases

STACKED = ("lora_a_stacked", "lora_b_stacked")


def held(worker) -> tuple[int, int]:
    """Bytes of weights with the adapters' room, and of keys and values."""
    runner = worker.model_runner
    found = [getattr(layer, name, ()) for layer in runner.model.modules() for name in STACKED]
    rooms = [room for each in found for room in ([each] if isinstance(each, torch.Tensor) else each)]
    weights = sum(weight.nbytes for weight in [*runner.model.parameters(), *rooms])
    return weights, sum(cache.nbytes for cache in runner.kv_caches)


@pytest.mark.parametrize(
    ("name", "dtype", "settings"),
    [
        ("tied", "float32", {}),
        ("untied", "bfloat16", {}),
        ("tied-lora", "float32", {}),
        ("untied-lora", "float32", {"lora": "merged", "cache_gib": 0.2}),
    ],
)
def test_the_parts_of_an_engine_are_those_of_the_plan(sampler_of, name, dtype, settings):
    policy = cases.policy(name)
    made = sampler_of(policy, dtype=dtype, **settings)
    planned = Engine.of(policy.model, Vllm(**{**cases.SMALL, **settings}), dtype, rests=True)
    weights, cache = made.engine.ask(held)
    assert planned.weights == weights
    assert 0.98 * planned.cache < cache <= planned.cache
