"""verl's FSDP2 engine with DistRL: candidates, TD errors and loss are those of full logits; on two processes too."""

import json

import pytest
import torch
import torch.distributed as dist
import verl_cases as cases
from ranks import free_port, run_ranks  # verl's package brings a package of the name tests
from verl_steps import (
    CANDIDATES,
    MODES,
    TD_ERRORS,
    expected_step,
    infer,
    logits,
    rank_main,
    reward_settings,
    reward_step,
    rows_of,
    start,
    step,
    with_slots,
)

import ipvrm_core as ic
from ipvrm_core import objectives
from ipvrm_core.objectives import RewardBatch


@pytest.fixture(scope="module")
def process_group():
    start(free_port())
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def engines(process_group, models):
    return cases.engine(models["policy"]), cases.engine(models["reward"])


@pytest.mark.parametrize("reference", [True, False])
def test_candidates_and_td_errors_are_those_of_full_logits(engines, models, reference):
    data = cases.batch()
    rows = rows_of(data)
    found = infer(engines[0], data, CANDIDATES)
    expected = ic.select_candidates_from_logits(
        logits(models["policy"], data)[0], rows.tokens_N, p_min=0.05, temperature=cases.T, backend="reference"
    )
    assert (expected.counts_N > 1).any()
    assert rows.packed(found["distrl_ids"]).equal(expected.ids_NS)
    torch.testing.assert_close(rows.packed(found["distrl_old"]), expected.logprobs_NS, rtol=1e-5, atol=1e-5)
    assert (found["distrl_ids"].values()[~rows.mask_R] == -1).all()

    data["distrl_ids"], data["distrl_old"] = found["distrl_ids"], found["distrl_old"]
    delta = rows.packed(infer(engines[1], data, {**TD_ERRORS, "reference": reference})["distrl_delta"])
    slots = expected.ids_NS, expected.logprobs_NS * reference
    theirs = ic.td_errors_from_logits(
        logits(models["reward"], data)[0], *slots, 2.0, temperature=cases.T, backend="reference"
    )
    torch.testing.assert_close(delta, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.7])
@pytest.mark.parametrize("mode", MODES)
def test_the_loss_is_autograds_on_full_logits(engines, models, mode, alpha):
    data = with_slots(cases.batch(), *engines)
    found, expected = step(engines[0], data, mode, alpha), expected_step(models["policy"], data, mode, alpha)
    assert found == pytest.approx(expected, rel=2e-6)


def test_without_distrl_it_is_verls_own_engine(process_group, models):
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    ours = cases.engine(models["policy"])
    assert isinstance(ours, FSDPEngineWithLMHead)
    found = step(ours, cases.batch(), "token-mean", 0.0)
    ours.__class__ = FSDPEngineWithLMHead
    assert found == step(ours, cases.batch(), "token-mean", 0.0)


@pytest.mark.parametrize("name", ["ipvrm", "implicit_prm", "prime"])
def test_the_reward_models_loss_is_the_objectives(engines, models, name):
    data, objective = cases.batch(), reward_settings(name).reward_objective()
    assert isinstance(objective, objectives.find(name))
    taken, rewards = reward_step(engines[1], data, name), torch.as_tensor(cases.REWARDS).float()
    found, model = logits(models["reward"], data, grad=True)
    rows = rows_of(data)
    score = (found / cases.T).log_softmax(-1).gather(1, rows.tokens_N[:, None])[:, 0]
    score = score - rows.packed(data["old_log_probs"])
    labels, mu = (rewards > 0.5).float(), rewards.view(-1, 2).mean(1).repeat_interleave(2)
    weights = torch.full((cases.B,), 1 / cases.B)
    if objective.dynamic_weights:
        weights = weights * ic.dynamic_loss_weights(labels, mu)
    boundary = ic.difficulty_boundary(mu) if objective.boundary else None
    loss = objective.loss(score, RewardBatch(rows.cu_seqlens, labels, weights, boundary))
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).item()
    assert taken == pytest.approx({"loss": loss.item(), "grad_norm": norm}, rel=1e-5)


def test_two_processes_do_what_one_does(engines, models, tmp_path):
    """FSDP2 on two gloo processes: the same candidates, the same gradient norms."""
    file = tmp_path / "found.json"
    run_ranks(rank_main, models, file)
    ids = infer(engines[0], cases.batch(), CANDIDATES)["distrl_ids"].values()
    assert torch.load(file.with_suffix(".pt")).equal(ids)
    data = with_slots(cases.batch(), *engines)
    alone = {mode: step(engines[0], data, mode, 0.7)["grad_norm"] for mode in MODES}
    alone["reward model"] = reward_step(engines[1], data, "ipvrm")["grad_norm"]
    assert json.loads(file.read_text()) == pytest.approx(alone, rel=2e-6)
