"""A function run inside the model's own forward sees the model's own hidden states and head, however it is wrapped."""

import copy

import pytest
import torch

import ipvrm_core as ic
from ipvrm_core import PolicyLossConfig, linear_logprobs
from ipvrm_core.heads import Head, at_forward, attach, causal_lm, head_of
from tests.ranks import run_ranks
from tests.sizes import SIZES

IDS = torch.arange(3, 13).view(2, 5)


def make(name: str = "Llama", **more):
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SIZES, **more)).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(40)  # so that a soft cap bends the logits
    return model


def logprobs(hidden_BLD, head):
    """Of the tokens themselves at every position: [B * L]."""
    ids = IDS.flatten()[:, None]
    return linear_logprobs(hidden_BLD.flatten(0, 1), head.weight, ids, **head.options()).logprobs_NK[:, 0]


def plain(logits_BLV):
    return logits_BLV.flatten(0, 1).float().log_softmax(-1).gather(1, IDS.flatten()[:, None])[:, 0]


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("Llama", {}),
        ("Qwen3", {"tie_word_embeddings": True}),
        ("Gemma2", {"final_logit_softcapping": 5.0}),
        ("Granite", {"logits_scaling": 3.0}),
        ("Cohere", {"logit_scale": 0.25, "use_qk_norm": False}),
    ],
)
def test_at_head_makes_the_models_own_logprobs(name, more):
    model = make(name, **more)
    expected = plain(model(input_ids=IDS).logits)
    torch.testing.assert_close(attach(model)(input_ids=IDS, at_head=logprobs), expected, rtol=1e-5, atol=1e-5)


def test_at_forward_takes_the_hidden_states_of_the_frameworks_own_forward():
    model = make()
    backbone = []
    model.model.register_forward_hook(lambda *_: backbone.append(1))
    with at_forward(model, logprobs) as found, at_forward(model, lambda hidden, head: head.weight.shape) as inner:
        logits = model(input_ids=IDS).logits
    assert (found, inner, len(backbone)) == ([], [(50, 16)], 1)  # the inner one is the one asked
    with at_forward(model, logprobs) as found:
        logits = model(input_ids=IDS).logits
        model(input_ids=IDS)
    assert len(found) == 2
    torch.testing.assert_close(found[0], plain(logits), rtol=1e-5, atol=1e-5)
    model(input_ids=IDS)
    assert len(found) == 2  # nothing is collected outside


def test_an_error_inside_leaves_the_model_as_it_was():
    model = attach(make())
    with pytest.raises(RuntimeError, match="mine"), at_forward(model, logprobs):
        raise RuntimeError("mine")
    assert model(input_ids=IDS).logits.shape == (2, 5, 50)
    assert not model.model._forward_hooks


def test_an_attached_model_still_generates_and_a_copy_is_its_own():
    model = attach(attach(make()))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert other(input_ids=IDS).logits.abs().max() == 0
    assert other(input_ids=IDS, at_head=lambda _, head: head.weight).abs().max() == 0
    assert model(input_ids=IDS).logits.abs().max() > 0
    assert model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False).shape == (2, 8)


def test_adapters_in_the_layers_are_active_and_on_the_head_refused():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    expected = plain(model(input_ids=IDS).logits)
    torch.testing.assert_close(attach(model)(input_ids=IDS, at_head=logprobs), expected, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert (model(input_ids=IDS, at_head=logprobs) - expected).abs().max() > 1e-3
    assert causal_lm(model) is model.base_model.model

    with_head = get_peft_model(make(), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="output head has adapters"):
        head_of(with_head)


def test_lora_on_the_head_is_one_product():
    """W + s B A by autograd, in float64: values and all four gradients."""
    shapes = (7, 5), (30, 5), (2, 5), (30, 2)
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    hidden, weight, A, B = given
    ids, results = torch.randint(30, (7, 3)), []
    for head in (ic.with_lora(*given, 0.5), (hidden, weight + 0.5 * B @ A)):
        loss = ic.linear_logprobs(*head, ids).logprobs_NK.square().sum()
        results.append([loss.detach(), *torch.autograd.grad(loss, given)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match=r"A and B must be \[r, D = 5\] and \[V = 30, r\]; got \(2, 5\), \(29, 2\)"):
        ic.with_lora(hidden, weight, A, B[1:])


def test_the_loss_has_the_scale_in_its_temperature():
    """scale l / T = l / (T / scale); the other settings stay."""
    settled = Head(torch.zeros(3, 2), scale=4.0).settle(PolicyLossConfig(alpha=0.3), temperature=0.5)
    assert settled == PolicyLossConfig(alpha=0.3, temperature=0.125)
    assert Head(torch.zeros(3, 2), softcap=5.0).settle(PolicyLossConfig()) == PolicyLossConfig(softcap=5.0)


def test_a_scale_beside_a_soft_cap_is_refused():
    model = make("Gemma2", final_logit_softcapping=5.0)
    model.config.logit_scale = 0.5
    with pytest.raises(ValueError, match=r"logit scale \(0.5\) and a soft cap \(5\)"):
        head_of(model)


def _ranks(rank: int, expected: dict[str, torch.Tensor], loss: float) -> None:
    """One sequence a rank; the mean over ranks must be the gradient of the whole batch."""
    from torch.distributed import init_process_group
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    init_process_group("gloo")

    def mean(hidden_BLD, head):
        ids = IDS[rank][:, None]
        return -linear_logprobs(hidden_BLD[0], head.weight, ids, **head.options()).logprobs_NK.mean()

    def sharded():
        model = attach(make())
        fully_shard(model.model.layers[0])
        return fully_shard(model)

    for wrap in (lambda: DistributedDataParallel(attach(make())), sharded):
        model = wrap()
        own = model(input_ids=IDS[rank : rank + 1], at_head=mean)
        own.backward()
        total = own.detach().clone()
        torch.distributed.all_reduce(total)
        torch.testing.assert_close(total.item() / 2, loss, rtol=1e-5, atol=1e-5)
        for name, parameter in causal_lm(model).named_parameters():
            grad = parameter.grad
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)


def test_ddp_and_fsdp2_reduce_the_gradient_of_the_head():
    model = make()
    loss = -attach(model)(input_ids=IDS, at_head=logprobs).mean()
    loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    run_ranks(_ranks, expected, loss.item())
