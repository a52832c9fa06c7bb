"""What the public functions refuse, and with which words."""

import math
from dataclasses import fields, replace

import pytest
import torch

import ipvrm_core as ic
from ipvrm_core.ops.checks import checked_budget

N, D, V, K = 4, 3, 11, 2


@pytest.fixture
def head():
    return torch.randn(N, D), torch.randn(V, D)


@pytest.fixture
def batch():
    ids = torch.zeros(N, 1 + K, dtype=torch.int64)
    ids[:, 0] = torch.arange(N)
    return ic.PolicyBatch(ids, torch.zeros(N, 1 + K), torch.ones(N, 1 + K), torch.ones(N), torch.ones(N))


IDS = torch.zeros(N, K, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, N, D)}, r"hidden must be \[N, D\]; got shape \(2, 4, 3\)"),
        ({"hidden": torch.zeros(N, D, dtype=torch.int64)}, "hidden must be floating point; got torch.int64"),
        ({"hidden": torch.zeros(N, D, device="meta")}, "weight must be on meta; got cpu"),
        ({"weight": torch.zeros(3, 4, 5)}, r"weight must be \[V, D\]; got shape \(3, 4, 5\)"),
        ({"weight": torch.zeros(V, 5)}, r"weight must be \[V, D\] with D = 3; got shape \(11, 5\)"),
        ({"weight": torch.zeros(0, D)}, "at least one token; got V = 0"),
        ({"bias": torch.zeros(5)}, r"bias must be floating point \[V\] = \(11,\); got torch.float32, shape \(5,\)"),
        ({"bias": torch.zeros(V, dtype=torch.int64)}, "bias must be floating point .* got torch.int64"),
        ({"ids": torch.zeros(N, dtype=torch.int64)}, r"ids must be int64 \[N = 4, K\]; got torch.int64, shape \(4,\)"),
        ({"ids": torch.zeros(3, K, dtype=torch.int64)}, r"ids must be int64 \[N = 4, K\]; got .* shape \(3, 2\)"),
        ({"ids": torch.zeros(N, K, dtype=torch.int32)}, "ids must be int64 .* got torch.int32"),
        ({"ids": torch.full((N, K), V)}, "ids must be below V = 11; got 11"),
        ({"temperature": 0.0}, "temperature must be > 0; got 0.0"),
        (
            {"temperature": torch.ones(3)},
            r"temperature must be a number or .* \[N = 4\]; got torch.float32, shape \(3,\)",
        ),
        ({"temperature": torch.tensor([1.0, 1.0, -2.0, 1.0])}, "temperature must be > 0; got -2.0"),
        ({"softcap": 0.0}, "softcap must be > 0 or None; got 0.0"),
        ({"max_buffer_bytes": 0}, "max_buffer_bytes must be >= 1 or None; got 0"),
        ({"backend": "cuda"}, "backend must be one of 'auto', 'triton', 'chunked', 'reference'; got 'cuda'"),
    ],
)
def test_linear_logprobs_refuses(head, change, message):
    arguments = {"hidden": head[0], "weight": head[1], "ids": IDS} | change
    with pytest.raises(ValueError, match=message):
        ic.linear_logprobs(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p_min": 0.0}, r"p_min must be in \(0, 1\]; got 0.0"),
        ({"p_min": 1.5}, r"p_min must be in \(0, 1\]; got 1.5"),
        ({"top_k": -1}, "top_k must be >= 0 or None; got -1"),
        (
            {"exclude": torch.zeros(3, dtype=torch.bool)},
            r"exclude must be bool \[N = 4\]; got torch.bool, shape \(3,\)",
        ),
        ({"exclude": torch.zeros(N)}, "exclude must be bool .* got torch.float32"),
        ({"sampled_ids": IDS}, r"sampled_ids must be int64 \[N = 4\]; got torch.int64, shape \(4, 2\)"),
        ({"sampled_ids": torch.full((N,), 99)}, "sampled_ids must be below V = 11; got 99"),
        ({"temperature": -1.0}, "temperature must be > 0; got -1.0"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_select_candidates_refuses(head, change, message, backend):
    arguments = {"hidden": head[0], "weight": head[1], "sampled_ids": IDS[:, 0], "backend": backend} | change
    with pytest.raises(ValueError, match=message):
        ic.select_candidates(**arguments)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_distrl_loss_refuses(head, batch, backend):
    with pytest.raises(ValueError, match=r"kl_coef > 0 needs batch.ref_logprobs_N; got None"):
        ic.distrl_loss(*head, batch, ic.PolicyLossConfig(kl_coef=0.1), backend=backend)
    with pytest.raises(ValueError, match=r"ids_NS must be int64 \[N = 3, K\]"):
        ic.distrl_loss(head[0][:3], head[1], batch, backend=backend)
    with pytest.raises(ValueError, match="ids_NS must be below V = 11; got 50"):
        ic.distrl_loss(*head, replace(batch, ids_NS=torch.full((N, 1 + K), 50)), backend=backend)
    with pytest.raises(ValueError, match=r"logits must be \[N, V\]; got shape \(44,\)"):
        ic.distrl_loss_from_logits(torch.zeros(N * V), batch, backend=backend)


def test_the_default_budget_leaves_room_for_the_gradient_of_the_weight():
    hidden, weight = torch.empty(1, 2), torch.empty(3, 2)
    frozen = checked_budget(None, hidden, weight)
    assert frozen == checked_budget(None, hidden)
    assert checked_budget(None, hidden, weight.requires_grad_()) < frozen
    with torch.no_grad():
        assert checked_budget(None, hidden, weight) == frozen
    assert checked_budget(7, hidden, weight) == 7


@pytest.mark.skipif(not torch.cuda.is_available(), reason="values on a CPU are always checked")
def test_values_on_a_gpu_are_checked_on_demand(head):
    too_large = torch.full((N, K), V)
    assert ic.linear_logprobs(*head, too_large).logprobs_NK.isnan().all()
    with ic.checked_values(), pytest.raises(ValueError, match="ids must be below V = 11; got 11"):
        ic.linear_logprobs(*head, too_large)


def test_td_errors_refuse(head):
    with pytest.raises(ValueError, match=r"old_logprobs must be floating point \[N, S\] = \(4, 2\); got .* \(4, 3\)"):
        ic.linear_td_errors(*head, IDS, torch.zeros(N, 3), 10.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", [field.name for field in fields(ic.PolicyLossConfig)])
def test_settings_that_are_no_numbers_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*; got {value}"):
        ic.PolicyLossConfig(**{name: value})


def test_two_temperatures_are_refused(head, batch):
    with pytest.raises(ValueError, match=r"temperature must be 1 beside batch.temperatures_N; got 0.5"):
        ic.distrl_loss(*head, replace(batch, temperatures_N=torch.ones(N)), ic.PolicyLossConfig(temperature=0.5))


def test_the_reference_has_no_in_place_form(batch):
    with pytest.raises(ValueError, match="inplace=True needs backend 'triton' or 'chunked'; got 'reference'"):
        ic.distrl_loss_from_logits(torch.zeros(N, V), batch, inplace=True, backend="reference")


def test_a_named_backend_that_cannot_run_says_why(head):
    with pytest.raises(RuntimeError, match=r"backend 'triton' cannot run: .* an input is float64"):
        ic.linear_logprobs(*(x.double() for x in head), IDS, backend="triton")
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run: the tensors are on meta"):
        ic.linear_logprobs(*(x.to("meta") for x in (*head, IDS)), backend="triton")
