"""Advantages of the sampled tokens: outcome, group-normalised GAE (paper), centred and whitened sums (official)."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipvrm_core.credit import distrl_advantages
from ipvrm_core.method import Method
from ipvrm_core.sequences.advantages import (
    CandidateForm,
    agreement_advantages,
    candidate_advantages,
    center_on_candidates,
    gae,
    group_normalize,
    masked_step_advantages,
    outcome_advantages,
    prime_advantages,
    process_advantages,
    rloo_advantages,
    whiten,
)
from ipvrm_core.sequences.segments import segment_sum
from ipvrm_core.sequences.values import prefix_values


def f64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def close(got, *expected, atol=1e-12):
    torch.testing.assert_close(got, torch.tensor(expected, dtype=got.dtype), rtol=0, atol=atol)


def groups(*numbers):
    return torch.tensor(numbers)


def test_outcome_is_standardised_within_the_group_by_the_population_std():
    # (1, 1, 1, 0): mu = 3/4, s = sqrt(3/16) = sqrt(3)/4: (1/4) / s = 1/sqrt 3, (-3/4) / s = -sqrt 3
    # (0, 1): mu = 1/2, s = 1/2: -1, 1.  The groups are interleaved.
    got = outcome_advantages(f64(1, 0, 1, 1, 1, 0), groups(0, 1, 0, 0, 1, 0))
    close(got, 1 / math.sqrt(3), -1.0, 1 / math.sqrt(3), 1 / math.sqrt(3), 1.0, -math.sqrt(3))


def test_outcome_of_a_graded_reward():
    # (0, .5, 1): mu = .5, s = sqrt((.25 + 0 + .25) / 3) = .40824829046386302
    close(outcome_advantages(f64(0, 0.5, 1), groups(4, 4, 4)), -1.2247448713915890, 0.0, 1.2247448713915890)


def test_outcome_of_an_unmixed_group_is_exactly_zero():
    got = outcome_advantages(f64(1, 1, 0, 0, 0, 1), groups(0, 0, 1, 1, 2, 2))
    assert got.tolist() == [0.0, 0.0, 0.0, 0.0, -1.0, 1.0]
    assert outcome_advantages(f64(1), groups(0)).tolist() == [0.0]


@settings(max_examples=60, deadline=None)
@given(
    reward=st.floats(-10, 10, width=32),
    n=st.integers(1, 16),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_outcome_of_equal_float_rewards_is_exactly_zero(reward, n, dtype):
    # the mean of n equal floats may round: .1 three times in float64 has std 1.4e-17, and (r - mu) / s would be -1
    rewards = torch.tensor([reward] * n + [0.0, 1.0], dtype=dtype)
    got = outcome_advantages(rewards, torch.tensor([0] * n + [1, 1]))
    assert got.tolist() == [0.0] * n + [-1.0, 1.0]


def test_outcome_of_point_one_three_times():
    assert outcome_advantages(f64(0.1, 0.1, 0.1), groups(0, 0, 0)).tolist() == [0.0, 0.0, 0.0]


def test_group_normalize_spans_all_tokens_of_a_prompt():
    # prompt 0 owns sequences 0 and 2: tokens 1, 3 and 5: mean 3, population std sqrt(8/3) = 1.632993161855452
    # prompt 1 owns sequence 1: tokens 10, 20: mean 15, std 5
    x, cu = f64(1, 3, 10, 20, 5), torch.tensor([0, 2, 4, 5])
    close(
        group_normalize(x, cu, groups(0, 1, 0), eps=0.0),
        *(-2 / 1.632993161855452, 0.0, -1.0, 1.0, 2 / 1.632993161855452),
    )
    # eps is added to the std, not to the variance: -5 / (5 + 5)
    close(group_normalize(x, cu, groups(0, 1, 0), eps=5.0)[2:4], -0.5, 0.5)
    close(group_normalize(x, cu, groups(0, 1, 0))[2:4], -5 / 5.000001, 5 / 5.000001)


def test_group_normalize_of_a_constant_group_is_zero():
    close(group_normalize(f64(2, 2, 2), torch.tensor([0, 1, 3]), groups(0, 0)), 0.0, 0.0, 0.0)


def test_gradient_of_group_normalize_where_a_group_has_no_spread():
    """d = x_2 - x_1 = 1: y_2 = -y_1 = (d/2) / (d/2 + eps); d(y_1 + 3 y_2)/dd = eps / (d/2 + eps)^2 = 1/2 at eps = 1/2.

    The third token is alone in its group: y = 0 whatever it is.
    """
    x_N = f64(1, 2, 5).requires_grad_()
    y_N = group_normalize(x_N, torch.tensor([0, 2, 3]), groups(0, 1), eps=0.5)
    close(y_N.detach(), -0.5, 0.5, 0.0)
    close(torch.autograd.grad(y_N, x_N, f64(1, 3, 7))[0], -0.5, 0.5, 0.0)


CU = torch.tensor([0, 3, 3, 5])
DELTA = f64(1, 2, 3, 10, 20)


def test_gae_with_gamma_lambda_one_is_the_suffix_sum():
    close(gae(DELTA, CU), 6.0, 5.0, 3.0, 30.0, 20.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "function",
    [
        lambda x, cu: gae(x, cu, 1.0, 0.999),
        lambda x, cu: prefix_values(x, cu, 1.0),
        lambda x, cu: group_normalize(x, cu, groups(0, 0)),
        lambda x, cu: segment_sum(x, cu),
    ],
    ids=["gae", "prefix_values", "group_normalize", "segment_sum"],
)
def test_half_precision_rounds_the_result_and_not_the_sums(function, dtype):
    """3000 tokens: accumulated in bfloat16, GAE was 3% off."""
    x_N = torch.randn(3000, generator=torch.Generator().manual_seed(0)).to(dtype)
    cu = torch.tensor([0, 2900, 3000])
    got, exact = function(x_N, cu), function(x_N.double(), cu)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4 * exact.abs().max().item())


def test_gae_discounts_by_gamma_times_lambda():
    # .9: 3;  2 + .9 * 3 = 4.7;  1 + .9 * 4.7 = 5.23;   20;  10 + .9 * 20 = 28
    close(gae(DELTA, CU, gamma=0.9), 5.23, 4.7, 3.0, 28.0, 20.0)
    close(gae(DELTA, CU, lam=0.9), 5.23, 4.7, 3.0, 28.0, 20.0)
    # .9 * .5 = .45: 3;  2 + 1.35 = 3.35;  1 + .45 * 3.35 = 2.5075;   20;  19
    close(gae(DELTA, CU, gamma=0.9, lam=0.5), 2.5075, 3.35, 3.0, 19.0, 20.0)
    close(gae(DELTA, CU, lam=0.0), 1.0, 2.0, 3.0, 10.0, 20.0)


def test_whiten_uses_the_unbiased_variance():
    # (1, 2, 3, 6): mean 3, squares 4 + 1 + 0 + 9 = 14, variance 14/3
    s = math.sqrt(14 / 3)
    close(whiten(f64(1, 2, 3, 6), eps=0.0), -2 / s, -1 / s, 0.0, 3 / s)
    # eps is under the root: (1, 3) has variance 2; 2 + 2 = 4
    close(whiten(f64(1, 3), eps=2.0), -0.5, 0.5)
    close(whiten(f64(1e-4, -1e-4)), 1e-4 / math.sqrt(3e-8), -1e-4 / math.sqrt(3e-8))  # 2e-8 + the default 1e-8


def test_whiten_of_fewer_than_two_is_finite():
    assert whiten(f64(5)).tolist() == [0.0]
    assert whiten(f64()).tolist() == []


def test_paper_process_advantages_normalise_then_sum():
    # one prompt, sequences (1, 3) and (5): delta_hat = (-2, 0, 2) / s with s = sqrt(8/3) + 1e-6; sums (-2, 0 | 2) / s
    # another prompt, (10, 20): (-1, 1) / (1 + 2e-7); sums (0, 1)
    x, cu = f64(1, 3, 10, 20, 5), torch.tensor([0, 2, 4, 5])
    s = 1.632993161855452 + 1e-6
    got = process_advantages(x, cu, groups(0, 1, 0), normalize="group")
    close(got, -2 / s, 0.0, 0.0, 5 / 5.000001, 2 / s)
    got = process_advantages(x, cu, groups(0, 1, 0), normalize="group", gamma=0.9, lam=0.5)
    close(got, -2 / s, 0.0, (-1 + 0.45) * 5 / 5.000001, 5 / 5.000001, 2 / s)


def test_official_process_advantages_centre_scale_sum_whiten():
    # (1, 2 | 3, 6): batch mean 3 -> (-2, -1 | 0, 3); sigma 2 -> (-1, -.5 | 0, 1.5); suffix sums (-1.5, -.5 | 1.5, 1.5)
    # mean .25 -> (-1.75, -.75, 1.25, 1.25), squares 3.0625 + .5625 + 1.5625 + 1.5625 = 6.75, unbiased variance 2.25
    s = math.sqrt(2.25 + 1e-8)
    got = process_advantages(
        f64(1, 2, 3, 6), torch.tensor([0, 2, 4]), groups(0, 1), normalize="batch", sigma=torch.tensor(2.0)
    )
    close(got, -1.75 / s, -0.75 / s, 1.25 / s, 1.25 / s)
    # with gamma lambda 1/2 the sums are (-1.25, -.5 | .75, 1.5): mean .125,
    # (-1.375, -.625, .625, 1.375), squares 2 (1.890625 + .390625) = 4.5625, variance 4.5625 / 3
    s = math.sqrt(4.5625 / 3 + 1e-8)
    got = process_advantages(
        f64(1, 2, 3, 6), torch.tensor([0, 2, 4]), groups(0, 1), normalize="batch", sigma=torch.tensor(2.0), gamma=0.5
    )
    close(got, -1.375 / s, -0.625 / s, 0.625 / s, 1.375 / s)


def test_rloo_subtracts_the_mean_of_the_others():
    # group 7: (1, 0, 0): 1 - 0, 0 - 1/2, 0 - 1/2; group 2: (1, 1): 0; group 5 has nobody else
    got = rloo_advantages(f64(1, 1, 0, 0, 1, 1), groups(7, 2, 7, 7, 2, 5))
    close(got, 1.0, 0.0, -0.5, -0.5, 0.0, 0.0)
    close(rloo_advantages(torch.tensor([1, 0]), groups(0, 0)), 1.0, -1.0)


def test_prime_by_hand():
    """One group: r = (1, 1), (-2). Suffix sums (2, 1), (-2): r / 2 = (.5, .5), (-1), means .5 and -1, sum -.5.

    n/(n-1) = 2: (1 + .5, 1 + .5), (-2 + .5), suffix sums (3, 1.5), (-1.5). Outcome 1 against 0: +1 and -1.
    """
    raw = f64(4, 2.5, -2.5)
    expected = ((raw - raw.mean()) / raw.var().sqrt()).tolist()
    assert math.isclose(raw.var(), 834 / 72)
    r, cu, one = f64(1, 1, -2), torch.tensor([0, 2, 3]), groups(4, 4)
    close(prime_advantages(r, f64(1, 0), cu, one), *expected, atol=1e-5)
    close(prime_advantages(1000 * r, f64(1, 0), cu, one), *expected, atol=1e-5)  # the scale is divided out
    close(prime_advantages(r, f64(1, 0), cu, one, coef=0.0), *whiten(f64(1, 1, -1)).tolist())
    half = f64(2.5, 1.75, -1.75)
    close(prime_advantages(r, f64(1, 0), cu, one, coef=0.5), *whiten(half).tolist(), atol=1e-5)


def test_prime_keeps_groups_apart():
    """Before whitening each group's numbers are its own; a group of one has none. All scales are 1 here."""
    r, rewards = f64(1, 0, -0.5, 0.25, 9), f64(1, 0, 1, 0, 1)
    r = r / 9  # so that the largest suffix sum is 1
    cu, several = torch.arange(6), groups(0, 0, 1, 1, 2)
    a = 1 / 9  # RLOO of two: (x - y) each way; outcome +-1
    raw = f64(1 + a, -1 - a, 1 - 0.75 / 9, -1 + 0.75 / 9, 0)
    close(prime_advantages(r, rewards, cu, several), *whiten(raw).tolist(), atol=1e-5)


