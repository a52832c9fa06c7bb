"""Steps of an engine, and what each of two processes does; in a module that spawned processes can import."""

import json
import os
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import verl_cases as cases
from transformers import AutoModelForCausalLM
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPActorConfig
from verl.workers.utils.losses import ppo_loss

from ipvrm_core.integrations.verl.credit import reward_fields, reward_loss
from ipvrm_core.integrations.verl.rows import Rows
from ipvrm_core.integrations.verl.settings import DistRL
from ipvrm_core.reference.policy_loss import ppo_terms

MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")
CANDIDATES = {"task": "candidates", "p_min": 0.05}
TD_ERRORS = {"task": "td_errors", "beta": 2.0, "reference": True}


def start(port: int) -> None:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")


def infer(engine, data, asked: dict) -> dict:
    tu.assign_non_tensor(data, distrl=asked)
    with engine.eval_mode():
        found = engine.infer_batch(data, loss_function=None)["model_output"]
    data.pop("distrl")
    return found


def rows_of(data) -> Rows:
    return Rows.of(data["input_ids"], data["response_mask"])


def logits(path: str, data, grad: bool = False) -> tuple[torch.Tensor, torch.nn.Module]:
    """Of the rows [N, V], from a plain model, one sequence at a time."""
    model, rows = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), rows_of(data)
    with torch.set_grad_enabled(grad):
        found = torch.cat([model(ids[None]).logits[0] for ids in data["input_ids"].unbind()])
    return found[rows.index_R][rows.mask_R], model


def expected_step(path: str, data, mode: str, alpha: float) -> dict:
    """The same by autograd on full logits, with verl's aggregation written out."""
    found, model = logits(path, data, grad=True)
    rows = rows_of(data)
    logp = (found / cases.T).log_softmax(-1)
    counts = rows.cu_seqlens.diff()
    weights = {
        "token-mean": torch.full((len(logp),), 1 / len(logp)),
        "seq-mean-token-mean": (1 / counts / cases.B).repeat_interleave(counts),
        "seq-mean-token-sum": torch.full((len(logp),), 1 / cases.B),
    }[mode]
    ratio = logp.gather(1, rows.tokens_N[:, None])[:, 0] - rows.packed(data["old_log_probs"])
    total = (weights * ppo_terms(ratio, rows.packed(data["advantages"]), 0.2, 0.28, 3.0)[0]).sum()
    ids, old, advantages = (rows.packed(data[name])[:, 1:] for name in ("distrl_ids", "distrl_old", "distrl_adv"))
    ratio = logp.gather(1, ids.clamp(min=0)) - old
    terms = old.exp() * ppo_terms(ratio, advantages, 0.2, 0.28)[0]
    total = total + alpha * (weights[:, None] * terms.masked_fill(ids < 0, 0.0)).sum()
    total.backward()
    return {"loss": total.item(), "grad_norm": torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).item()}


def with_slots(data, policy, reward_model):
    """The batch as the trainer hands it to the actor: candidates, and advantages for them."""
    found = infer(policy, data, CANDIDATES)
    data["distrl_ids"], data["distrl_old"] = found["distrl_ids"], found["distrl_old"]
    own = found["distrl_old"].values()
    moved = own + 0.3 * torch.sin(7.0 * found["distrl_ids"].values()) * (own != 0)  # the same on any process
    data["distrl_old"] = torch.nested.nested_tensor_from_jagged(moved, found["distrl_old"].offsets())
    delta = infer(reward_model, data, TD_ERRORS)["distrl_delta"]
    data["distrl_adv"] = delta
    return data


def actor_loss(mode: str):
    config = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_mini_batch_size=cases.B,
        ppo_micro_batch_size_per_gpu=2,
        loss_agg_mode=mode,
        clip_ratio_low=0.2,
        clip_ratio_high=0.28,
        clip_ratio_c=3.0,
        entropy_coeff=0.0,
    )
    return partial(ppo_loss, config=config)


def step(engine, data, mode: str, alpha: float) -> dict:
    """The actor's."""
    if alpha:
        tu.assign_non_tensor(data, distrl={"task": "loss", "alpha": alpha, "loss_agg_mode": mode})
    found = one_step(engine, data, actor_loss(mode))
    if alpha:
        data.pop("distrl")
    return found


def reward_settings(objective: str) -> DistRL:
    return DistRL(reward_model="x", objective=objective, online="before")


def reward_step(engine, data, objective_name: str, own: slice = slice(None)) -> dict:
    """The reward model's, on the answers `own` of the batch."""
    settings = reward_settings(objective_name)
    objective, rewards = settings.reward_objective(), torch.as_tensor(cases.REWARDS).float()
    for key, value in reward_fields(settings, objective, rewards, cases.uids()).items():
        data[key] = value[own]
    return one_step(engine, data, partial(reward_loss, objective=objective))


def one_step(engine, data, loss_function) -> dict:
    """Loss and gradient norm of an optimizer step; the weights are put back."""
    before = [parameter.detach().clone() for parameter in engine.module.parameters()]
    with engine.train_mode():
        out = engine.train_batch(data, loss_function=loss_function)
    with torch.no_grad():
        for parameter, was in zip(engine.module.parameters(), before, strict=True):
            parameter.copy_(was)
    return {"loss": float(torch.tensor(out["loss"]).sum()), "grad_norm": float(out["metrics"]["grad_norm"])}


def rank_main(rank: int, models, file: Path) -> None:
    from torch.distributed.tensor import DTensor

    os.environ["LOCAL_RANK"] = "0"
    dist.init_process_group("gloo")
    policy, reward_model = (cases.engine(models[name], 2) for name in ("policy", "reward"))
    assert all(isinstance(parameter, DTensor) for parameter in policy.module.parameters())
    own = slice(4 * rank, 4 * rank + 4)
    data = cases.batch(own)
    whole = with_slots(data, policy, reward_model)
    found = {mode: step(policy, whole, mode, 0.7)["grad_norm"] for mode in MODES}
    found["reward model"] = reward_step(reward_model, data, "ipvrm", own)["grad_norm"]
    assert all(found.values())
    ids = [None, None]
    dist.all_gather_object(ids, infer(policy, data, CANDIDATES)["distrl_ids"].values())
    if rank == 0:
        file.write_text(json.dumps(found))
        torch.save(torch.cat(ids), file.with_suffix(".pt"))
