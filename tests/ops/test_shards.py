"""A head whose vocabulary is split over 2 and 3 processes, against the whole head: every function, every gradient."""

import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import ipvrm_core as ic
from ipvrm_core.dispatch import why_no_triton
from tests.ops.problems import CONFIGS, Problem, logprobs_and_gradients, loss_and_gradients, make_problem
from tests.ranks import run_ranks

N, D, V, K = 9, 6, 101, 5
BORDERS = {2: [0, 51, V], 3: [0, 60, 61, V]}  # a rank with one column
TRITON = why_no_triton(torch.empty(0)) is None
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
SETTINGS = ("everything", "softcap_entropy") if TRITON else ("paper", "grpo", "everything", "softcap_entropy")


def problems(dtype: torch.dtype):
    """Name -> (problem, config): masked rows, padding, equal ids, ids of every rank; far and absent old log-probs."""
    for name in SETTINGS:
        config = CONFIGS[name]
        yield (
            name,
            make_problem(N, D, V, K, dtype=dtype, temperature=config.temperature, softcap=config.softcap),
            config,
        )
    yield "a temperature a row", make_problem(N, D, V, K, dtype=dtype, temperature="rows"), CONFIGS["paper"]
    problem = make_problem(N, D, V, K, dtype=dtype)
    yield "on-policy", replace(problem, batch=replace(problem.batch, old_logprobs_NS=None)), CONFIGS["paper"]
    old = problem.batch.old_logprobs_NS * torch.tensor([30.0, 0.0, 1.0]).repeat(N)[:N, None]
    yield "far old log-probs", replace(problem, batch=replace(problem.batch, old_logprobs_NS=old)), CONFIGS["paper"]


def results(problem: Problem, config: ic.PolicyLossConfig, shard: ic.VocabularyShard | None) -> list[torch.Tensor]:
    """Everything that the head gives; with a shard from this rank's part of it, gradients of the weight among them."""
    batch, ids = problem.batch, problem.batch.ids_NS
    transform = {"temperature": config.temperature, "softcap": config.softcap}
    if batch.temperatures_N is not None:
        transform["temperature"] = batch.temperatures_N
    options = {"bias": problem.bias, "shard": shard, "max_buffer_bytes": 16 * 7 * V}
    head = (problem.hidden, problem.weight)
    found = loss_and_gradients(ic.distrl_loss(*head, batch, config, **options), problem.inputs, 2.0)
    found += logprobs_and_gradients(ic.linear_logprobs(*head, ids, **transform, **options), problem.inputs, "all")
    near = torch.full((N,), -3.0)
    for given in (None, near):
        loss = ic.row_loss(
            *head, ids, lambda logprobs, rows: own_loss(logprobs, batch, rows), near=given, **transform, **options
        )
        found += [loss.detach(), *torch.autograd.grad(loss, problem.inputs)]
    for rule in ({}, {"p_min": 0.02, "top_k": 3, "keep_sampled": True}):
        found += list(ic.select_candidates(*head, ids[:, 0], **rule, **transform, **options))
    if batch.old_logprobs_NS is None:
        tokens = replace(batch, ids_NS=ids[:, :1].contiguous(), advantages_NS=batch.advantages_NS[:, :1])
        judge = (problem.hidden.detach() + 0.1, 1.1 * problem.weight.detach())
        out = ic.on_policy_distrl_loss(*head, tokens, *judge, 10.0, 0.7, config, p_min=0.02, **options)
        found += [out.loss.detach(), *out.candidates, out.td_errors_NS, *torch.autograd.grad(out.loss, problem.inputs)]
    found.append(ic.linear_td_errors(*head, ids, torch.full(ids.shape, -2.0), 10.0, **transform, **options))
    return found


def own_loss(logprobs: ic.LogProbs, batch: ic.PolicyBatch, rows: slice) -> torch.Tensor:
    return (batch.token_weights_N[rows] * (logprobs.logprobs_NK.exp().sum(1) + logprobs.lse_N)).sum()


def _rank(rank: int, world: int, dtype: torch.dtype) -> None:
    if TRITON:
        from ipvrm_core.bench.interpreter import patch_once

        patch_once()
    dist.init_process_group("gloo")
    columns = slice(*BORDERS[world][rank : rank + 2])
    torch.manual_seed(3)
    for name, problem, config in problems(dtype):
        parts = [x.detach()[columns].requires_grad_() for x in (problem.weight, problem.bias)]
        shard = ic.VocabularyShard.of(parts[0])
        assert (shard.first, shard.vocabulary) == (columns.start, V)
        got = results(Problem(problem.hidden, *parts, problem.batch), config, shard)
        want = results(problem, config, None)
        for i, (mine, whole) in enumerate(zip(got, want, strict=True)):
            whole = whole[columns] if whole.dim() and len(whole) == V else whole
            torch.testing.assert_close(
                mine,
                whole,
                rtol=TOLERANCE[dtype],
                atol=TOLERANCE[dtype],
                msg=lambda m: f"{name}, output {i}: {m}",  # noqa: B023
            )
        if name == "everything":
            _as_dtensors(problem, config, want[0])


def _as_dtensors(problem: Problem, config: ic.PolicyLossConfig, loss: torch.Tensor) -> None:
    """Whole on every rank, or split by rows with a shard; split without one is refused."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    given = {"bias": problem.bias.detach()}

    def run(placement, **options) -> torch.Tensor:
        weight = distribute_tensor(problem.weight.detach(), mesh, [placement])
        if "shard" in options:
            options["shard"] = ic.VocabularyShard.of(weight)
            first = options["shard"].first
            given["bias"] = problem.bias.detach()[first : first + len(weight.to_local())]
        return ic.distrl_loss(problem.hidden, weight, problem.batch, config, **given, **options).loss

    torch.testing.assert_close(run(Replicate()).detach(), loss, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"weight must be whole on every rank.*Shard\(dim=0\).*full_tensor"):
        run(Shard(0))
    torch.testing.assert_close(run(Shard(0), shard=True).detach(), loss, rtol=1e-5, atol=1e-5)


CASES = [(torch.float32, 3)] if TRITON else [(torch.float32, 2), (torch.float64, 3)]


@pytest.mark.parametrize(("dtype", "world"), CASES)
def test_a_split_head_is_the_whole_head(dtype, world):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run_ranks(_rank, world, dtype, world=world)


def test_the_reference_has_no_shards():
    problem, shard = make_problem(4, 3, 10, 2), ic.VocabularyShard("any", 0, 20, 10)
    with pytest.raises(ValueError, match="backend 'triton' or 'chunked'; got 'reference'"):
        ic.distrl_loss(problem.hidden, problem.weight, problem.batch, shard=shard, backend="reference")


def test_a_weight_that_is_not_the_shards_is_refused():
    problem, shard = make_problem(4, 3, 10, 2), ic.VocabularyShard("any", 15, 20, 10)
    with pytest.raises(ValueError, match="got V_r = 10"):
        ic.distrl_loss(problem.hidden, problem.weight, problem.batch, shard=shard)


def test_a_shard_needs_processes():
    with pytest.raises(RuntimeError, match="init_process_group"):
        ic.VocabularyShard.of(torch.empty(3, 2))