def test_masked_step_advantages_compare_the_same_step_of_a_group():
    # running sums 1, 3, 6 | 3, 2 | 5.  t = 1: mean 2; t = 2: mean 2.5; t = 3 and the other group are alone
    r, cu = f64(1, 2, 3, 5, 3, -1), torch.tensor([0, 3, 4, 6])
    close(masked_step_advantages(r, cu, groups(8, 3, 8)), -1.0, 0.5, 0.0, 0.0, 1.0, -0.5)


def test_td_and_mc_are_the_ends_of_gae():
    zero = [process_advantages(DELTA, CU, groups(0, 0, 0), normalize="group", lam=lam) for lam in (0.0, 1.0)]
    normalised = group_normalize(DELTA, CU, groups(0, 0, 0))
    torch.testing.assert_close(zero[0], normalised, rtol=0, atol=0)
    torch.testing.assert_close(zero[1], gae(normalised, CU), rtol=0, atol=0)


def test_groups_of_the_new_advantages_are_checked():
    for function in (masked_step_advantages, lambda *a: prime_advantages(a[0], f64(1, 0, 1), *a[1:])):
        with pytest.raises(ValueError, match=r"groups must be integers \[B\]"):
            function(DELTA, CU, groups(0, 1))


def test_user_errors_name_what_was_wrong():
    with pytest.raises(ValueError, match="needs sigma"):
        process_advantages(DELTA, CU, groups(0, 0, 0), normalize="batch")
    with pytest.raises(ValueError, match="normalize must be"):
        process_advantages(DELTA, CU, groups(0, 0, 0), normalize="token")
    with pytest.raises(ValueError, match="cu_seqlens must"):
        gae(DELTA, torch.tensor([0, 4]))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), lengths=st.lists(st.integers(1, 12), min_size=2, max_size=6))
