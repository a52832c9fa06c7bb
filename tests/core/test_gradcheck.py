"""Gradients of the reference against finite differences, in float64 and away from the kinks of the clip."""

import pytest
import torch
from torch.autograd import gradcheck

from ipvrm_core.reference.logprobs import head_logits, linear_logprobs
from ipvrm_core.reference.policy_loss import distrl_loss
from ipvrm_core.sequences.reward_losses import (
    dpo_reward_loss,
    implicit_prm_loss,
    ipvrm_loss,
    qrm_loss,
    repirl_loss,
)
from ipvrm_core.types import PolicyLossConfig
from tests.slots import from_branches

N, D, V, K = 8, 3, 6, 3
RATIOS = torch.tensor([0.5, 0.9, 1.1, 1.6, 4.0], dtype=torch.float64)  # bounds at .8, 1.2, 1.28 and the dual clip at 3


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head():
    return tuple(randn(*shape, seed=i).requires_grad_() for i, shape in enumerate([(N, D), (V, D), (V,)]))


def make_batch(hidden, weight, bias, temperature):
    """Every ratio is one of RATIOS at the point of the check; ids repeat, slots are padded, one row is masked."""
    logp_NV = (head_logits(hidden, weight, bias) / temperature).log_softmax(-1).detach()
    generator = torch.Generator().manual_seed(7)
    sampled = torch.randint(V, (N,), generator=generator)
    ids = torch.rand(N, V, generator=generator).argsort(1)[:, :K]
    ids[:, 0] = sampled
    padded = torch.rand(N, K, generator=generator) < 0.2
    pick = RATIOS[torch.randint(len(RATIOS), (N, 1 + K), generator=generator)].log()
    token_weights = torch.rand(N, generator=generator, dtype=torch.float64)
    token_weights[3] = 0.0
    return from_branches(
        sampled_ids_N=sampled,
        old_logprobs_N=logp_NV.gather(1, sampled[:, None])[:, 0] - pick[:, 0],
        advantages_N=randn(N, seed=11),
        token_weights_N=token_weights,
        candidate_ids_NK=ids.masked_fill(padded, -1),
        candidate_old_logprobs_NK=logp_NV.gather(1, ids) - pick[:, 1:],
        candidate_advantages_NK=randn(N, K, seed=12),
        candidate_weights_N=token_weights * 2,
        ref_logprobs_N=logp_NV.gather(1, sampled[:, None])[:, 0] + 0.3,
    )


CONFIGS = {
    "paper": PolicyLossConfig(alpha=0.7),
    "official": PolicyLossConfig(alpha=0.7, dual_clip=3.0, candidate_clip_high=0.2, candidate_dual_clip=3.0),
    "every term": PolicyLossConfig(alpha=0.7, kl_coef=0.3, entropy_coef=0.2, temperature=1.7),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_distrl_loss(config):
    config, inputs = CONFIGS[config], head()
    batch = make_batch(*inputs, config.temperature)
    assert gradcheck(lambda h, w, b: distrl_loss(h, w, batch, config, bias_V=b).loss, inputs)


def test_linear_logprobs():
    ids = torch.tensor([[0, 0, -1], [5, 2, 1]]).repeat(N // 2, 1)
    assert gradcheck(lambda h, w, b: tuple(linear_logprobs(h, w, ids, bias_V=b, temperature=0.7)), head())


CU = torch.tensor([0, 4, 4, 5, 8])
LABELS = torch.tensor([1, 0, 0, 1])


@pytest.mark.parametrize("weighting", ["uniform", "early", "late"])
@pytest.mark.parametrize("boundary", [None, (0.4, 0.0, -1.3, 2.0)])
def test_ipvrm_loss(weighting, boundary):
    boundary = None if boundary is None else torch.tensor(boundary, dtype=torch.float64)
    q = (0.3 * randn(8, seed=5)).requires_grad_()
    assert gradcheck(lambda q: ipvrm_loss(q, CU, LABELS, weighting=weighting, boundary_B=boundary), (q,))


def test_implicit_prm_loss():
    assert gradcheck(lambda q: implicit_prm_loss(q, CU, LABELS, beta=0.5), (randn(8, seed=5).requires_grad_(),))


def test_dpo_reward_loss():
    pairs = torch.tensor([[0, 2], [3, 0], [3, 1]])
    assert gradcheck(lambda q: dpo_reward_loss(q, CU, pairs, beta=0.5), (randn(8, seed=5).requires_grad_(),))


def test_qrm_loss():
    pairs = torch.tensor([[0, 2], [3, 0], [3, 1]])
    assert gradcheck(lambda z: qrm_loss(z, CU, pairs, beta=0.5, margin=0.7), (randn(8, seed=5).requires_grad_(),))


def test_repirl_loss():
    assert gradcheck(lambda r: repirl_loss(r, CU, LABELS), (randn(8, seed=5).requires_grad_(),))
