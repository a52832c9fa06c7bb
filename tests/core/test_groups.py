"""Groups of any hashable uid, and statistics over the batches of several processes: as if all were one batch."""

from dataclasses import replace

import pytest
import torch

import ipvrm_core as ic
from ipvrm_core import estimators
from ipvrm_core.credit import Credit, assign_credit, batch_sigma
from ipvrm_core.packing import cu_seqlens_from_lengths
from ipvrm_core.sequences.groups import gather, group_index
from tests.ranks import run_ranks

LENGTHS = [3, 1, 4, 2, 5, 2]
UIDS = ["x", ("y", 2), "x", ("y", 2), "x", 7]  # one prompt on both processes, one of a single answer
REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
SPLIT = 2  # answers of the first process
METHODS = {
    **ic.METHODS,
    **{name: replace(ic.METHODS["paper"], estimator=name, outcome="rloo") for name in estimators.names()},
}


def test_uids_are_numbered_in_their_order():
    assert group_index(UIDS, 6, torch.device("cpu")).tolist() == [0, 1, 0, 1, 0, 2]
    numbers = torch.tensor([5, 3])
    assert group_index(numbers, 2, numbers.device) is numbers
    with pytest.raises(ValueError, match="groups must be one a sequence, 5; got 6"):
        group_index(UIDS, 5, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"groups must be integers \[B\] = \(3,\); got torch.int64, shape \(2,\)"):
        group_index(numbers, 3, numbers.device)


def test_uids_give_what_integers_give():
    integers, cu = torch.tensor([0, 1, 0, 1, 0, 2]), cu_seqlens_from_lengths(torch.tensor(LENGTHS))
    x = torch.randn(sum(LENGTHS), generator=torch.Generator().manual_seed(0))
    for function in (ic.outcome_advantages, ic.rloo_advantages):
        assert torch.equal(function(REWARDS, UIDS), function(REWARDS, integers))
    assert torch.equal(ic.group_normalize(x, cu, UIDS), ic.group_normalize(x, cu, integers))
    assert torch.equal(ic.masked_step_advantages(x, cu, UIDS), ic.masked_step_advantages(x, cu, integers))
    assert torch.equal(ic.prime_advantages(x, REWARDS, cu, UIDS), ic.prime_advantages(x, REWARDS, cu, integers))


def credit_of(rows: slice, answers: slice, method: ic.Method, process_group) -> tuple[Credit, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    delta, logprobs = torch.randn(sum(LENGTHS), 3, generator=rng), -torch.rand(sum(LENGTHS), 3, generator=rng)
    cu = cu_seqlens_from_lengths(torch.tensor(LENGTHS[answers]))
    given = delta[rows], torch.ones(delta[rows].shape).long(), logprobs[rows], REWARDS[answers], cu, UIDS[answers]
    credit = assign_credit(*given, method, process_group, beta=0.5)
    return credit, batch_sigma(credit.values_N, method, process_group)


def _rank(rank: int, expected: dict) -> None:
    from torch.distributed import group, init_process_group

    init_process_group("gloo")
    tokens = sum(LENGTHS[:SPLIT])
    rows, answers = (slice(0, tokens), slice(0, SPLIT)) if rank == 0 else (slice(tokens, None), slice(SPLIT, None))
    found = gather(REWARDS[answers], UIDS[answers], group.WORLD)
    assert torch.equal(found.values, REWARDS)
    assert found.groups.tolist() == [0, 1, 0, 1, 0, 2]
    for name, (whole, sigma) in expected.items():
        credit, own_sigma = credit_of(rows, answers, METHODS[name], group.WORLD)
        torch.testing.assert_close(own_sigma, sigma)
        torch.testing.assert_close(credit.credit_NS, whole.credit_NS[rows], rtol=1e-5, atol=1e-5)
    totals = ic.Normalizers(torch.tensor(rank + 1.0), 2.0, torch.tensor(0.5)).across(group.WORLD)
    assert [float(value) for value in totals] == [3.0, 4.0, 1.0]


def test_two_processes_give_what_one_gives():
    everything = slice(None), slice(None)
    expected = {name: credit_of(*everything, method, None) for name, method in METHODS.items()}
    run_ranks(_rank, expected)
