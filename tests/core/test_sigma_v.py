"""TD errors, the scale sigma_V and A_TD = delta / sigma_V."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipvrm_core.sequences.advantages import sigma_v, td_advantages, td_errors, value_moments


def f64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def close(got, expected, atol=1e-12):
    torch.testing.assert_close(got, torch.as_tensor(expected, dtype=got.dtype), rtol=0, atol=atol)


def test_td_errors():
    # beta (log phi - log old): 10 (-1 + 1.5) = 5, 10 (-2 + 1) = -10
    close(td_errors(f64(-1, -2), f64(-1.5, -1), beta=10.0), [5.0, -10.0])
    close(td_errors(f64(-1, -2)[None], f64(-1.5, -1)[None], beta=0.5), [[0.25, -0.5]])  # any shape


def test_moments_are_count_sum_and_sum_of_squares():
    close(value_moments(torch.tensor([1.0, 2.0, 3.0, 4.0])), [4.0, 10.0, 30.0])
    assert value_moments(torch.tensor([1.0])).dtype == torch.float64
    close(value_moments(torch.zeros(0)), [0.0, 0.0, 0.0])


def test_sigma_is_the_population_std():
    # V = (1, 2, 3, 4): 30/4 - (10/4)^2 = 1.25, root 1.1180339887498949 (the sample std would be 1.2909944487358056)
    moments = value_moments(f64(1, 2, 3, 4))
    close(sigma_v(moments, "std_plus_eps", eps=0.0), 1.1180339887498949)
    close(sigma_v(moments, "std_plus_eps", eps=0.5), 1.6180339887498949)
    close(sigma_v(moments, "floored_std", eps=0.5), 1.1180339887498949)
    close(sigma_v(moments, "floored_std", eps=2.0), 2.0)


def test_sigma_defaults():
    close(sigma_v(value_moments(f64(1, 3))), 1.0 + 1e-6, atol=1e-15)  # std 1, plus eps
    close(sigma_v(value_moments(f64(1, 3)), "floored_std"), 1.0, atol=1e-15)
    close(sigma_v(value_moments(f64(2, 2)), "floored_std"), 1e-6, atol=1e-18)
    close(sigma_v(value_moments(f64(2, 2))), 1e-6, atol=1e-18)
    close(sigma_v(value_moments(f64()), "floored_std"), 1e-6, atol=1e-18)


def test_sigma_of_equal_values_is_never_nan():
    # 7 * .1^2 / 7 - .1^2 may round below zero
    for n in range(1, 50):
        assert sigma_v(value_moments(torch.full((n,), 0.1, dtype=torch.float64))).isfinite()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), sizes=st.lists(st.integers(0, 20), min_size=1, max_size=5))
def test_moments_add_up_over_ranks(seed, sizes):
    values = 5 * torch.randn(sum(sizes), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 3
    summed = sum(value_moments(piece) for piece in values.split(sizes))
    for form in ("std_plus_eps", "floored_std"):
        close(sigma_v(summed, form), sigma_v(value_moments(values), form), atol=1e-10)
    if len(values) > 1:
        close(sigma_v(summed, "floored_std"), max(values.std(unbiased=False).item(), 1e-6), atol=1e-9)


def test_no_gradient_through_sigma():
    values = f64(1, 2, 4).requires_grad_()
    sigma = sigma_v(value_moments(values))
    assert not sigma.requires_grad
    assert sigma.shape == ()
    td_advantages(values, sigma).sum().backward()
    close(values.grad, [1 / sigma.item()] * 3)


def test_td_advantages():
    close(td_advantages(f64(5, -10), f64(2)[0]), [2.5, -5.0])
    got = td_advantages(torch.tensor([[3.0]]), torch.tensor(math.sqrt(9), dtype=torch.float64))
    assert got.dtype == torch.float32  # sigma is float64, the advantages keep the dtype of delta
    close(got, [[1.0]], atol=1e-7)


def test_unknown_form_is_refused():
    with pytest.raises(ValueError, match="form must be"):
        sigma_v(f64(1, 2, 3), "std")
