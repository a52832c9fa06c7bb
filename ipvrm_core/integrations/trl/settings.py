"""What a user sets, and what is refused by name before anything runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from ipvrm_core import estimators
from ipvrm_core.heads import head_of
from ipvrm_core.integrations.settings import Hosted

CLIPPED, BY_ROWS = ("grpo", "bnpo", "dr_grpo", "dapo"), ("cispo", "sapo")  # what `fused` knows: distrl_loss, row_loss


@dataclass(frozen=True)
class DistRL(Hosted):
    """The switches of `Method` that GRPOConfig does not have, the reward model's learning, and the way to run."""

    theirs: ClassVar[Mapping[str, str]] = {
        "outcome": "GRPOConfig(scale_rewards=...)",
        "clip_low": "GRPOConfig(epsilon=...)",
        "clip_high": "GRPOConfig(epsilon_high=...)",
        "dual_clip": "GRPOConfig(delta=...)",
        "aggregation": "GRPOConfig(loss_type=...)",
        "sigma_scope": "GRPOConfig(steps_per_generation=...)",
    }

    learning_rate: Annotated[float, "of AdamW for the reward model that learns"] = 1e-6
    fused: Annotated[bool, "replace TRL's loss by the fused one; refused where they are not equal"] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fused not in (True, False):
            raise ValueError(f"fused must be True or False; got {self.fused!r}")
        if self.online != "none" and not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be > 0 for a reward model that learns; got {self.learning_rate}")


def trl_version() -> tuple[int, ...]:
    """(major, minor) of the installed TRL."""
    import trl

    return tuple(map(int, trl.__version__.split(".")[:2]))


def check(trainer) -> None:
    """ValueError for what DistRL cannot do: a parallel way to run, a model, a combination of settings."""
    from transformers import ProcessorMixin

    d, a = trainer.distrl, trainer.args
    parallel = getattr(a, "parallelism_config", None)
    for name in ("cp_size", "sp_size"):
        if parallel is not None and getattr(parallel, name, 1) > 1:
            raise ValueError(f"DistRL needs whole sequences on a process; got parallelism_config.{name} > 1")
    if isinstance(trainer.processing_class, ProcessorMixin):
        raise ValueError(f"DistRL is for language models without images; got a {type(trainer.processing_class)}")
    if trainer.is_deepspeed_enabled and a.deepspeed_plugin.zero_stage == 3:
        raise ValueError("DistRL does not support DeepSpeed ZeRO-3, which takes the head's weight apart; use FSDP2")
    if getattr(trainer, "use_liger_kernel", False) and hasattr(trainer, "compute_liger_loss"):
        raise ValueError("use_liger_kernel=True replaces the loss in this version of TRL, which DistRL adds to")
    if trainer.loss_type == "luspo" and trl_version() < (1, 10):
        raise ValueError("loss_type='luspo' counts padding in this version of TRL; DistRL needs 1.10 or newer for it")
    head_of(trainer.model)  # ValueError for one with adapters
    if d.fused:
        _check_fused(trainer)


def _check_fused(trainer) -> None:
    a, kind = trainer.args, trainer.loss_type
    corrected = trainer.use_vllm and trainer.vllm_importance_sampling_correction
    for impossible, what in (
        (kind not in CLIPPED + BY_ROWS, f"loss_type={kind!r}"),
        (trainer.importance_sampling_level != "token", "importance_sampling_level='sequence'"),
        (a.top_entropy_quantile < 1, f"top_entropy_quantile={a.top_entropy_quantile}"),
        (a.off_policy_mask_threshold is not None, f"off_policy_mask_threshold={a.off_policy_mask_threshold}"),
        (getattr(a, "entropy_coef", 0) or getattr(a, "use_adaptive_entropy", False), "an entropy bonus"),
        (getattr(trainer, "aux_loss_enabled", False), "router_aux_loss_coef"),
        (a.delta is not None and a.delta <= 1 + trainer.epsilon_high, f"delta={a.delta}, within the clipped range"),
        (trainer.beta != 0 and corrected, "beta and vllm_importance_sampling_correction"),
        (trainer.beta != 0 and kind in BY_ROWS, f"beta and loss_type={kind!r}"),
    ):
        if impossible:
            raise ValueError(f"fused=True is not equal to TRL's loss with {what}; leave fused out")


def check_models(trainer) -> None:
    """ValueError where a model is missing that the method looks at."""
    d, given = trainer.distrl, trainer.reward_model is not None
    need = estimators.find(d.estimator).token_rewards
    if not given and (d.alpha or need == "required" or d.online != "none"):
        asks = f"alpha={d.alpha}, estimator={d.estimator!r}, online={d.online!r}"
        raise ValueError(f"reward_model must be given for {asks}; got None")
    if d.needs_reference(given) and trainer.reference is None:
        raise ValueError(
            "reference_model must be given where the start of the policy is looked at (td_reference or "
            "online_reference 'sft', or an estimator that does without a reward model); got None"
        )
