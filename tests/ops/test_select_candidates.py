"""The candidate rule of the chunked backend against the reference."""

import itertools
import math

import pytest
import torch

import ipvrm_core as ic


def head(N=45, D=6, V=211, dtype=torch.float32, scale=4.0):
    """Peaked rows: about one and a half tokens with p >= 0.1. Half of the sampled tokens are the most probable ones."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(N, D) * scale / D**0.5, torch.randn(V, D), torch.randn(V)
    hidden, weight, bias = (x.to(dtype) for x in (hidden, weight, bias))
    top = (hidden.double() @ weight.double().t() + bias.double()).argmax(-1)
    sampled = torch.where(torch.arange(N) % 2 == 0, top, torch.randint(V, (N,)))
    return hidden, weight, bias, sampled


def assert_same(got: ic.Candidates, want: ic.Candidates, tolerance: float) -> None:
    assert torch.equal(got.ids_NS, want.ids_NS)
    assert torch.equal(got.counts_N, want.counts_N)
    for name in ("logprobs_NS", "entropy_N"):
        ours, reference = getattr(got, name), getattr(want, name)
        assert ours.dtype == reference.dtype
        torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)
    assert (got.logprobs_NS[:, 1:][got.ids_NS[:, 1:] < 0] == 0).all()


RULES = [
    dict(zip(("strict", "top_k", "keep_sampled"), values, strict=True))
    for values in itertools.product([False, True], [None, 0, 1, 2, 5], [False, True])
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("p_min", [0.02, 0.1, 0.5])
def test_rules(p_min, rule, dtype):
    hidden, weight, bias, sampled = head(dtype=dtype)
    exclude = torch.arange(len(sampled)) % 7 == 0
    options = {"bias": bias, "temperature": 0.8, "exclude": exclude, **rule}
    got, want = (
        ic.select_candidates(hidden, weight, sampled, p_min, **options, backend=backend, max_buffer_bytes=8 * 211 * 16)
        for backend in ("auto", "reference")
    )
    if rule["top_k"] != 0:
        assert (want.counts_N > 0).any()  # the case says something
    assert (got.ids_NS[:, 1:][exclude] == -1).all()
    assert_same(got, want, 1e-12 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("softcap", [None, 6.0])
@pytest.mark.parametrize("temperature", [0.8, "rows"])
def test_logit_options(temperature, softcap):
    hidden, weight, bias, sampled = head()
    temperature = torch.linspace(0.5, 1.5, len(sampled)) if temperature == "rows" else temperature
    got, want = (
        ic.select_candidates(
            hidden, weight, sampled, 0.04, bias=bias, temperature=temperature, softcap=softcap, backend=backend
        )
        for backend in ("auto", "reference")
    )
    assert (want.counts_N > 0).sum() > 10
    assert_same(got, want, 2e-5)


@pytest.mark.parametrize("V", [1, 2, 3, 130, 1001])
@pytest.mark.parametrize("N", [0, 1, 9])
@pytest.mark.parametrize("keep_sampled", [False, True])
def test_from_logits_of_any_size(V, N, keep_sampled):
    torch.manual_seed(V)
    logits, sampled = torch.randn(N, V) * 3 - 100, torch.randint(V, (N,))
    got, want = (
        ic.select_candidates_from_logits(
            logits, sampled, keep_sampled=keep_sampled, backend=backend, max_buffer_bytes=1
        )
        for backend in ("auto", "reference")
    )
    assert_same(got, want, 2e-5)


@pytest.mark.parametrize(("top_k", "ids"), [(1, [1, -1]), (2, [1, 3]), (3, [1, 3, 4]), (None, [1, 3, 4, 6])])
def test_equal_probabilities_keep_the_smaller_ids(top_k, ids):
    """p = 0.24 for tokens 1, 3, 4, 6."""
    logits = torch.full((1, 8), math.log(0.01), dtype=torch.float64)
    logits[0, [1, 3, 4, 6]] = math.log(0.24)
    got = ic.select_candidates_from_logits(logits, torch.tensor([0]), 0.2, top_k=top_k)
    assert got.ids_NS[:, 1:][0].tolist() == [i for i in ids if i >= 0] + [-1] * (
        got.ids_NS[:, 1:].shape[1] - sum(i >= 0 for i in ids)
    )
    assert got.counts_N.tolist() == [sum(i >= 0 for i in ids)]


def test_equal_probabilities_at_scale():
    """Whole rows of few distinct values: the order among equals must never come from the top-k itself."""
    torch.manual_seed(1)
    logits = torch.randint(0, 3, (200, 30)) * 4.0
    for top_k in (1, 2, 3, 4):
        got, want = (
            ic.select_candidates_from_logits(logits, torch.zeros(200, dtype=torch.int64), 0.04, top_k=top_k, backend=b)
            for b in ("auto", "reference")
        )
        assert_same(got, want, 2e-5)


@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threshold_met_exactly(dtype, backend):
    """n equal tokens and P_min = 1/n, where rounding would decide: all of them are members, and with strict none."""
    for n in (1, 3, 6, 7, 10, 13, 127):
        logits = torch.full((2, n + 2), -math.inf, dtype=dtype)
        logits[0, :n], logits[1, 2:] = 7.3, -41.7
        for strict in (False, True):
            got = ic.select_candidates_from_logits(
                logits, torch.zeros(2, dtype=torch.int64), 1 / n, strict=strict, temperature=0.7, backend=backend
            )
            assert got.counts_N.tolist() == ([0, 0] if strict else [n, n]), n
            if not strict:
                assert got.ids_NS[:, 1:].tolist() == [list(range(n)), list(range(2, n + 2))]


@pytest.mark.parametrize("backend", ["auto", "chunked", "reference"])
def test_padding_as_the_sampled_token(backend):
    """keep_sampled has nothing to keep there."""
    logits = torch.tensor([[3.0, 2.9, -5.0], [9.0, 0.0, 0.0]])
    got = ic.select_candidates_from_logits(logits, torch.tensor([-1, 1]), 0.4, keep_sampled=True, backend=backend)
    assert got.ids_NS[:, 1:].tolist() == [[0, 1, -1], [0, 1, -1]]
    assert got.counts_N.tolist() == [2, 2]
    assert got.sampled_logprobs_N[0] == 0


def test_p_min_one_keeps_certain_tokens_only():
    logits = torch.tensor([[0.0, -math.inf, -math.inf], [0.0, 0.0, -math.inf]])
    got = ic.select_candidates_from_logits(logits, torch.tensor([1, 0]), 1.0)
    assert got.ids_NS[:, 1:].tolist() == [[0], [-1]]
    assert got.sampled_logprobs_N[0] == -math.inf
    torch.testing.assert_close(got.entropy_N, torch.tensor([0.0, math.log(2)]))


def test_no_gradient_and_no_graph():
    hidden, weight, _, sampled = head()
    got = ic.select_candidates(hidden.requires_grad_(), weight.requires_grad_(), sampled)
    assert not any(value.requires_grad for value in got)


def test_results_do_not_depend_on_the_budget():
    hidden, weight, bias, sampled = head(dtype=torch.float64)
    results = [
        ic.select_candidates(hidden, weight, sampled, bias=bias, keep_sampled=True, top_k=2, max_buffer_bytes=budget)
        for budget in (1, 16 * 211 * 4, None)
    ]
    assert_same(results[0], results[2], 1e-12)
    assert_same(results[1], results[2], 1e-12)