def test_advantages_follow_a_permutation_of_the_sequences(seed, lengths):
    generator = torch.Generator().manual_seed(seed)
    pieces = [torch.randn(n, generator=generator, dtype=torch.float64) for n in lengths]
    group = torch.randint(0, 2, (len(lengths),), generator=generator)
    reward = torch.rand(len(lengths), generator=generator, dtype=torch.float64)
    order = torch.randperm(len(lengths), generator=generator)
    sigma = torch.tensor(1.7, dtype=torch.float64)

    def run(order):
        x = [pieces[b] for b in order]
        cu = torch.tensor([0, *(len(p) for p in x)]).cumsum(0)
        normalised = [
            process_advantages(torch.cat(x), cu, group[order], normalize=n, sigma=sigma) for n in ("group", "batch")
        ]
        normalised += [
            prime_advantages(torch.cat(x), reward[order], cu, group[order]),
            masked_step_advantages(torch.cat(x), cu, group[order]),
        ]
        split = [list(y.split([len(p) for p in x])) for y in normalised]
        return split, torch.stack([f(reward[order], group[order]) for f in (outcome_advantages, rloo_advantages)], 1)

    identity = torch.arange(len(lengths))
    (plain, outcome), (moved, outcome_moved) = run(identity), run(order)
    torch.testing.assert_close(outcome_moved, outcome[order], rtol=0, atol=1e-12)
    for before, after in zip(plain, moved, strict=True):
        for b, sequence in zip(order.tolist(), after, strict=True):
            torch.testing.assert_close(sequence, before[b], rtol=0, atol=1e-10)


