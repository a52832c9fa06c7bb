"""A policy's weights by the names that an engine takes, and the comparison with those that an engine has."""

import copy

import pytest
import torch

from ipvrm_core.trainer.config import Lora
from ipvrm_core.trainer.models import add_lora
from ipvrm_core.trainer.sampling.weights import differing_weights, weights_of

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


def untied(model):
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    return type(model)(config)


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_a_head_is_handed_over_once(tiny_model, head):
    model = tiny_model() if head == "tied" else untied(tiny_model())
    names = [name for name, _ in weights_of(model, adapted=False)]
    assert names == list(dict.fromkeys(names))
    assert "model.embed_tokens.weight" in names
    assert ("lm_head.weight" in names) == (head == "untied")


def test_adapters_are_left_out_or_merged(tiny_model):
    plain = dict(weights_of(copy.deepcopy(tiny_model()), adapted=False))
    adapted = add_lora(tiny_model(), Lora(rank=2, alpha=4.0))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.3)
    base, merged = (dict(weights_of(adapted, adapted=apart)) for apart in (True, False))
    assert base.keys() == merged.keys() == plain.keys()
    assert all(base[name].equal(plain[name]) for name in plain)
    changed = {name for name in plain if not merged[name].equal(plain[name])}
    assert changed == {name for name in plain if "_proj." in name}
    merged_by_peft = adapted.merge_and_unload().state_dict()
    assert all(torch.allclose(merged[name], merged_by_peft[name], atol=1e-6) for name in merged)


def test_weights_are_compared_part_by_part():
    ours = {f"a.{part}_proj.weight": torch.randn(2, 3) for part in "qkv"} | {"e.weight": torch.randn(5, 3)}
    theirs = {
        "a.qkv_proj.base_layer.weight": torch.cat([ours[f"a.{part}_proj.weight"] for part in "qkv"]),
        "e.weight": torch.cat([ours["e.weight"], torch.zeros(3, 3)]),  # padded
        "b.scale": torch.ones(1),
    }
    assert differing_weights(theirs, FUSED, ours) == ([], ["b.scale"])
    theirs["a.qkv_proj.base_layer.weight"][4] += 1e-6
    theirs["e.weight"][0, 0] += 1
    assert differing_weights(theirs, FUSED, ours) == (["a.qkv_proj.weight", "e.weight"], ["b.scale"])
