"""Answers end to end in one row: what is computed of them is what is computed of each alone."""

import json

import pytest
import torch

from ipvrm_core import PolicyBatch, PolicyLossConfig
from ipvrm_core.trainer.batching import Answer, TokenBatch, micro_batches
from ipvrm_core.trainer.config import Lora
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.models import add_lora, can_pack, character_tokenizer, checkpoint_activations, save_model
from ipvrm_core.trainer.sampling.base import Drawing
from ipvrm_core.trainer.sampling.generate import Generate
from tests.batches import with_value_head
from tests.sizes import SIZES

LENGTHS = [(3, 4), (1, 1), (6, 20), (2, 8), (5, 5)]
TOKENS = torch.Generator().manual_seed(1)
ANSWERS = [Answer(*(torch.randint(3, 19, (n,), generator=TOKENS).tolist() for n in pair)) for pair in LENGTHS]
N = sum(response for _, response in LENGTHS)


def make(name: str, dtype=torch.float32, **more):
    """Grouped heads, so that keys are repeated; two layers, so that what leaks in one is read in the next."""
    import transformers

    torch.manual_seed(0)
    sizes = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "hidden_size": 32}
    config = getattr(transformers, f"{name}Config")(**sizes, initializer_range=0.2, **more)
    return getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)


def test_a_packed_batch_by_hand():
    answers = [Answer([5, 6, 7], [8, 1]), Answer([4], [3, 2, 9, 1]), Answer([5, 5], [1])]
    batch = TokenBatch.make(answers, packed=True)
    assert batch.ids_BL.tolist() == [[5, 6, 7, 8, 4, 3, 2, 9, 5, 5]]  # the last token of each predicts nothing
    assert batch.positions_1L.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 0, 1]]
    assert batch.bounds.tolist() == [[[[0, 4, 8, 10]]]]
    assert batch.rows_N.tolist() == [2, 3, 4, 5, 6, 7, 9]
    assert batch.targets_N.tolist() == [8, 1, 3, 2, 9, 1, 1]
    after = TokenBatch.make(answers, packed=True, after=True)
    assert after.ids_BL[0][after.rows_N].tolist() == after.targets_N.tolist()
    with pytest.raises(ValueError, match="no mask to hide a token in; got unseen = 5"):
        TokenBatch.make(answers, packed=True, unseen=5)


def test_micro_batches_are_measured_without_padding():
    answers = [Answer([1] * 2, [1] * 8), *[Answer([1], [1])] * 5]  # 10 tokens, then five times 2
    assert [part.stop - part.start for part in micro_batches(answers, 20)] == [2, 4]
    assert [part.stop - part.start for part in micro_batches(answers, 20, packed=True)] == [6]
    assert [part.stop - part.start for part in micro_batches(answers, 12, unit=2, packed=True)] == [2, 4]


def _run(model, packed: bool) -> tuple[dict, dict]:
    """({what: value}, gradients of everything trained) of log-probs and of the policy's loss."""
    made = LanguageModel(model.train(), temperature=0.7, packed=packed)
    batch = made.batch(ANSWERS)
    logprobs_N = made.batch_logprobs(batch)
    logprobs_N.square().mean().backward()
    ids_NS = torch.stack([batch.targets_N, (batch.targets_N + 1) % 19], dim=1)
    with torch.no_grad():
        old_NS = made.batch_slot_logprobs(batch, ids_NS)
    advantages_NS = torch.linspace(-1, 1, 2 * N, dtype=old_NS.dtype).view(N, 2)
    rows = PolicyBatch.of(ids_NS, old_NS - 0.1, advantages_NS, batch.cu_seqlens)
    loss, metrics = made.policy_loss(batch, rows, PolicyLossConfig(alpha=0.5, entropy_coef=0.1))
    loss.backward()
    values = {"log-probs": logprobs_N.detach(), "loss": loss.detach(), **metrics}
    return values, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("name", ["Qwen3", "Llama"])
def test_packing_changes_nothing(name, dtype, error, lora, checkpointing):
    """Log-probs and losses, and every gradient by the largest of all."""
    found = []
    for packed in (False, True):
        model = make(name, dtype)
        if lora:
            torch.manual_seed(2)
            model = add_lora(model, Lora(rank=4, alpha=8.0)).to(dtype)
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if "lora_B" in key:
                        parameter.normal_(std=0.1)
        if checkpointing:
            checkpoint_activations(model)
        found.append(_run(can_pack(model) if packed else model, packed))
    (values, gradients), (packed_values, packed_gradients) = found
    assert gradients.keys() == packed_gradients.keys()
    assert len(gradients) > 10
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for key, value in values.items():
        torch.testing.assert_close(packed_values[key], value, rtol=error, atol=error)
    for key, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[key], gradient, rtol=0, atol=error * max(1.0, largest))


def test_scores_without_a_gradient(tiny_model):
    """Several packed micro-batches, and a value head, which reads the last token too."""
    plain = LanguageModel(with_value_head(tiny_model()))
    packed = LanguageModel(can_pack(with_value_head(tiny_model())), packed=True, max_tokens=20)
    assert len(list(packed.parts(ANSWERS))) == 3
    torch.testing.assert_close(packed.logprobs(ANSWERS), plain.logprobs(ANSWERS), rtol=0, atol=1e-5)
    torch.testing.assert_close(packed.values(ANSWERS), plain.values(ANSWERS), rtol=0, atol=1e-5)


def test_sampling_is_as_before(tiny_model):
    """Prompts of unequal lengths, padded on the left, with a cache."""
    tokenizer, drawing = character_tokenizer("0123456789+-*=?;#"), Drawing(2, temperature=0, max_new_tokens=9)
    made = [
        Generate(LanguageModel(model), tokenizer).sample([[3, 4, 5], [6]], drawing)
        for model in (tiny_model(), can_pack(tiny_model()))
    ]
    assert [one.response_ids for one in made[0]] == [one.response_ids for one in made[1]]


def test_models_that_cannot_pack():
    windowed = can_pack(make("Qwen3", use_sliding_window=True, sliding_window=12, max_window_layers=0))
    packed = LanguageModel(windowed, packed=True)
    with pytest.raises(ValueError, match="needs full attention: 25 tokens, a window of 12"):
        packed.logprobs(ANSWERS)
    from transformers import MambaConfig, MambaForCausalLM

    recurrent = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ValueError, match="a model of attention alone; MambaForCausalLM is another"):
        can_pack(recurrent)
    mixing = make("Llama")  # a convolution over neighbours
    mixing.model.layers[0].register_forward_hook(lambda _module, _args, hidden: hidden + hidden.roll(1, dims=1))
    with pytest.raises(ValueError, match="sequences can stand in one row; those of LlamaForCausalLM see each other"):
        can_pack(mixing)


def test_a_saved_model_knows_nothing_of_it(tiny_model, tmp_path):
    save_model(can_pack(tiny_model()), character_tokenizer("0123456789+-*=?;#"), tmp_path / "model")
    assert "ipvrm" not in json.dumps(json.loads((tmp_path / "model/config.json").read_text()))
