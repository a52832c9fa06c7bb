"""Models as a phase saves them: whole or not at all, and readable by everybody else's tools."""

import copy
import json

import pytest
import torch

from ipvrm_core.trainer import checkpoint
from ipvrm_core.trainer.config import Lora
from ipvrm_core.trainer.models import add_lora, add_value_head, load_pretrained, save_model
from ipvrm_core.trainer.models.adapters import merged_weights
from ipvrm_core.trainer.optim import make_optimizer
from tests.trainer.tiny_steps import OPTIM, TOKENIZER, same, suffixes_in, train_step, weights_of


def test_a_saved_model_opens_with_the_auto_classes(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = TOKENIZER, tiny_model(3)
    tmp_path = tmp_path / "models"
    save_model(model, tokenizer, tmp_path / "model")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert same(weights_of(opened), weights_of(model))
    again = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert again("5*5?")["input_ids"] == tokenizer("5*5?")["input_ids"]
    assert again.decode(again("5*5=5;#5")["input_ids"]) == "5*5=5;#5"
    assert (again.eos_token_id, again.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert opened.generation_config.eos_token_id == tokenizer.eos_token_id
    assert suffixes_in(tmp_path) == {".json", ".safetensors"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_lora_is_saved_merged(tiny_model, tmp_path):
    """The saved model needs no peft and gives the logits of the model with its adapters."""
    ids = torch.randint(2, 19, (3, 9), generator=torch.Generator().manual_seed(0))
    plain = tiny_model(3)
    with torch.no_grad():
        before = plain(input_ids=ids).logits.clone()
        wrapped = add_lora(plain, Lora(rank=4, alpha=8.0)).eval()
        torch.testing.assert_close(wrapped(input_ids=ids).logits, before)  # adapters start as nothing
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
        expected = wrapped(input_ids=ids).logits.clone()
        assert (expected - before).abs().max() > 0.1
        save_model(wrapped, TOKENIZER, tmp_path / "model")
        saved = load_pretrained(tmp_path / "model").eval()
        torch.testing.assert_close(saved(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-4)
    assert not any("lora" in name for name, _ in saved.named_parameters())
    assert not list((tmp_path / "model").glob("adapter*"))
    assert "architectures" in json.loads((tmp_path / "model" / "config.json").read_text())


def test_merged_weights_are_those_of_peft_biases_too():
    """By the names of the model without adapters; the adapted layers have biases, as Qwen2's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    wrapped = add_lora(LlamaForCausalLM(LlamaConfig(vocab_size=19, attention_bias=True, **sizes)), Lora(rank=2))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    expected = copy.deepcopy(wrapped).merge_and_unload().state_dict()
    assert sum(name.endswith("_proj.bias") for name in expected) == 4
    torch.testing.assert_close(merged_weights(wrapped), dict(expected))


@pytest.mark.parametrize("value_head", [False, True])
def test_saving_in_the_middle_of_training_changes_nothing(tiny_model, tmp_path, value_head):
    """Adapters are merged into what is saved, not in place: the model goes on as one that was never saved."""
    runs = []
    for saves in (False, True):
        torch.manual_seed(0)
        model = add_lora(tiny_model(3), Lora(rank=4, alpha=8.0))
        if value_head:
            with torch.no_grad():
                add_value_head(model).weight.normal_(generator=torch.Generator().manual_seed(4))
        optimizer = make_optimizer(model, OPTIM)
        for step in (1, 2):
            train_step(model, optimizer, step)
        if saves:
            before, names = weights_of(model), [name for name, _ in model.named_modules()]
            save_model(model, TOKENIZER, tmp_path / "model")
            assert same(weights_of(model), before)
            assert [name for name, _ in model.named_modules()] == names
            expected = copy.deepcopy(model).merge_and_unload()
        for step in (3, 4):
            train_step(model, optimizer, step)
        runs.append(weights_of(model))
    assert same(*runs)
    assert not same(runs[1], before)
    saved, expected = weights_of(load_pretrained(tmp_path / "model")), weights_of(expected)
    assert sorted(saved) == sorted(expected)
    assert ("value_head.weight" in saved) == value_head
    for name, weight in expected.items():
        torch.testing.assert_close(saved[name], weight, rtol=0, atol=1e-6)


def test_only_adapters_are_trainable_and_in_the_checkpoint(tiny_model, tmp_path):
    wrapped = add_lora(tiny_model(), Lora(rank=2))
    names = checkpoint.trainable(wrapped).keys()
    assert names
    assert all("lora_" in name for name in names)
    assert not any("lm_head" in name or "embed" in name for name in names)
    assert all(parameter.dtype == torch.float32 for parameter in checkpoint.trainable(wrapped).values())


def test_a_crash_while_saving_the_model_leaves_none(tiny_model, tmp_path, monkeypatch):
    def crash(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(TOKENIZER), "save_pretrained", crash)
        with pytest.raises(KeyboardInterrupt):
            save_model(tiny_model(), TOKENIZER, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    save_model(tiny_model(), TOKENIZER, tmp_path / "model")
    assert load_pretrained(tmp_path / "model") is not None
