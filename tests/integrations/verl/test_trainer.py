"""One step of the registered trainer over a local Ray and a real TransferQueue; rollouts alone are put there here."""

import os

import pytest
import ray
import torch
import transfer_queue as tq
import verl_cases as cases
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from tensordict import NonTensorStack, TensorDict
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from verl.single_controller.ray import (
    RayClassWithInitArgs,
    RayResourcePool,
    RayWorkerGroup,
    create_colocated_worker_cls,
)
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl_steps import expected_step, logits

import ipvrm_core as ic
from ipvrm_core.integrations.verl.rows import Rows
from ipvrm_core.objectives import RewardBatch

# The entry point has registered the engine for NVIDIA: in the workers verl is told to look there.
WORKERS = {"VERL_ENGINE_DEVICE": "cuda", "VERL_ENGINE_VENDOR": "nvidia", "TRANSFER_QUEUE_ENABLE": "1"}
KEPT = ("VERL_PLATFORM", "VERL_USE_EXTERNAL_MODULES", "PYTHONPATH", "OMP_NUM_THREADS")


def save_tokenizer(folder: str) -> None:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(cases.V)}, unk_token="w1"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2").save_pretrained(folder)


def configuration(paths: dict[str, str]):
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    overrides = [
        "trainer.device=cpu",
        "trainer.n_gpus_per_node=1",
        "trainer.v1.trainer_mode=distrl_sync",
        "data.train_batch_size=4",
        "algorithm.adv_estimator=grpo",
        f"actor_rollout_ref.model.path={paths['policy']}",
        "actor_rollout_ref.model.use_remove_padding=False",
        "actor_rollout_ref.model.enable_gradient_checkpointing=False",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        f"{actor}.strategy=fsdp2",
        f"{actor}.use_dynamic_bsz=False",
        f"{actor}.ppo_micro_batch_size_per_gpu=2",
        f"{actor}.ppo_mini_batch_size=4",
        f"{actor}.clip_ratio_low=0.2",
        f"{actor}.clip_ratio_high=0.28",
        f"{actor}.grad_clip=1000",
        f"{actor}.fsdp_config.use_torch_compile=False",
        f"{actor}.fsdp_config.model_dtype=fp32",
        f"+{actor}.fsdp_config.mixed_precision={{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}}",
        f"{rollout}.n=2",
        f"{rollout}.temperature={cases.T}",
        f"{rollout}.log_prob_micro_batch_size_per_gpu=2",
        f"{rollout}.calculate_log_probs=False",
        f"+distrl.reward_model={paths['reward']}",
        "+distrl.alpha=0.7",
        "+distrl.p_min=0.05",
        "+distrl.online=after",
        "+distrl.learning_rate=0.001",
    ]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=overrides)
    OmegaConf.resolve(config)
    config.transfer_queue.enable = True
    return config


@pytest.fixture(scope="module")
def trainer(models):
    """Worker groups of actor and reward model; no rollout servers, which want a GPU."""
    for path in models.values():
        save_tokenizer(path)
    config = configuration(models)
    os.environ |= WORKERS
    env = {**WORKERS, **{name: os.environ[name] for name in KEPT}}
    ray.init(num_cpus=16, include_dashboard=False, runtime_env={"env_vars": env})
    tq.init(config.transfer_queue)
    made = get_trainer_cls("distrl_sync")(config)
    pool = RayResourcePool([1], use_gpu=False, max_colocate_count=3)
    worker = RayClassWithInitArgs(ray.remote(ActorRolloutRefWorker), config=config.actor_rollout_ref, role="actor")
    group = RayWorkerGroup(pool, create_colocated_worker_cls({"actor": worker}), device_name="cpu")
    made.actor_rollout_wg = group.spawn(prefix_set={"actor"})["actor"]
    made.actor_rollout_wg.init_model()
    made.resource_pool_manager, made.mapping = Pools(pool), {"actor": "global_pool"}
    made.reward_wg = made._distrl_workers()
    made.global_steps, made.distillation_config = 1, None
    yield made
    tq.close()
    ray.shutdown()
    for name in WORKERS:
        os.environ.pop(name)


