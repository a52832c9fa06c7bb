"""The two settings of the method, row by row as the table of presets has them, and the batches that go with them."""

import inspect
import math
from dataclasses import asdict, fields
from typing import get_args, get_type_hints

import pytest
import torch

from ipvrm_core.credit import batch_sigma
from ipvrm_core.method import METHODS, Method
from ipvrm_core.reference.candidates import candidate_slots, select_candidates_from_logits
from ipvrm_core.trainer.config import Batch, Rl
from ipvrm_core.trainer.config.policy import BATCHES
from ipvrm_core.types import PolicyLossConfig

TABLE = {
    # setting: (paper, official)
    "online_margin": (5.0, 5.0),
    "online_boundary": (True, True),
    "dlw_scale": ("raw", "group"),
    "online_reference": ("old", "old"),
    "td_reference": ("old", "old"),
    "p_min": (0.1, 0.1),
    "strict": (False, True),  # pi_old >= 0.1, pi_old > 0.1
    "top_k": (None, 5),
    "keep_sampled": (False, True),
    "skip_last_token": (False, True),
    "sigma_scope": ("minibatch", "batch"),
    "sigma_form": ("std_plus_eps", "floored_std"),
    "process_normalize": ("group", "batch"),
    "process_coef": (1.0, 0.05),
    "outcome": ("grpo", "grpo"),
    "estimator": ("gae", "gae"),
    "gamma": (1.0, 1.0),
    "lam": (1.0, 1.0),
    "candidate_baseline": ("none", "none"),  # ours, as the next four
    "single_candidate": ("same", "same"),
    "candidate_form": ("sigma_v", "sigma_v"),
    "sigma_min": (0.0, 0.0),
    "sigma_max": (None, None),
    "alpha": (0.1, 0.1),
    "clip_low": (0.20, 0.20),
    "clip_high": (0.28, 0.28),
    "dual_clip": (None, 3.0),
    "candidate_clip_low": (0.20, 0.20),
    "candidate_clip_high": (0.28, 0.20),
    "candidate_dual_clip": (None, 3.0),
    "aggregation": ("sequence_mean", "token_mean"),
}
BATCH_TABLE = {
    "prompts": (512, 1024),
    "keep_prompts": (256, 512),
    "rollouts": (4, 16),
    "too_few_mixed": ("sample_on", "fill"),
    "accuracy_range": ((0.0, 1.0), (0.0, 1.0)),  # every mixed prompt
    "max_rounds": (4, 4),  # ours
}


@pytest.mark.parametrize("setting", TABLE)
def test_setting(setting):
    assert (getattr(METHODS["paper"], setting), getattr(METHODS["official"], setting)) == TABLE[setting]


def test_the_table_holds_every_setting_and_there_are_three_presets():
    assert {field.name for field in fields(Method)} == set(TABLE)
    assert list(METHODS) == ["paper", "official", "ipvrm-core"]
    assert METHODS["paper"] == Method()


def test_what_ours_has_beside_the_papers():
    ours, paper = asdict(METHODS["ipvrm-core"]), asdict(METHODS["paper"])
    assert {name: value for name, value in ours.items() if value != paper[name]} == {
        "candidate_baseline": "mean",
        "candidate_form": "sign",
        "single_candidate": "agreement",
        "process_normalize": "batch",
        "process_coef": 0.05,
        "alpha": 1.0,
    }
    assert BATCHES["ipvrm-core"] == BATCHES["paper"]


@pytest.mark.parametrize("setting", BATCH_TABLE)
def test_setting_of_a_batch(setting):
    found = [getattr(Rl(preset=preset).batch, setting) for preset in ("paper", "official")]
    assert tuple(found) == BATCH_TABLE[setting]


def test_the_batches_have_every_setting_and_no_other():
    assert set(Batch.model_fields) == set(BATCH_TABLE)
    assert list(BATCHES) == list(METHODS)
    Batch.model_validate(BATCHES["paper"] | BATCHES["official"])


def test_every_setting_has_a_meaning():
    hints = get_type_hints(Method, include_extras=True)
    assert set(hints) == set(TABLE)
    assert [name for name, hint in hints.items() if not isinstance(get_args(hint)[1], str)] == []


def test_loss_config():
    assert METHODS["paper"].loss_config() == PolicyLossConfig()
    assert METHODS["official"].loss_config(temperature=0.7) == PolicyLossConfig(
        alpha=0.1,
        clip_low=0.2,
        clip_high=0.28,
        dual_clip=3.0,
        candidate_clip_low=0.2,
        candidate_clip_high=0.2,
        candidate_dual_clip=3.0,
        temperature=0.7,
        kl_coef=0.0,
        entropy_coef=0.0,
    )
    assert METHODS["official"].loss_config(alpha=0.0, kl_coef=0.2) == PolicyLossConfig(
        alpha=0.0, dual_clip=3.0, candidate_clip_high=0.2, candidate_dual_clip=3.0, kl_coef=0.2
    )


def test_candidate_rule_is_what_select_candidates_takes():
    for preset, rule, slots in (
        ("paper", {"p_min": 0.1, "strict": False, "top_k": None, "keep_sampled": False}, 10),
        ("official", {"p_min": 0.1, "strict": True, "top_k": 5, "keep_sampled": True}, 6),
    ):
        assert METHODS[preset].candidate_rule() == rule
        assert set(rule) <= set(inspect.signature(select_candidates_from_logits).parameters)
        assert candidate_slots(rule["p_min"], top_k=rule["top_k"], keep_sampled=rule["keep_sampled"]) == slots


def test_the_bounds_of_sigma():
    for settings in ({"sigma_min": -1.0}, {"sigma_min": math.nan}, {"sigma_max": 0.0}, {"sigma_max": math.inf}):
        with pytest.raises(ValueError, match=rf"{next(iter(settings))} must be .* got {next(iter(settings.values()))}"):
            Method(**settings)
    with pytest.raises(ValueError, match=r"sigma_max must be .* >= sigma_min = 2.0, or None; got 1.0"):
        Method(sigma_min=2.0, sigma_max=1.0)
    values = torch.tensor([1.0, 3.0])  # std 1
    bounds = ({}, {"sigma_min": 4.0}, {"sigma_max": 0.5}, {"sigma_min": 0.25, "sigma_max": 8.0})
    assert [round(batch_sigma(values, Method(**given)).item(), 5) for given in bounds] == [1.0, 4.0, 0.5, 1.0]
