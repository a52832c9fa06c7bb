"""The trainer: a worker group of the reward model, candidates with the old log-probs, credit with the advantages.

`trainer.v1.trainer_mode=distrl_sync`, over verl's synchronous trainer; data go through TransferQueue as verl's own.
"""

import os
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ipvrm_core.integrations.verl.credit import credited, reward_fields, reward_loss
from ipvrm_core.integrations.verl.rows import Rows
from ipvrm_core.integrations.verl.settings import DistRL

if TYPE_CHECKING:
    Base = Any  # verl's PPOTrainerSync
else:
    Base = object

NAME = "distrl_sync"
CANDIDATES = ("alpha", "candidate_clip_low", "candidate_clip_high", "candidate_dual_clip")


class DistRLTrainerMixin(Base):
    def __init__(self, config):
        self.distrl = DistRL.of(config)
        check(config)
        super().__init__(config)

    def _build_replay_buffer(self):
        self.trainer_mode = "sync"  # by which verl chooses between its two buffers
        return super()._build_replay_buffer()

    # ---- the reward model's workers

    def _load_checkpoint(self):
        """verl calls it last in its set-up, with the rollout engines asleep."""
        self.reward_wg = self._distrl_workers()
        super()._load_checkpoint()
        if self.distrl.online != "none" and self.global_steps:
            self.reward_wg.load_checkpoint(self._distrl_folder())

    def _save_checkpoint(self):
        super()._save_checkpoint()
        if self.distrl.online != "none":
            self.reward_wg.save_checkpoint(self._distrl_folder(), global_step=self.global_steps)

    def _distrl_folder(self) -> str:
        return os.path.join(self.config.trainer.default_local_dir, f"global_step_{self.global_steps}", "reward_model")

    def _distrl_workers(self):
        """TrainingWorkers of verl on the actor's devices."""
        import ray
        from verl.single_controller.ray import RayClassWithInitArgs, RayWorkerGroup, create_colocated_worker_cls
        from verl.workers.engine_workers import TrainingWorker

        worker = RayClassWithInitArgs(ray.remote(TrainingWorker), config=worker_config(self.config, self.distrl))
        pool = self.resource_pool_manager.get_resource_pool(next(iter(self.mapping)))
        group = RayWorkerGroup(
            resource_pool=pool,
            ray_cls_with_init=create_colocated_worker_cls({"distrl": worker}),
            device_name=self.config.trainer.device,
        ).spawn(prefix_set={"distrl"})["distrl"]
        group.reset()
        if self.distrl.online != "none":
            group.set_loss_fn(partial(reward_loss, objective=self.distrl.reward_objective()))
        return group

    # ---- one step

    def _compute_old_log_prob(self, batch, metrics):
        batch.extra_info["distrl"] = {"task": "candidates", **self.distrl.candidate_rule()}
        try:
            return super()._compute_old_log_prob(batch, metrics)
        finally:
            batch.extra_info.pop("distrl", None)

    def _compute_advantage(self, batch, metrics):
        import transfer_queue as tq
        from tensordict import TensorDict

        batch.extra_info.pop("distrl", None)
        batch = super()._compute_advantage(batch, metrics)
        fields = ["uid", "rm_scores", "response_mask", "input_ids"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        uids = [str(uid) for uid in data["uid"]]
        rewards_B = torch.stack([scores.sum() for scores in data["rm_scores"].unbind()]).float()
        rows = Rows.of(data["input_ids"], data["response_mask"])

        def learn(when: str) -> None:
            if self.distrl.online == when:
                self._distrl_learn(batch, rewards_B, uids, metrics)

        learn("before")
        self._distrl_td_errors(batch)
        learn("after")
        names = ["advantages", "distrl_ids", "distrl_old", "distrl_delta"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
        made = TensorDict(credited(self.distrl, rows, data, rewards_B, uids), batch_size=len(batch))
        ids = rows.packed(data["distrl_ids"])
        metrics["distrl/candidates"] = (ids[:, 1:] >= 0).sum(1).float().mean().item()
        return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=made)

    def _distrl_td_errors(self, batch) -> None:
        import ray

        objective, temperature = self.distrl.reward_objective(), self.config.actor_rollout_ref.rollout.temperature
        asked = {"task": "td_errors", "beta": objective.beta, "reference": objective.reference}
        batch.extra_info.update({"distrl": asked, "compute_loss": False, "temperature": temperature})
        ray.get(self.reward_wg.infer_batch(batch).futures)
        batch.extra_info.pop("distrl")

    def _distrl_learn(self, batch, rewards_B, uids, metrics) -> None:
        import transfer_queue as tq
        from tensordict import TensorDict

        made = reward_fields(self.distrl, self.distrl.reward_objective(), rewards_B, uids)
        fields = TensorDict(made, batch_size=len(batch))
        batch = tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)  # it knows them now
        batch.extra_info.update(
            {
                "global_batch_size": len(batch),
                "mini_batch_size": len(batch),
                "epochs": 1,
                "seed": 0,
                "dataloader_kwargs": {"shuffle": False},
                "calculate_entropy": False,
                "temperature": self.config.actor_rollout_ref.rollout.temperature,
            }
        )
        output = self.reward_wg.train_mini_batch(batch).get()
        metrics["distrl/rm_loss"] = float(torch.tensor(output["metrics"]["loss"]).sum())

    def _update_actor(self, batch, metrics):
        actor = self.config.actor_rollout_ref.actor
        if self.distrl.alpha:
            batch.extra_info["distrl"] = {
                "task": "loss",
                "loss_agg_mode": actor.loss_agg_mode,
                "loss_scale_factor": actor.get("loss_scale_factor"),
                **{name: value for name, value in asdict(self.distrl).items() if name in CANDIDATES},
            }
        try:
            return super()._update_actor(batch, metrics)
        finally:
            batch.extra_info.pop("distrl", None)


