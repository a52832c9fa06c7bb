"""A PolicyBatch from candidates, advantages and sequences; on-policy; what it does without."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import ipvrm_core as ic
from tests.ops.problems import make_problem

CU = torch.tensor([0, 2, 5])
BACKENDS = pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])


def gradients(problem, batch, config, backend):
    output = ic.distrl_loss(problem.hidden, problem.weight, batch, config, bias=problem.bias, backend=backend)
    return [output.loss.detach(), *output.metrics.values(), *torch.autograd.grad(output.loss, problem.inputs)]


def test_of_makes_the_weights_of_the_batch():
    ids, old = torch.tensor([[1, 1, 2]] * 5), torch.tensor([[0.5, 0.5, 0.25]] * 5).log()
    batch = ic.PolicyBatch.of(ids, old, torch.ones(5, 3), CU)
    assert batch.token_weights_N.tolist() == pytest.approx([1 / 4, 1 / 4, 1 / 6, 1 / 6, 1 / 6])
    assert torch.equal(batch.candidate_weights_N, batch.token_weights_N)
    mask = torch.tensor([1, 0, 1, 1, 1]).bool()
    batch = ic.PolicyBatch.of(ids, old, torch.ones(5, 3), CU, mask_N=mask, aggregation="token_mean")
    assert batch.token_weights_N.tolist() == [0.25, 0, 0.25, 0.25, 0.25]
    assert batch.candidate_weights_N.tolist() == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3, 1 / 3])  # 4 rows of mass 0.75
    batch = ic.PolicyBatch.of(ids, old, torch.ones(5, 3), CU, aggregation="token_sum", constant=10.0, scale=2.0)
    assert batch.token_weights_N.tolist() == pytest.approx([0.2] * 5)


def test_of_a_part_takes_the_totals_of_the_whole():
    ids, old = torch.tensor([[1, 1, 2]] * 5), torch.tensor([[0.5, 0.5, 0.25]] * 5).log()
    whole = ic.PolicyBatch.of(ids, old, torch.ones(5, 3), CU, aggregation="token_mean")
    totals = ic.normalizers(CU, torch.ones(5), ic.candidate_mass(ids, old))
    part = ic.PolicyBatch.of(
        ids[2:], old[2:], torch.ones(3, 3), torch.tensor([0, 3]), totals=totals, aggregation="token_mean"
    )
    for name in ("token_weights_N", "candidate_weights_N"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[2:])


@BACKENDS
def test_sampled_tokens_alone_are_grpo(backend):
    """One vector each: the loss of the formula in the README, by plain torch."""
    problem = make_problem(5, 4, 11, 0)
    tokens, advantages = problem.batch.ids_NS[:, 0], torch.tensor([1.0, 1.0, -2.0, -2.0, -2.0])
    logp = F.linear(problem.hidden, problem.weight, problem.bias).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    old = logp.detach() + torch.tensor([0.5, -0.1, 0.3, -0.4, 0.0])
    batch = ic.PolicyBatch.of(tokens, old, advantages, CU)
    ratio = (logp - old).exp()
    want = -(torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages) * batch.token_weights_N).sum()
    got = gradients(problem, batch, ic.PolicyLossConfig(), backend)
    expected = [want.detach(), *torch.autograd.grad(want, problem.inputs)]
    for one, other in zip([got[0], *got[-len(problem.inputs) :]], expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@BACKENDS
@pytest.mark.parametrize("kl_ratio", [False, True])
def test_without_old_logprobs_the_policy_is_the_old_one(backend, kl_ratio):
    """To the bit what its own log-probs, passed as constants, give: rho = 1 everywhere, and a gradient."""
    problem = make_problem(13, 6, 65, 4)
    config = ic.PolicyLossConfig(alpha=0.7, kl_coef=0.3, entropy_coef=0.1, kl_ratio=kl_ratio)
    with torch.no_grad():
        rows = ic.linear_logprobs(
            problem.hidden, problem.weight, problem.batch.ids_NS, bias=problem.bias, backend=backend
        )
    given = gradients(problem, replace(problem.batch, old_logprobs_NS=rows.logprobs_NK), config, backend)
    alone = gradients(problem, replace(problem.batch, old_logprobs_NS=None), config, backend)
    for one, other in zip(alone, given, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
    assert alone[-1].abs().max() > 1e-3


@BACKENDS
def test_the_kl_term_times_the_ratio_has_its_own_gradient(backend):
    """rho k3 by autograd of plain torch, at ratios away from 1 and advantages 0."""
    problem = make_problem(13, 6, 65, 0)
    batch = replace(problem.batch, advantages_NS=torch.zeros(13, 1))
    logits = F.linear(problem.hidden, problem.weight, problem.bias)
    logp = logits.log_softmax(-1).gather(1, batch.ids_NS)[:, 0]
    log_ref = batch.ref_logprobs_N - logp
    kl = (logp - batch.old_logprobs_NS[:, 0]).exp() * (log_ref.exp() - 1 - log_ref)
    want = 0.3 * (batch.token_weights_N * kl).sum()
    got = gradients(problem, batch, ic.PolicyLossConfig(kl_coef=0.3, kl_ratio=True), backend)
    torch.testing.assert_close(got[0], want.detach().float(), rtol=1e-5, atol=1e-7)
    for one, other in zip(got[-3:], torch.autograd.grad(want, problem.inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_on_policy_candidates_have_no_mass_to_divide_by():
    with pytest.raises(ValueError, match="token_mean divides by the candidates' pi_old: it needs old_logprobs"):
        ic.PolicyBatch.of(torch.ones(5, 2).long(), None, torch.ones(5, 2), CU, aggregation="token_mean")
    ic.PolicyBatch.of(torch.ones(5).long(), None, torch.ones(5), CU, aggregation="token_mean")


def test_ragged_candidates_become_slots():
    """Rows of 2, 0 and 1 candidates, int32 ids."""
    ids, logprobs = torch.tensor([4, 9, 7], dtype=torch.int32), torch.tensor([-0.5, -1.0, -0.1])
    sampled, own = torch.tensor([9, 2, 7], dtype=torch.int32), torch.tensor([-1.0, -3.0, -0.1])
    found = ic.Candidates.from_ragged(sampled, own, ids, logprobs, torch.tensor([0, 2, 2, 3]))
    assert found.ids_NS.tolist() == [[9, 4, 9], [2, -1, -1], [7, 7, -1]]
    assert found.ids_NS.dtype == torch.int64
    torch.testing.assert_close(found.logprobs_NS, torch.tensor([[-1, -0.5, -1], [-3, 0, 0], [-0.1, -0.1, 0]]))
    assert found.counts_N.tolist() == [2, 0, 1]
    for offsets in ([0, 2, 2], [0, 2, 2, 4], [0, 2, 1, 3]):
        with pytest.raises(ValueError, match="offsets must"):
            ic.Candidates.from_ragged(sampled, own, ids, logprobs, torch.tensor(offsets))


def test_ragged_and_dense_candidates_are_the_same():
    hidden, weight = torch.randn(20, 5) * 4, torch.randn(30, 5)
    dense = ic.select_candidates(hidden, weight, torch.randint(30, (20,)))
    used = dense.ids_NS[:, 1:] >= 0
    offsets = F.pad(dense.counts_N.cumsum(0), (1, 0))
    candidates = dense.ids_NS[:, 1:][used].int(), dense.logprobs_NS[:, 1:][used], offsets
    ragged = ic.Candidates.from_ragged(dense.ids_NS[:, 0], dense.sampled_logprobs_N, *candidates)
    K = ragged.ids_NS.shape[1]
    assert int(dense.counts_N.max()) + 1 == K
    assert torch.equal(ragged.ids_NS, dense.ids_NS[:, :K])
    assert torch.equal(ragged.logprobs_NS, dense.logprobs_NS[:, :K])


def test_five_calls_end_to_end():
    """Credit by hand for one answer right and one wrong: outcome +-1, candidates' delta over the spread of V."""
    torch.manual_seed(3)
    hidden, weight, rm = torch.randn(5, 4) * 3, torch.randn(9, 4), torch.randn(5, 4) * 3
    old = ic.select_candidates(hidden, weight, torch.randint(9, (5,)))
    delta = ic.linear_td_errors(rm, weight, old.ids_NS, old.logprobs_NS, beta=10.0)
    method = replace(ic.METHODS["paper"], estimator="none")
    given = old.ids_NS, old.logprobs_NS, torch.tensor([1.0, 0.0]), CU
    advantages = ic.distrl_advantages(delta, *given, ["a", "a"], method)
    assert advantages[:, 0].tolist() == pytest.approx([1, 1, -1, -1, -1])
    values = torch.cat([delta[:2, 0].cumsum(0), delta[2:, 0].cumsum(0)])
    torch.testing.assert_close(advantages[:, 1:], delta[:, 1:] / values.std(unbiased=False))
    assert torch.equal(ic.distrl_advantages(delta, *given, torch.tensor([7, 7]), method), advantages)
    batch = ic.PolicyBatch.of(old.ids_NS, old.logprobs_NS, advantages, CU)
    loss, metrics = ic.distrl_loss(hidden.requires_grad_(), weight, batch)
    loss.backward()
    assert math.isclose(metrics["ratio"], 1, rel_tol=1e-5)
    assert hidden.grad.abs().max() > 0