class Pools:
    def __init__(self, pool):
        self.pool = pool

    def get_resource_pool(self, role):
        return self.pool


def rolled_out():
    """What verl's agent loop puts into TransferQueue."""
    data = cases.batch()
    names = ("input_ids", "position_ids", "prompts", "responses", "response_mask", "loss_mask", "attention_mask")
    scores = [torch.zeros(length) for length in cases.RESPONSES]
    for row, reward in zip(scores, cases.REWARDS, strict=True):
        row[-1] = float(reward)
    fields = {**{name: data[name] for name in names}, "rm_scores": cases.jagged(scores)}
    fields = TensorDict({**fields, "uid": NonTensorStack(*cases.uids())}, batch_size=cases.B)
    tags = [{"seq_len": sum(pair), "status": "success"} for pair in zip(cases.PROMPTS, cases.RESPONSES, strict=True)]
    keys = [f"{uid}_{b}_0" for b, uid in enumerate(cases.uids())]
    return tq.kv_batch_put(keys=keys, partition_id="train", fields=fields, tags=tags)


def test_a_step_of_the_trainer(trainer, models):
    batch, metrics = rolled_out(), {}
    batch = trainer._compute_old_log_prob(batch, metrics)
    batch = trainer._compute_advantage(batch, metrics)
    kept = tq.kv_batch_get(keys=batch.keys, partition_id="train")
    trainer._update_actor(batch, metrics)

    rows, rewards = Rows.of(kept["input_ids"], kept["response_mask"]), torch.as_tensor(cases.REWARDS).float()
    how = {"temperature": cases.T, "backend": "reference"}
    old = ic.select_candidates_from_logits(logits(models["policy"], kept)[0], rows.tokens_N, p_min=0.05, **how)
    slots = old.ids_NS, old.logprobs_NS
    assert rows.packed(kept["distrl_ids"]).equal(old.ids_NS)
    assert metrics["distrl/candidates"] == pytest.approx(old.counts_N.float().mean().item())
    delta = ic.td_errors_from_logits(logits(models["reward"], kept)[0], *slots, 10.0, **how)
    plain = ic.Method(outcome="reinforce")
    expected = ic.distrl_advantages(delta, *slots, torch.zeros(cases.B), rows.cu_seqlens, cases.uids(), plain)
    of_prompt = rewards.view(-1, 2)  # verl's grpo: by the standard deviation with n - 1
    outcome = (of_prompt - of_prompt.mean(1, keepdim=True)) / (of_prompt.std(1, keepdim=True) + 1e-6)
    expected[:, 0] += outcome.flatten().repeat_interleave(rows.cu_seqlens.diff())
    torch.testing.assert_close(rows.packed(kept["distrl_adv"]), expected, rtol=1e-3, atol=1e-3)
    assert rows.packed(kept["advantages"]).equal(rows.packed(kept["distrl_adv"])[:, 0])

    taken = expected_step(models["policy"], kept, "token-mean", 0.7)
    assert metrics["actor/loss"] == pytest.approx(taken["loss"], rel=1e-4)
    assert metrics["actor/grad_norm"] == pytest.approx(taken["grad_norm"], rel=1e-4)

    score = (logits(models["reward"], kept)[0] / cases.T).log_softmax(-1).gather(1, rows.tokens_N[:, None])[:, 0]
    score = score - rows.packed(kept["old_log_probs"])
    labels, mu = rewards, of_prompt.mean(1).repeat_interleave(2)
    weights, boundary = ic.dynamic_loss_weights(labels, mu) / cases.B, ic.difficulty_boundary(mu)
    objective = trainer.distrl.reward_objective()
    loss = objective.loss(score, RewardBatch(rows.cu_seqlens, labels, weights, boundary))
    assert metrics["distrl/rm_loss"] == pytest.approx(loss.item(), rel=1e-4)