def check(config) -> None:
    """ValueError for what DistRL cannot do in verl, by the name of the key."""
    actor = config.actor_rollout_ref.actor
    if actor.strategy not in ("fsdp", "fsdp2"):
        raise ValueError(f"actor_rollout_ref.actor.strategy must be fsdp or fsdp2 for distrl; got {actor.strategy!r}")
    if actor.fsdp_config.get("ulysses_sequence_parallel_size", 1) > 1:
        raise ValueError("actor.fsdp_config.ulysses_sequence_parallel_size must be 1 for distrl, which needs sequences")
    if actor.get("ulysses_sequence_parallel_size", 1) > 1:
        raise ValueError("actor.ulysses_sequence_parallel_size must be 1 for distrl, which needs whole sequences")
    correction = config.algorithm.get("rollout_correction") or {}
    if correction.get("bypass_mode", False):
        raise ValueError(
            "algorithm.rollout_correction.bypass_mode leaves out the pass in which distrl finds candidates"
        )


def worker_config(config, distrl: DistRL):
    """Of the reward model's workers: the actor's engine with another model, without adapters."""
    from copy import deepcopy

    from omegaconf import open_dict
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config import TrainingWorkerConfig

    given = deepcopy(config.actor_rollout_ref)
    with open_dict(given):
        given.model.path = distrl.reward_model
        given.model.lora_rank, given.model.lora_adapter_path = 0, None
        given.actor.optim.lr = distrl.learning_rate
    actor, rollout = omega_conf_to_dataclass(given.actor), given.rollout
    engine = actor.engine
    engine.use_dynamic_bsz = given.actor.use_dynamic_bsz
    engine.infer_max_token_len_per_gpu = rollout.log_prob_max_token_len_per_gpu
    engine.infer_micro_batch_size_per_gpu = rollout.log_prob_micro_batch_size_per_gpu
    engine.max_token_len_per_gpu = given.actor.ppo_max_token_len_per_gpu
    engine.micro_batch_size_per_gpu = given.actor.ppo_micro_batch_size_per_gpu
    return TrainingWorkerConfig(
        model_type="language_model",
        model_config=omega_conf_to_dataclass(given.model),
        engine_config=engine,
        optimizer_config=actor.optim,
        checkpoint_config=actor.checkpoint,
        profiler_config=None,
    )


def register_trainer() -> None:
    """As trainer.v1.trainer_mode=distrl_sync."""
    from verl.trainer.ppo.v1 import PPOTrainerSync
    from verl.trainer.ppo.v1 import register_trainer as register

    register(NAME)(type("DistRLTrainerSync", (DistRLTrainerMixin, PPOTrainerSync), {"__module__": __name__}))
