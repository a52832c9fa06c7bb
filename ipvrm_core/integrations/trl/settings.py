"""What a user sets, and what is refused by name before anything runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from ipvrm_core import estimators, objectives
from ipvrm_core.heads import head_of
from ipvrm_core.method import Method
from ipvrm_core.objectives import Objective
from ipvrm_core.reference.candidates import candidate_slots

TRLS = {  # what GRPOConfig decides
    "outcome": "scale_rewards",
    "clip_low": "epsilon",
    "clip_high": "epsilon_high",
    "dual_clip": "delta",
    "aggregation": "loss_type",
    "sigma_scope": "steps_per_generation",
}
CLIPPED, BY_ROWS = ("grpo", "bnpo", "dr_grpo", "dapo"), ("cispo", "sapo")  # what `fused` knows: distrl_loss, row_loss


@dataclass(frozen=True)
class DistRL(Method):
    """The switches of `Method` that GRPOConfig does not have, the reward model's learning, and the way to run.

    sigma_V is that of a generation batch, over all processes.
    """

    sigma_scope: Literal["minibatch", "batch"] = "batch"
    objective: Annotated[str, "the reward model's: a file of ipvrm_core/objectives, or package.module:Class"] = "ipvrm"
    objective_args: Annotated[Mapping[str, Any], "its settings besides beta"] = field(default_factory=dict)
    beta: Annotated[float | None, "of TD errors and objective; None: the objective's own, 10 for ipvrm"] = None
    online: Annotated[
        Literal["none", "before", "after"], "the reward model learns from each batch, before or after it scores it"
    ] = "none"
    learning_rate: Annotated[float, "of AdamW for the reward model that learns"] = 1e-6
    right_above: Annotated[float, "the weighted sum of rewards above which an answer is right to its objective"] = 0.5
    fused: Annotated[bool, "replace TRL's loss by the fused one; refused where they are not equal"] = False

    def __post_init__(self) -> None:
        defaults = {setting.name: setting.default for setting in fields(self)}
        for name, theirs in TRLS.items():
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"{name} is TRL's to decide, by GRPOConfig({theirs}=...); got {getattr(self, name)!r}")
        for name, allowed in (("online", ("none", "before", "after")), ("fused", (True, False))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {getattr(self, name)!r}")
        if self.online != "none" and not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be > 0 for a reward model that learns; got {self.learning_rate}")
        estimators.find(self.estimator)
        candidate_slots(self.p_min, top_k=self.top_k)
        self.loss_config()
        self.reward_objective()

    def reward_objective(self) -> Objective:
        """What the reward model was trained by; where it learns online, with the online margin."""
        found = objectives.find(self.objective)
        settings = dict(self.objective_args)
        if self.beta is not None:
            settings["beta"] = self.beta
        if found.boundary and self.online != "none":
            settings.setdefault("margin", self.online_margin)
        return found(**settings)

    def needs_reference(self, reward_model: bool) -> bool:
        """Whether the start of the policy is looked at."""
        own = not reward_model and estimators.find(self.estimator).token_rewards == "own"
        return own or "sft" in (self.td_reference, self.online_reference if self.online != "none" else None)


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
    if trainer.objective.head == "value":
        raise ValueError(f"the reward model must be a language model; objective {d.objective!r} has a value head")
    if d.online != "none" and (trainer.objective.pairwise or not trainer.objective.trains):
        raise ValueError(f"online={d.online!r} needs an objective of single answers; got {d.objective!r}")
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
