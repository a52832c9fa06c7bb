"""The mixin over a GRPOTrainer: four of its methods, extended.

Shape letters: B answers of this process, A of all processes, T padded length, N tokens of the mask, S = 1 + K slots.
"""

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ipvrm_core.credit import assign_credit, batch_sigma
from ipvrm_core.heads import attach
from ipvrm_core.integrations.trl import loss, passes
from ipvrm_core.integrations.trl.reward_model import Judged, RewardModel
from ipvrm_core.integrations.trl.settings import DistRL, check, check_models
from ipvrm_core.packing import lengths_of, unpack
from ipvrm_core.types import Candidates

if TYPE_CHECKING:
    Base = Any  # a GRPOTrainer
else:
    Base = object

STATE = "reward_model.pt"  # in a checkpoint, where the reward model learns


class DistRLMixin(Base):
    """DistRL over TRL's GRPOTrainer, or over a subclass of it that keeps the methods extended here.

    Besides GRPOTrainer's arguments:
    reward_model: a causal language model with the policy's vocabulary, the path of one, or the name of an adapter on
        the policy's own base; None for an estimator that does without.
    distrl: the settings.
    reference_model: the start of the policy, where the method compares with it. None: TRL's own reference model
        (GRPOConfig(beta=...)), or the policy without its adapters.
    Raises ValueError for what cannot be done, by name.
    """

    def __init__(
        self,
        model: str | nn.Module,
        *args,
        reward_model: str | nn.Module | None = None,
        distrl: DistRL | None = None,
        reference_model: nn.Module | None = None,
        **kwargs,
    ):
        super().__init__(model, *args, **kwargs)
        self.distrl = distrl or DistRL()
        self.objective = self.distrl.reward_objective()
        check(self)
        attach(self.model)
        self.reward_model: Any = None if reward_model is None else RewardModel(self, reward_model)
        self.reference: Any = passes.reference(self, reference_model)
        check_models(self)

    @property
    def distrl_world(self):
        """The torch.distributed group whose batches belong together; None for one process."""
        return torch.distributed.group.WORLD if self.accelerator.num_processes > 1 else None

    def log_distrl(self, name: str, value: Tensor) -> None:
        """The mean over processes, in TRL's own log."""
        mode = "train" if self.model.training else "eval"
        self._metrics[mode][f"distrl/{name}"].append(self.accelerator.gather(value.detach()).nanmean().item())

    # ---- the credit of a batch

    def _calculate_rewards(self, *args, **kwargs):
        self.distrl_rewards = super()._calculate_rewards(*args, **kwargs)  # [A, reward functions]
        return self.distrl_rewards

    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        self._distrl_credit(out)
        return out

    @torch.no_grad()
    def _distrl_credit(self, out) -> None:
        """Into TRL's batch: token advantages, and the candidates as a list; TRL shuffles and splits both."""
        batch, judged, d = passes.Batch.of(out), self._distrl_judged(len(out["prompt_ids"])), self.distrl
        old = passes.old_policy(self, batch)
        start_NS = delta_NS = None
        if d.needs_reference(self.reward_model is not None):
            start_NS = passes.slot_logprobs(self, self.reference, batch, old.ids_NS)

        def learn(when: str) -> None:
            if self.model.training and d.online == when:
                self.log_distrl("rm_loss", self.reward_model.learn(batch, old, start_NS, judged))

        learn("before")
        if self.reward_model is not None:
            delta_NS = self.reward_model.td_errors(batch, old, start_NS)
        elif start_NS is not None:
            delta_NS = (old.logprobs_NS - start_NS)[:, :1]
        learn("after")
        self._distrl_put(out, batch, judged, old, delta_NS)

    def _distrl_judged(self, count: int) -> Judged:
        rewards_A = (self.distrl_rewards * self.reward_weights.to(self.distrl_rewards.device)).nansum(1)
        rewards_A[self.distrl_rewards.isnan().all(1)] = torch.nan
        size = self.num_generations
        if not self.model.training:
            size = getattr(self, "num_generations_eval", size)
        groups_A = torch.arange(len(rewards_A), device=rewards_A.device) // size
        first = self.accelerator.process_index * count
        return Judged(rewards_A, groups_A, slice(first, first + count))

    def _distrl_put(self, out, batch: passes.Batch, judged: Judged, old: Candidates, delta_NS: Tensor | None) -> None:
        rewards_B, groups_B = judged.rewards_A[judged.own].nan_to_num(0.0), judged.groups_A[judged.own]
        given = rewards_B, batch.cu_seqlens, groups_B, self.distrl, self.distrl_world
        more = {"beta": self.objective.beta, "outcome_B": out["advantages"]}
        credit = assign_credit(delta_NS, old.ids_NS, old.logprobs_NS, *given, **more)
        advantages_NS = credit.credit_NS
        if credit.values_N is not None:
            sigma = batch_sigma(credit.values_N, self.distrl, self.distrl_world)
            advantages_NS = credit.advantages(self.distrl, sigma)
            self.log_distrl("sigma_v", sigma)
        self.log_distrl("candidates", old.counts_N.float().mean())
        out["advantages"] = unpack(advantages_NS[:, 0], batch.cu_seqlens, mask=batch.mask_BT)
        if self.distrl.alpha or self.distrl.fused:
            sizes = lengths_of(batch.cu_seqlens).tolist()
            slots = old.ids_NS, old.logprobs_NS, advantages_NS[:, : old.ids_NS.shape[1]]
            out["distrl"] = list(zip(*(slot.split(sizes) for slot in slots), strict=True))

    # ---- the loss

    def _compute_loss(self, model, inputs):
        if self.distrl.fused:
            return loss.fused(self, model, inputs)
        if not self.distrl.alpha:
            return super()._compute_loss(model, inputs)
        own_loss = super()._compute_loss
        return loss.with_candidates(self, inputs, lambda: own_loss(model, inputs))

    # ---- checkpoints

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.distrl.online != "none":
            state = self.reward_model.state()
            if self.args.should_save:
                folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
                torch.save(state, os.path.join(folder, STATE))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        asked = None if self.reward_model is None else self.reward_model.asked
        if asked is not None and asked.adapter:  # older transformers leave out the first adapter where there are others
            active = asked.model.active_adapter
            asked.model.load_adapter(resume_from_checkpoint, "default", is_trainable=active == "default")
            asked.model.set_adapter(active)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.distrl.online != "none" and checkpoint is not None:
            path = os.path.join(checkpoint, STATE)
            self.reward_model.load_state(torch.load(path, map_location="cpu", weights_only=True))
