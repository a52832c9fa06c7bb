"""Truncated importance sampling of the policy loss: against the formula, term by term, with gradients by autograd."""

import math
from itertools import accumulate, product

import pytest
import torch

from ipvrm_core import distrl_loss_from_logits
from ipvrm_core.credit import Credit
from ipvrm_core.method import METHODS
from ipvrm_core.trainer.config import ConfigError, Correction
from ipvrm_core.trainer.rl.correction import correct, effective_share
from ipvrm_core.trainer.rl.credit import BatchCredit
from ipvrm_core.trainer.rl.policy_update import make_policy_batch

LENGTHS = [4, 1, 6, 3]
V, K = 11, 3
CU = torch.tensor([0, *accumulate(LENGTHS)])
PAPER = METHODS["paper"]


def problem(apart: float):
    """Logits, credit in slots, and the log-probs of a sampler that is `apart` from the old policy."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    N = sum(LENGTHS)
    old_NV = normal(N, V).mul(2).log_softmax(-1)
    ids_NS = torch.stack([torch.randperm(V, generator=generator)[: 1 + K] for _ in range(N)])
    ids_NS[::3, -1] = -1
    old_NS = old_NV.gather(1, ids_NS.clamp(min=0)).masked_fill(ids_NS < 0, 0.0)
    credit = BatchCredit(Credit(normal(N, 1 + K), None), ids_NS, old_NS, CU, {})
    logits_NV = (old_NV + normal(N, V).mul(0.3)).requires_grad_()
    return logits_NV, credit, old_NS[:, 0] - normal(N).mul(apart)


def weight(ratio: float, mode: str, limit: float) -> float:
    return min(ratio, limit) if mode == "cap" else ratio * (ratio <= limit)


def by_hand(logits_NV, credit: BatchCredit, sampler_N, base, config, settings: Correction):
    """The loss of one term after another; `base` has the weights that are not corrected."""
    logp_NV, total = logits_NV.log_softmax(-1), 0.0

    def surrogate(logp, old, advantage, low, high):
        ratio = (logp - old).exp()
        return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)

    for start, end in zip(CU.tolist(), CU[1:].tolist(), strict=False):
        whole = math.exp(sum((credit.old_logprobs_NS[n, 0] - sampler_N[n]).item() for n in range(start, end)))
        for n in range(start, end):
            own = math.exp((credit.old_logprobs_NS[n, 0] - sampler_N[n]).item())
            used = weight(own if settings.level == "token" else whole, settings.mode, settings.limit)
            for slot in range(1 + K):
                token = credit.ids_NS[n, slot]
                if token < 0:
                    continue
                old, advantage = credit.old_logprobs_NS[n, slot], credit.credit.credit_NS[n, slot]
                if slot == 0:
                    clip = config.clip_low, config.clip_high
                    factor = base.token_weights_N[n].double() * used
                else:
                    clip = config.candidate_clip_low, config.candidate_clip_high
                    factor = config.alpha * base.candidate_weights_N[n].double() * old.exp()
                    factor = factor * (used if settings.level == "sequence" else 1.0)
                total = total + factor * surrogate(logp_NV[n, token], old, advantage, *clip)
    return total


@pytest.mark.parametrize("apart", [0.0, 0.7])
@pytest.mark.parametrize(("level", "mode"), list(product(["token", "sequence"], ["cap", "mask"])))
def test_loss_and_gradient_are_those_of_the_formula(level, mode, apart):
    logits_NV, credit, sampler_N = problem(apart)
    settings = Correction(level=level, mode=mode, limit=1.5)
    weights, numbers = correct(settings, sampler_N, credit.old_logprobs_NS[:, 0], CU)
    assert (numbers["corrected"] > 0) == (apart > 0)  # else the limit was never tried
    index = [2, 0, 3, 1]  # another order than the packed one, and pieces add up
    base = make_policy_batch(PAPER, credit, index, None)
    config = PAPER.loss_config(kl_coef=0.0, entropy_coef=0.0)
    rows_N = torch.cat([torch.arange(CU[b], CU[b + 1]) for b in index])
    ours = distrl_loss_from_logits(
        logits_NV[rows_N], make_policy_batch(PAPER, credit, index, None, weights), config, backend="reference"
    ).loss
    theirs = by_hand(logits_NV, credit, sampler_N, base.rows(rows_N.argsort()), config, settings)
    gradients = [torch.autograd.grad(loss, logits_NV, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
    plain = distrl_loss_from_logits(logits_NV[rows_N], base, config, backend="reference").loss
    assert torch.allclose(ours, plain, rtol=0, atol=1e-12) == (apart == 0)


def test_without_correction_nothing_is_weighted_and_the_mismatch_is_told():
    cu_seqlens, old_N = torch.tensor([0, 2, 3]), torch.tensor([-1.0, -2.0, -3.0])
    sampler_N = old_N - torch.tensor([2.0, 1.0, 0.5]).log()  # the ratios are 2, 1, 1/2
    weights, numbers = correct(Correction(level="none"), sampler_N, old_N, cu_seqlens)
    assert weights is None
    assert "corrected" not in numbers
    expected = {
        "mismatch": (2 * math.log(2)) / 3,
        "mismatch_max": math.log(2),
        "mismatch_ratio": 3.5 / 3,
        "mismatch_ratio_max": 2.0,
        "mismatch_ess": 3.5**2 / (3 * 5.25),
        "mismatch_answer_ess": 2.5**2 / (2 * 4.25),  # the answers' ratios are 2 and 1/2
    }
    assert numbers == pytest.approx(expected, abs=1e-6)


def test_the_share_above_the_limit_is_of_tokens_or_of_answers():
    cu_seqlens, old_N = torch.tensor([0, 2, 3]), torch.zeros(3)
    sampler_N = -torch.tensor([3.0, 1.0, 0.5]).log()
    for level, share in (("token", 1 / 3), ("sequence", 1 / 2)):
        _, numbers = correct(Correction(level=level), sampler_N, old_N, cu_seqlens)
        assert numbers["corrected"] == pytest.approx(share)


def test_an_answer_far_from_the_sampler_stays_finite():
    """4,000 tokens of ratio e: the product is beyond any float."""
    sampler_N, old_N = torch.full((4000,), -2.0), torch.full((4000,), -1.0)
    cu_seqlens = torch.tensor([0, 2000, 4000])
    for mode, expected in (("cap", 2.0), ("mask", 0.0)):
        weights, numbers = correct(Correction(level="sequence", mode=mode), sampler_N, old_N, cu_seqlens)
        assert weights.token_N.unique().tolist() == [expected]
        assert all(map(math.isfinite, numbers.values()))


def test_the_effective_share_of_equal_ratios_is_one_and_of_a_single_large_one_its_part():
    assert effective_share(torch.zeros(5)).item() == pytest.approx(1.0)
    assert effective_share(torch.tensor([800.0, 0.0, 0.0, 0.0])).item() == pytest.approx(0.25)


def test_a_sampler_that_says_nothing_cannot_be_corrected():
    assert correct(Correction(level="none"), None, torch.zeros(2), torch.tensor([0, 2])) == (None, {})
    with pytest.raises(ValueError, match="needs the sampler's log-probs; got None"):
        correct(Correction(level="token"), None, torch.zeros(2), torch.tensor([0, 2]))


@pytest.mark.parametrize(("sampler", "level"), [("generate", "none"), ("vllm", "token")])
def test_the_level_is_the_samplers_where_none_is_given(tiny_config, sampler, level):
    generation = {"max_new_tokens": 12, "sampler": sampler}
    config = tiny_config(generation=generation, rl={"x": {}, "y": {"correction": {"level": "sequence"}}})
    assert [config.rl[name].correction.level for name in "xy"] == [level, "sequence"]


def test_a_limit_below_one_is_refused(tiny_config):
    with pytest.raises(ConfigError, match=r"rl.x.correction.limit: .* greater than or equal to 1; got 0.5"):
        tiny_config(rl={"x": {"correction": {"limit": 0.5}}})