def test_center_on_candidates_by_hand():
    """pi_old = 0.6, 0.2. delta = 1, -3: mean (0.6 - 0.6) / 0.8 = 0. delta = 2, -2: mean (1.2 - 0.4) / 0.8 = 1."""
    ids = torch.tensor([[3, 7, -1], [3, 7, -1], [-1, -1, -1]])
    logprobs = torch.tensor([[0.6, 0.2, 1.0]] * 3, dtype=torch.float64).log()
    delta = torch.tensor([[1.0, -3.0, 99.0], [2.0, -2.0, 99.0], [99.0, 99.0, 99.0]], dtype=torch.float64)
    centred = center_on_candidates(delta, ids, logprobs)
    expected = torch.tensor([[1.0, -3.0, 0.0], [1.0, -3.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(centred, expected, rtol=0, atol=1e-12)


def test_a_single_candidate_has_no_centred_advantage():
    """Nothing to choose from, nothing to learn: delta minus itself."""
    ids, logprobs = torch.tensor([[4]]), torch.tensor([[-0.01]])
    assert center_on_candidates(torch.tensor([[-7.0]]), ids, logprobs).item() == 0.0


X = [[3.0, -0.5, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]  # delta / sigma of two positions, by hand


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("sigma_v", [3.0, -0.5, 1.0, 0.0]),
        ("clipped", [1.0, -0.5, 1.0, 0.0]),
        ("tanh", [0.9950547536867305, -0.46211715726000973, 0.7615941559557649, 0.0]),
        ("sign", [1.0, -1.0, 1.0, 0.0]),
        ("soft_threshold", [2.0, 0.0, 0.0, 0.0]),
        ("largest", [1.0, -1 / 6, 1 / 3, 0.0]),
    ],
)
def test_forms_of_the_candidates_advantages_by_hand(form, expected):
    """A position without any TD error has no advantage in any form; a fourth slot is padding and stays 0."""
    delta = 2 * torch.tensor(X, dtype=torch.float64)
    got = candidate_advantages(delta, torch.tensor(2.0, dtype=torch.float64), form)
    torch.testing.assert_close(got, torch.tensor([expected, X[1]], dtype=torch.float64), rtol=0, atol=1e-15)
    single = candidate_advantages(delta.float(), torch.tensor(2.0, dtype=torch.float64), form)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), got, rtol=0, atol=1e-6)
    assert candidate_advantages(delta[:, :0], torch.tensor(2.0), form).shape == (2, 0)


