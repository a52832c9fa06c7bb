"""The output head that the trainer hands to the fused functions is the model's own."""

import pytest
import torch

from ipvrm_core import linear_logprobs
from ipvrm_core.trainer.models import check_head, head_of, hidden_states

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make(name: str, **more):
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SIZES, **more)).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(40)  # so that a soft cap bends the logits
    return model


def test_a_soft_cap_is_applied():
    model = make("Gemma2", final_logit_softcapping=5.0)
    ids = torch.arange(10)[None]
    head = head_of(model)
    assert head.softcap == 5.0
    logits = model(input_ids=ids).logits[0]
    assert 4 < logits.abs().max() <= 5
    hidden = hidden_states(model, ids, torch.ones_like(ids))[0]
    ours = linear_logprobs(hidden, head.weight, ids.T, **head.options).logprobs_NK
    torch.testing.assert_close(ours, logits.log_softmax(-1).gather(1, ids.T), rtol=1e-5, atol=1e-5)
    check_head(model)


def test_a_head_that_does_more_is_refused():
    check_head(make("Granite", logits_scaling=1.0))
    with pytest.raises(ValueError, match=r"GraniteForCausalLM does more in its head .*logit scaling is not supported"):
        check_head(make("Granite", logits_scaling=3.0))
