"""Credit on the trainer's process, and what is refused by name."""

from types import SimpleNamespace

import pytest
import torch
import verl_cases as cases
from omegaconf import OmegaConf
from verl.trainer.ppo.core_algos import agg_loss

import ipvrm_core as ic
from ipvrm_core.integrations.verl.credit import credited, reward_fields
from ipvrm_core.integrations.verl.engine import row_weights
from ipvrm_core.integrations.verl.rows import Rows
from ipvrm_core.integrations.verl.settings import DistRL
from ipvrm_core.integrations.verl.trainer import check


def slots(rows: Rows, data) -> dict:
    """Random TD errors at three slots."""
    generator = torch.Generator().manual_seed(5)
    count = len(rows.tokens_N)
    ids = torch.stack([rows.tokens_N, *torch.randint(3, cases.V, (2, count), generator=generator)], dim=1)
    values = {"ids": ids, "old": -1 - torch.rand(count, 3), "delta": torch.randn(count, 3, generator=generator)}
    return {"advantages": data["advantages"], **{f"distrl_{name}": rows.nested(v) for name, v in values.items()}}


def test_credit_is_distrls_with_verls_outcome():
    data = cases.batch()
    rows, rewards = Rows.of(data["input_ids"], data["response_mask"]), torch.as_tensor(cases.REWARDS).float()
    given = slots(rows, data)
    found = credited(DistRL(reward_model="x", process_coef=0.5), rows, given, rewards, cases.uids())
    packed = [rows.packed(given[f"distrl_{name}"]) for name in ("delta", "ids", "old")]
    plain = ic.Method(outcome="reinforce", process_coef=0.5)
    expected = ic.distrl_advantages(*packed, torch.zeros(cases.B), rows.cu_seqlens, cases.uids(), plain)
    expected[:, 0] += rows.packed(data["advantages"])
    torch.testing.assert_close(rows.packed(found["distrl_adv"]), expected)
    assert rows.packed(found["advantages"]).equal(rows.packed(found["distrl_adv"])[:, 0])
    assert (found["advantages"].values()[~rows.mask_R] == 0).all()


def test_a_padding_sequence_has_no_tokens():
    data = cases.batch()
    masks = [mask * (b != 4) for b, mask in enumerate(data["response_mask"].unbind())]
    rows = Rows.of(data["input_ids"], cases.jagged(masks))
    given = slots(rows, data)
    found = credited(DistRL(reward_model="x"), rows, given, torch.zeros(cases.B), cases.uids())
    assert found["distrl_adv"].values().isfinite().all()
    assert found["advantages"].unbind()[4].abs().sum() == 0


def test_a_critics_advantages_are_refused():
    data = cases.batch()
    rows = Rows.of(data["input_ids"], data["response_mask"])
    given = slots(rows, data) | {"advantages": rows.nested(torch.arange(len(rows.tokens_N)).float())}
    with pytest.raises(ValueError, match=r"algorithm\.adv_estimator must give one advantage an answer"):
        credited(DistRL(reward_model="x"), rows, given, torch.zeros(cases.B), cases.uids())


def test_the_reward_models_fields():
    settings = DistRL(reward_model="x", online="before")
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.2])
    found = reward_fields(settings, settings.reward_objective(), rewards, ["a", "a", "b", "b"])
    assert found["distrl_labels"].tolist() == [1, 0, 0, 0]
    assert found["distrl_weights"].tolist() == [0.125, 0.125, 0, 0]  # half of 1/4; nothing to learn from prompt b
    assert found["distrl_boundary"].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "distrl must have keys of"),
        ({"reward_model": "x", "p_minimum": 0.1}, "distrl must have keys of"),
        ({"alpha": 0.1}, "distrl.reward_model must be the path of a reward model; got None"),
        ({"reward_model": "x", "outcome": "rloo"}, "outcome is the framework's: set algorithm.adv_estimator"),
        ({"reward_model": "x", "td_reference": "sft"}, "td_reference is the framework's"),
        ({"reward_model": "x", "estimator": "prime"}, "estimator 'prime' has its own outcome"),
        ({"reward_model": "x", "objective": "repirl", "online": "after"}, "objective 'repirl' looks at all answers"),
        ({"reward_model": "x", "objective": "qrm"}, "'qrm' has a value head"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings(given, named):
    with pytest.raises(ValueError, match=named):
        DistRL.of(OmegaConf.create({"distrl": given}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("actor_rollout_ref.actor.strategy", "megatron"),
        ("actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size", 2),
        ("algorithm.rollout_correction.bypass_mode", True),
    ],
)
def test_what_distrl_cannot_do_is_refused_by_its_key(key, value):
    actor = {"strategy": "fsdp2", "fsdp_config": {"ulysses_sequence_parallel_size": 1}}
    config = OmegaConf.create({"actor_rollout_ref": {"actor": actor}, "algorithm": {"rollout_correction": {}}})
    check(config)
    OmegaConf.update(config, key, value, force_add=True)
    with pytest.raises(ValueError, match=key.removeprefix("actor_rollout_ref.")):
        check(config)


def test_sequence_parallel_engines_are_refused():
    from ipvrm_core.integrations.verl.engine import DistRLEngineMixin

    with pytest.raises(ValueError, match="ulysses_sequence_parallel_size > 1"):
        DistRLEngineMixin._build_module(SimpleNamespace(use_ulysses_sp=True))


def test_padded_batches_are_refused():
    data = cases.batch()
    with pytest.raises(ValueError, match="must be nested"):
        Rows.of(data["input_ids"].to_padded_tensor(0), data["response_mask"])


@pytest.mark.parametrize(
    ("mode", "scale"),
    [
        ("token-mean", None),
        ("token-sum", None),
        ("seq-mean-token-mean", None),
        ("seq-mean-token-sum", None),
        ("seq-mean-token-sum-norm", None),
        ("seq-mean-token-sum-norm", 100),
    ],
)
def test_the_weights_of_rows_are_the_derivatives_of_verls_aggregation(mode, scale):
    data = cases.batch()
    rows, mask_BR = Rows.of(data["input_ids"], data["response_mask"]), data["response_mask"].to_padded_tensor(0).float()
    given = {"dp_size": 2, "batch_num_tokens": 77, "global_batch_size": 5}
    losses_BR = torch.zeros_like(mask_BR, requires_grad=True)
    agg_loss(losses_BR, mask_BR, mode, loss_scale_factor=scale, **given).backward()
    torch.testing.assert_close(row_weights(rows, mode, scale, given), losses_BR.grad[mask_BR.bool()])
