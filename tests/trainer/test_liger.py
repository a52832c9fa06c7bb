"""Liger's layers: which parts they replace, values and gradients in Triton's interpreter, what is refused."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from ipvrm_core.trainer.config import ConfigError, load
from ipvrm_core.trainer.models import liger_layers
from ipvrm_core.trainer.plan.blank import Blank
from ipvrm_core.trainer.preflight import preflight

# Its rotary embedding alone: the norms take a function from CUDA's library, which the interpreter does not have. In a
# process of its own, since the embedding is replaced for all models of a kind.
STEP = """
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from ipvrm_core.bench.interpreter import patch_once
from ipvrm_core.trainer.models import liger_layers

patch_once()
torch.manual_seed(0)
sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
model = Qwen3ForCausalLM(Qwen3Config(vocab_size=40, intermediate_size=48, **sizes))
plain, ids = model.forward, torch.randint(0, 40, (2, 7))

def gradients():
    model.zero_grad()
    (model(input_ids=ids).logits ** 2).mean().backward()
    return [p.grad.clone() for p in model.parameters()]

before = gradients()
assert liger_layers(model, rms_norm=False, swiglu=False) is model and model.forward == plain
from transformers.models.qwen3 import modeling_qwen3
assert modeling_qwen3.apply_rotary_pos_emb.__module__.startswith("liger_kernel")
print(max((a - b).abs().max().item() for a, b in zip(before, gradients(), strict=True)), before[0].abs().max().item())

liger_layers(model)
layer = model.model.layers[0]
assert type(layer.mlp).forward is not layer.mlp.forward.__func__ and "liger" in layer.mlp.forward.__module__
norms = layer.input_layernorm, layer.self_attn.q_norm, model.model.norm
assert all("liger" in norm.forward.__module__ for norm in norms)
assert model.forward == plain
"""


def test_the_same_numbers_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", STEP], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    difference, largest = map(float, ran.stdout.split())
    assert difference < 1e-6 * max(1, largest)
    assert largest > 1e-4


def test_a_kind_of_model_that_liger_does_not_know():
    class Made(torch.nn.Module):
        base_model_prefix, config = "model", SimpleNamespace(model_type="made_up")

    with pytest.raises(ValueError, match=r"no layers for models of the kind 'made_up'; it has some for .*llama.*qwen3"):
        liger_layers(Made())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_liger_without_a_gpu(base, tmp_path):
    config = load(base, ["model.liger=true"])
    with pytest.raises(ConfigError, match=r"model.liger = true needs a GPU"):
        preflight(config, tmp_path)


def test_liger_without_its_package(base, tmp_path, monkeypatch):
    monkeypatch.setattr("ipvrm_core.trainer.models.liger.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package liger-kernel.*ipvrm-core\[liger\]"):
        preflight(load(base, ["model.liger=true"]), tmp_path)


def test_a_plan_counts_the_layers_of_transformers(base):
    assert not Blank(load(base, ["model.liger=true"]), None, torch.device("cpu")).config.model.liger
