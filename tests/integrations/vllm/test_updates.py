"""After an update the engine samples from the new weights, whole or as an adapter; and the probe that makes sure."""

from pathlib import Path

import pytest
import torch

from ipvrm_core.heads import causal_lm
from ipvrm_core.trainer.sampling import engine as engine_module
from ipvrm_core.trainer.sampling.probe import ProbeError
from tests.integrations.vllm import cases

PROMPTS = cases.prompts(6)


def drawn(sampler):
    torch.manual_seed(5)
    return sampler.sample(PROMPTS, cases.DRAWN)


@pytest.mark.parametrize(
    ("name", "how"), [("tied", "whole"), ("untied", "whole"), ("tied-lora", "adapter"), ("untied-lora", "merged")]
)
def test_every_update_arrives(sampler_of, name, how):
    policy = cases.policy(name)
    sampler = sampler_of(policy, **({} if how == "whole" else {"lora": how}))
    seen = [drawn(sampler)]
    assert cases.furthest(policy, seen[0]) < cases.EXACT
    for _ in range(2):
        cases.move(policy)
        sampler.sync(policy)
        seen.append(drawn(sampler))
        assert cases.furthest(policy, seen[-1]) < cases.EXACT
        assert [one.response_ids for one in seen[-1]] != [one.response_ids for one in seen[-2]]
        # and they are not those of the policy before
        assert cases.furthest(policy, seen[-2]) > 100 * cases.EXACT
    assert drawn(sampler) == seen[-1]


def test_another_policy_of_the_same_architecture_arrives(sampler_of):
    first, second = cases.policy("tied-lora"), cases.policy("tied-lora")
    causal_lm(second.model).requires_grad_(True)  # its base moves too, as that of another run
    cases.move(second)
    sampler = sampler_of(first)
    sampler.sync(second)
    assert cases.furthest(second, drawn(sampler)) < cases.EXACT


def test_an_adapter_leaves_nothing_behind_in_memory(sampler_of):
    folder = Path("/dev/shm")
    before = set(folder.glob("ipvrm-adapter-*"))
    sampler = sampler_of(cases.policy("tied-lora"))
    for _ in range(3):
        sampler.sync(cases.policy("tied-lora"))
    assert len(set(folder.glob("ipvrm-adapter-*")) - before) == 1
    sampler.close()
    assert set(folder.glob("ipvrm-adapter-*")) - before == set()


def test_the_probe_names_the_weights_that_differ(sampler_of):
    """A layer that the engine does not get: the run stops, with its name."""
    policy = cases.policy("untied")
    sampler = sampler_of(policy)
    cases.move(policy)
    kept = dict(sampler.engine.weights())
    old = kept["model.layers.1.mlp.gate_up_proj.weight"].clone()
    load = sampler.engine.load

    def forgetful(weights):
        load(weights)
        sampler.engine.weights()["model.layers.1.mlp.gate_up_proj.weight"].data.copy_(old)

    sampler.engine.load = forgetful
    with pytest.raises(ProbeError) as caught:
        sampler.sync(policy)
    message = str(caught.value)
    assert "Weights that differ: model.layers.1.mlp.gate_up_proj.weight." in message
    assert "apart in the mean over 32 tokens (generation.vllm.tolerance is 0.001)" in message
    assert "most at the token" in message
    sampler.engine.load = load
    sampler.sync(policy)
    assert cases.furthest(policy, drawn(sampler)) < cases.EXACT


def test_the_probe_sees_an_update_that_never_came(sampler_of):
    policy = cases.policy("tied")
    sampler = sampler_of(policy)
    cases.move(policy, 0.02)
    sampler.engine.load = lambda weights: None
    with pytest.raises(ProbeError, match=r"Weights that differ: model.embed_tokens.weight, .* \.\.\."):
        sampler.sync(policy)


def test_the_tolerance_is_a_setting(sampler_of):
    policy = cases.policy("tied")
    with pytest.raises(ProbeError, match="engine computes with a packed copy, or otherwise"):
        sampler_of(policy, dtype="bfloat16", tolerance=1e-9)


def test_the_trap_of_the_tied_head(monkeypatch):
    """With oneDNN's packed copies vLLM keeps the old head: why they are switched off, and the probe sees it."""
    import vllm._custom_ops as ops

    without = engine_module._import

    def packed():
        vllm = without()
        monkeypatch.setattr(ops, "_supports_onednn", True)
        return vllm

    monkeypatch.setattr(engine_module, "_import", packed)
    with pytest.raises(ProbeError, match="computes with a packed copy"):
        cases.sampler(cases.policy("tied"))
