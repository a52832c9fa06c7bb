"""Padded [B, T] advantages are the library's packed ones, whatever the padding, the holes and the reward model."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ipvrm_core as ic
from ipvrm_core import estimators
from ipvrm_core.integrations.advantages import token_advantages, token_rewards
from tests.sizes import SIZES

B, P, T = 4, 3, 6
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 0, 0, 1, 1, 1], [1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 0]])
REWARDS, GROUPS = torch.tensor([1.0, 0.0, 1.0, 0.25]), ["a", "a", "b", "b"]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """ids [B, L] and the attention mask: prompts padded on the left, answers on the right, tool outputs attended to."""
    ids = torch.randint(3, 50, (B, P + T), generator=torch.Generator().manual_seed(0))
    attention = torch.ones_like(ids)
    attention[0, :2] = 0
    attention[0, P + 4 :] = attention[2, P + 2 :] = attention[3, P + 5 :] = 0
    return ids, attention


def model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    made = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    with torch.no_grad():
        made.lm_head.weight.mul_(40)
    return made


@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_token_rewards_are_td_errors_of_full_logits(chunk):
    ids, attention = batch()
    old = -torch.rand(B, T, generator=torch.Generator().manual_seed(2)) * 4
    found = token_rewards(model(), ids, attention, MASK, old, beta=2.0, temperature=0.7, batch=chunk)
    with torch.no_grad():
        logp = (model()(ids, attention_mask=attention).logits / 0.7).log_softmax(-1)[:, P - 1 : -1]
    logp = logp.gather(-1, ids[:, P:, None])[..., 0]
    torch.testing.assert_close(found, 2 * (logp - old) * MASK, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", estimators.names())
def test_padded_advantages_are_the_packed_ones(name):
    rewards_BT = torch.randn(B, T, generator=torch.Generator().manual_seed(3)) * (1 + 100 * (1 - MASK))
    outcome = estimators.find(name).outcomes[0]
    method = replace(ic.METHODS["paper"], estimator=name, outcome=outcome, process_coef=0.5)
    found = token_advantages(rewards_BT, MASK, REWARDS, GROUPS, method)
    packed, cu_seqlens = ic.pack(rewards_BT, MASK)
    slots = torch.zeros(len(packed), 1, dtype=torch.int64), torch.zeros(len(packed), 1)
    expected = ic.distrl_advantages(packed[:, None], *slots, REWARDS, cu_seqlens, GROUPS, method)[:, 0]
    torch.testing.assert_close(found[MASK.bool()], expected)
    assert (found[MASK == 0] == 0).all()


def test_advantages_that_a_framework_has_made_are_kept():
    """With the estimator "none" they come out as they went in; GAE adds its own to them."""
    outcome, rewards_BT = torch.tensor([2.0, -2.0, 1.0, -1.0]), torch.randn(B, T)
    none = replace(ic.METHODS["paper"], estimator="none")
    assert token_advantages(rewards_BT, MASK, REWARDS, GROUPS, none, outcome_B=outcome).equal(outcome[:, None] * MASK)
    process = token_advantages(rewards_BT, MASK, REWARDS, GROUPS, outcome_B=torch.zeros(B))
    both = token_advantages(rewards_BT, MASK, REWARDS, GROUPS, outcome_B=outcome)
    torch.testing.assert_close(both, process + outcome[:, None] * MASK)
    assert process.abs().max() > 0.1


def test_a_named_method_and_integer_groups():
    rewards_BT = torch.randn(B, T)
    by_name = token_advantages(rewards_BT, MASK, REWARDS, torch.tensor([5, 5, 7, 7]), "official")
    assert by_name.equal(token_advantages(rewards_BT, MASK, REWARDS, GROUPS, ic.METHODS["official"]))


def test_shapes_are_checked():
    with pytest.raises(
        ValueError, match=r"token_rewards and mask must both be \[B, T\]; got shapes \(4, 5\) and \(4, 6\)"
    ):
        token_advantages(torch.zeros(4, 5), MASK, REWARDS, GROUPS)
    ids, attention = batch()
    with pytest.raises(ValueError, match="a prompt before each response"):
        token_rewards(model(), ids[:, P:], attention[:, P:], MASK, torch.zeros(B, T), beta=1.0)
