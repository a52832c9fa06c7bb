"""The engine itself: its size, its precision, what it refuses, and how its end is told."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ipvrm_core.trainer.sampling.base import Drawing
from ipvrm_core.trainer.sampling.engine import EngineError
from tests.integrations.vllm import cases

PROMPTS = cases.prompts()


def test_an_answer_is_not_cut_because_the_engine_is_smaller_than_the_model(sampler_of):
    made = sampler_of(cases.policy("tied"), context=32)
    assert len(made.sample([[5] * 8], cases.GREEDY)) == 1
    with pytest.raises(ValueError, match=r"the engine has 32 positions .* prompt of 9 tokens and max_new_tokens = 24"):
        made.sample([[5] * 9], cases.GREEDY)


def test_the_positions_are_those_of_the_model_or_what_the_cache_holds(sampler_of):
    """A token's keys and values are 2 layers x 2 x 32 numbers of 4 bytes: 2,097 tokens in a thousandth of a GiB."""
    large = cases.policy("tied", context=4096)
    made = sampler_of(large, cache_gib=0.001)
    assert 1024 <= made.context <= 2097
    with pytest.raises(ValueError, match=r"what cache_gib holds\); got a prompt of 8 tokens and max_new_tokens = 3000"):
        made.sample([[5] * 8], Drawing(max_new_tokens=3000))
    made.close()
    assert sampler_of(large, cache_gib=0.01).context == large.positions == 4096


def test_an_engine_in_bfloat16_is_near_and_told_apart_from_another_policy(sampler_of):
    policy = cases.policy("tied", temperature=0.7)
    made = sampler_of(policy, dtype="bfloat16")
    made.rest()  # without a GPU nothing happens, and it wakes by itself
    drawn = made.sample(PROMPTS, Drawing(4, policy.temperature, max_new_tokens=16))
    assert cases.EXACT < cases.furthest(policy, drawn) < 0.5


def test_the_engines_death_is_told_with_its_last_words(sampler_of):
    """Its embedding loses its rows: the next forward inside the engine fails."""
    sampler = sampler_of(cases.policy("untied"))

    def wound(worker):
        embedding = worker.model_runner.model.model.embed_tokens
        embedding.weight = torch.nn.Parameter(torch.zeros(1, 1), requires_grad=False)

    sampler.engine.ask(wound)
    with pytest.raises(EngineError, match=r"vLLM's engine could not sample: \w+Error: .+") as caught:
        sampler.sample(PROMPTS, cases.DRAWN)
    assert caught.value.__cause__ is not None
    with pytest.raises(EngineError, match=r"vLLM's engine is dead: \w+Error: "):
        sampler.sample(PROMPTS, cases.DRAWN)


def test_what_another_thread_samples_is_stopped(sampler_of):
    """4,000 answers of 80 tokens take minutes."""
    sampler = sampler_of(cases.policy("untied"))
    with ThreadPoolExecutor(1) as thread:
        begun = time.perf_counter()
        made = thread.submit(sampler.sample, PROMPTS[:1], Drawing(4000, max_new_tokens=80))
        time.sleep(2)
        assert not made.done()
        sampler.stop()
        with pytest.raises(EngineError, match="could not sample: RuntimeError: it was stopped"):
            made.result()
    assert time.perf_counter() - begun < 30


def test_an_architecture_that_vllm_does_not_have_is_refused_by_name(sampler_of):
    policy = cases.policy("untied")

    class OwnForCausalLM(type(policy.model)):
        pass

    policy.model.__class__ = OwnForCausalLM
    with pytest.raises(EngineError, match=r"(?s)could not start with OwnForCausalLM: .*OwnForCausalLM'\] are not supp"):
        sampler_of(policy)


def test_a_rank_that_vllm_does_not_take_is_refused(sampler_of):
    policy = cases.policy("tied-lora")
    policy.model.peft_config["default"].r = 1000
    with pytest.raises(EngineError, match=r"(?s)could not start with Qwen3ForCausalLM: .*max_lora_rank"):
        sampler_of(policy)


def test_two_engines_one_after_the_other(sampler_of):
    policy = cases.policy("tied")
    first = sampler_of(policy)
    answers = first.sample(PROMPTS, Drawing(1, 0.0, max_new_tokens=8))
    first.close()
    assert sampler_of(policy).sample(PROMPTS, Drawing(1, 0.0, max_new_tokens=8)) == answers
    with pytest.raises(EngineError, match="is dead: it was closed"):
        first.sample(PROMPTS, cases.GREEDY)


def test_a_second_engine_beside_a_first_is_refused(sampler_of):
    first = sampler_of(cases.policy("tied"))
    with pytest.raises(EngineError, match="one at a time in a process"):
        sampler_of(cases.policy("tied"))
    assert len(first.sample(PROMPTS, cases.GREEDY)) == len(PROMPTS)