def test_an_unknown_form_names_those_there_are():
    with pytest.raises(ValueError, match=r"sigma_v, clipped, tanh, sign, soft_threshold, largest; got 'huge'"):
        candidate_advantages(torch.ones(1, 1), torch.tensor(1.0), "huge")


def test_agreement_needs_beta_and_is_the_reward_models_probability():
    """beta 4, delta = (4 log 1.5, -4 log 2): pi_phi = .6 * 1.5 = .9 and .2 / 2 = .1, so A = .8 and -.8."""
    ids, logp = torch.tensor([[3, 3, 7, -1]]), torch.tensor([[0.6, 0.6, 0.2, 1.0]], dtype=torch.float64).log()
    delta = 4 * torch.tensor([[1.5, 1.5, 0.5, 9.0]], dtype=torch.float64).log()
    got = agreement_advantages(delta[:, 1:], ids[:, 1:], logp[:, 1:], 4.0)
    torch.testing.assert_close(got, f64(0.8, -0.8, 0.0)[None], rtol=0, atol=1e-12)
    rest = torch.ones(1), torch.tensor([0, 1]), torch.tensor([0])
    with pytest.raises(ValueError, match="needs the beta of the TD errors; got None"):
        distrl_advantages(delta, ids, logp, *rest, Method(candidate_form="agreement"))
    whole = distrl_advantages(delta, ids, logp, *rest, Method(candidate_form="agreement"), beta=4.0)
    torch.testing.assert_close(whole[:, 1:], got)


@pytest.mark.parametrize("form", get_args(CandidateForm))
@pytest.mark.parametrize("single", ["same", "zero", "agreement"])
@pytest.mark.parametrize("baseline", ["none", "mean"])
def test_credit_of_candidates_against_a_loop_in_float64(form, single, baseline):
    """`distrl_advantages` position by position in plain Python; sigma_V between its bounds."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.tensor([[5, 5, 9, -1], [9, 9, -1, -1], [4, 3, 4, 8], [2, -1, -1, -1]])
    logp = torch.tensor([[0.6, 0.6, 0.3, 1], [0.9, 0.9, 1, 1], [0.4, 0.35, 0.4, 0.2], [0.05, 1, 1, 1]]).double().log()
    delta = torch.randn(4, 4, generator=generator, dtype=torch.float64).where(ids >= 0, 0.0)
    method = Method(
        candidate_form=form, single_candidate=single, candidate_baseline=baseline, sigma_min=0.3, sigma_max=0.3
    )
    rest = torch.tensor([1.0, 0.0]), torch.tensor([0, 2, 4]), torch.tensor([0, 0])
    got = distrl_advantages(delta, ids, logp, *rest, method, beta=2.0)
    for n in range(4):
        used = [k for k in range(1, 4) if ids[n, k] >= 0]
        raw = {k: delta[n, k].item() for k in used}
        mass = {k: math.exp(logp[n, k].item()) for k in used}
        agreed = {k: 2 * mass[k] * math.exp(raw[k] / 2.0) - 1 for k in used}  # pi_phi = pi_old e^(delta / beta)
        error = agreed if form == "agreement" else raw
        mean = sum(mass[k] * error[k] for k in used) / sum(mass.values()) if baseline == "mean" and used else 0.0
        error = {k: value - mean for k, value in error.items()}
        most = max(map(abs, error.values()), default=0.0)
        by_hand = {
            "sigma_v": lambda x: x,
            "clipped": lambda x: min(1.0, max(-1.0, x)),
            "tanh": math.tanh,
            "sign": lambda x: (x > 0) - (x < 0),
            "soft_threshold": lambda x: math.copysign(max(abs(x) - 1, 0), x),
            "largest": lambda x, most=most: 0.3 * x / most if most else 0.0,
            "agreement": lambda x: 0.3 * x,
        }
        for k in range(1, 4):
            expected = by_hand[form](error[k] / 0.3) if k in used else 0.0
            if k in used and len(used) == 1 and single != "same":
                expected = agreed[k] if single == "agreement" else 0.0
            assert got[n, k].item() == pytest.approx(expected, abs=1e-12)
