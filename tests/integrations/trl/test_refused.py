"""What cannot be done is refused at construction, by its name."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from ipvrm_core.integrations.trl import DistRL
from ipvrm_core.integrations.trl.settings import check
from tests.integrations.trl import cases


def with_head(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))


def test_adapters_on_the_head(build, models):
    with pytest.raises(ValueError, match=r"lm_head|output head"):
        build(policy=with_head(cases.model_of(models, "untied")))
    with pytest.raises(ValueError, match="output head has adapters"):
        build(reward_model=with_head(cases.model_of(models, "untied")))


def test_another_vocabulary(build, models):
    other = cases.model_of(models, "reward")
    other.resize_token_embeddings(25)
    with pytest.raises(ValueError, match="reward_model must have the policy's vocabulary, 19 tokens; got 25"):
        build(reward_model=other)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"loss_type": cases.LOSS_TYPES[-1]}, f"loss_type='{cases.LOSS_TYPES[-1]}'"),
        ({"loss_type": "vespo"}, "loss_type='vespo'"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level='sequence'"),
        ({"top_entropy_quantile": 0.2}, "top_entropy_quantile=0.2"),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold=0.5"),
        ({"delta": 1.1}, "delta=1.1"),
        ({"loss_type": "cispo", "beta": 0.1}, "beta and loss_type='cispo'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_fused_is_not_equal_to(build, config, named):
    with pytest.raises(ValueError, match=f"fused=True is not equal to TRL's loss with {named}"):
        build(config, {"fused": True})
    build(config)


@pytest.mark.skipif(cases.VERSION < (1, 14), reason="TRL has no entropy bonus there")
def test_the_entropy_bonus_is_not_in_the_fused_loss(build):
    with pytest.raises(ValueError, match="fused=True is not equal to TRL's loss with an entropy bonus"):
        build({"entropy_coef": 0.01}, {"fused": True})


@pytest.mark.parametrize("name", ["cp_size", "sp_size"])
def test_parts_of_sequences(build, name):
    """TRL refuses them in its own configuration, or does not know them; then DistRL does."""
    trainer = build()

    class Parallel:
        cp_size = sp_size = 1

    setattr(Parallel, name, 2)
    trainer.args.parallelism_config = Parallel()
    with pytest.raises(ValueError, match=rf"parallelism_config.{name} > 1"):
        check(trainer)


@pytest.mark.skipif(cases.VERSION >= (1, 10), reason="trained with there")
def test_luspo_where_it_counts_padding(build):
    with pytest.raises(ValueError, match="loss_type='luspo' counts padding in this version of TRL"):
        build({"loss_type": "luspo"})


@pytest.mark.skipif(cases.VERSION >= (1, 14), reason="its layers alone there: see test_training.py")
def test_liger_where_it_is_a_loss(build, monkeypatch):
    trainer = build()
    trainer.use_liger_kernel = True
    with pytest.raises(ValueError, match="use_liger_kernel=True replaces the loss"):
        check(trainer)


@pytest.mark.parametrize(
    ("distrl", "more", "named"),
    [
        ({}, {"reward_model": None}, "reward_model must be given for alpha=0.1"),
        ({"alpha": 0.0, "estimator": "td"}, {"reward_model": None}, "reward_model must be given for alpha=0.0"),
        ({"td_reference": "sft"}, {}, "reference_model must be given"),
        ({"estimator": "msa", "alpha": 0.0}, {"reward_model": None}, "reference_model must be given"),
        ({"objective": "qrm"}, {}, "'qrm' has a value head"),
        ({"objective": "dpo", "online": "before"}, {}, "online='before' needs an objective of single answers"),
        ({"objective": "endorm", "online": "after"}, {}, "online='after' needs an objective of single answers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_models_that_are_missing_or_do_not_fit(build, distrl, more, named):
    with pytest.raises(ValueError, match=named):
        build({}, distrl, **more)


def test_a_reward_model_that_learns_in_bfloat16(build, models):
    with pytest.raises(ValueError, match="a reward model that learns must be float32"):
        build({}, {"online": "before"}, reward_model=cases.model_of(models, "reward").to(torch.bfloat16))


def test_a_reward_model_that_learns_and_is_frozen(build, models):
    with pytest.raises(ValueError, match="online='before': no parameter of reward_model requires a gradient"):
        build({}, {"online": "before"}, reward_model=cases.model_of(models, "reward").requires_grad_(False))


def test_the_policys_own_adapter_as_reward_model(build, models):
    with pytest.raises(ValueError, match="reward_model='default' is the adapter that the policy trains"):
        build(policy=cases.lora(cases.model_of(models, "tied")), reward_model="default")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"clip_high": 0.3}, r"clip_high is the framework's: set GRPOConfig\(epsilon_high=...\); got 0.3"),
        ({"aggregation": "token_mean"}, "aggregation is the framework's"),
        ({"sigma_scope": "minibatch"}, "sigma_scope is the framework's"),
        ({"outcome": "rloo"}, "outcome is the framework's"),
        ({"online": "always"}, "online must be one of 'none', 'before', 'after'; got 'always'"),
        ({"online": "after", "learning_rate": 0.0}, "learning_rate must be > 0"),
        ({"estimator": "best"}, "estimator must be one of"),
        ({"objective": "best"}, "objective must be one of"),
        ({"p_min": 0.0}, r"p_min must be in \(0, 1\]"),
        ({"alpha": -1.0}, "alpha must be >= 0"),
        ({"fused": "yes"}, "fused must be True or False"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings(settings, named):
    with pytest.raises(ValueError, match=named):
        DistRL(**settings)
