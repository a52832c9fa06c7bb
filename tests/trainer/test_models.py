"""The output head that the trainer hands to the fused functions is the model's own."""

import pytest
import torch

from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.models import check_head
from tests.batches import full_logits
from tests.sizes import SIZES


def make(name: str, **more):
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SIZES, **more)).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(40)  # so that a soft cap bends the logits
    return model


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("Gemma2", {"final_logit_softcapping": 5.0}),
        ("Granite", {"logits_scaling": 3.0}),
        ("Cohere", {"logit_scale": 0.25, "use_qk_norm": False}),
    ],
)
def test_soft_cap_and_scale_of_a_model_reach_its_log_probs(name, more):
    model = LanguageModel(make(name, **more), temperature=0.7)
    answers = [Answer([3, 4], list(range(5, 12)))]
    with torch.no_grad():
        logits = full_logits(model, answers)
    if name == "Gemma2":
        assert 4 < logits.abs().max() <= 5
    ids = torch.tensor(answers[0].response_ids)[:, None]
    expected = (logits / 0.7).log_softmax(-1).gather(1, ids)[:, 0]
    torch.testing.assert_close(model.logprobs(answers), expected, rtol=1e-5, atol=1e-5)
    check_head(model.model)


def test_a_head_that_does_more_is_refused():
    model = make("Llama")
    model.lm_head.register_forward_hook(lambda _module, _args, logits: logits.exp())
    with pytest.raises(ValueError, match=r"LlamaForCausalLM does more in its head than .* \(log-probs differ by"):
        check_head(model)
    both = make("Gemma2", final_logit_softcapping=5.0)
    both.config.logit_scale = 0.5
    with pytest.raises(ValueError, match=r"logit scale \(0.5\) and a soft cap \(5\)"):
        check_head(both)
