"""DistRL on several processes, with DDP or FSDP2 by plain torch or by accelerate: what one process would learn.

    torchrun --nproc_per_node 2 examples/processes.py            # or: --sharded, --accelerate, --sharded --accelerate

Every process has its own answers. What has to be known of the others: the statistics of the credit (process_group) and
the normalisers of the batch (`across`); the losses are multiplied by the number of processes, for DDP and FSDP2 average
gradients. Policy, reward model and answers are random here; `own_loop.py` samples and learns.
"""

import os
import sys

import torch
from torch import distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import ipvrm_core as ic

VOCABULARY, PROMPT, ANSWER, ANSWERS, STEPS = 50, 4, 6, 8, 3
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def make_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return ic.attach(LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.4, **SIZES)))


def with_torch(model: nn.Module, sharded: bool) -> nn.Module:
    if not dist.is_initialized():
        return model
    if not sharded:
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def rows(hidden_BLD: torch.Tensor) -> torch.Tensor:
    """The states that predict the answers' tokens: [B, L, D] -> [N, D]."""
    return hidden_BLD[:, PROMPT - 1 : -1].flatten(0, 1)


def batch_of(policy: nn.Module, reward_model: nn.Module, ids: torch.Tensor, rewards, prompts) -> ic.PolicyBatch:
    """The rows of this process, in the weights of the batch of all."""
    group, world = (dist.group.WORLD, dist.get_world_size()) if dist.is_initialized() else (None, 1)
    tokens, cu_seqlens = ids[:, PROMPT:].flatten(), torch.arange(0, len(ids) * ANSWER + 1, ANSWER)
    with torch.no_grad():
        old = policy(ids, at_head=lambda h, head: ic.select_candidates(rows(h), head.weight, tokens, p_min=0.05))
        slots = old.ids_NS, old.logprobs_NS
        delta = reward_model(ids, at_head=lambda h, head: ic.linear_td_errors(rows(h), head.weight, *slots, beta=1.0))
        credit = ic.distrl_advantages(delta, *slots, rewards, cu_seqlens, prompts, process_group=group)
        own = ic.normalizers(cu_seqlens, torch.ones(len(tokens), dtype=torch.bool), ic.candidate_mass(*slots))
    return ic.PolicyBatch.of(*slots, credit, cu_seqlens, totals=own.across(group), scale=world)


def train(sharded: bool = False, accelerate: bool = False) -> list[tuple[float, float]]:
    """(loss of all processes, gradient norm) of each step."""
    policy, reward_model = make_model(0), make_model(1).requires_grad_(False)
    if accelerate:
        from accelerate import Accelerator, FullyShardedDataParallelPlugin

        how = {"fsdp_version": 2, "auto_wrap_policy": "transformer_based_wrap", "cpu_ram_efficient_loading": False}
        wrapped = {"transformer_cls_names_to_wrap": ["LlamaDecoderLayer"], **how}
        plugin = FullyShardedDataParallelPlugin(**wrapped) if sharded else None
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        policy, optimizer = accelerator.prepare(policy, torch.optim.SGD(policy.parameters(), lr=1e-2))
    else:
        policy = with_torch(policy, sharded)
        optimizer = torch.optim.SGD(policy.parameters(), lr=1e-2)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own, found = slice(rank * ANSWERS // world, (rank + 1) * ANSWERS // world), []
    for step in range(STEPS):
        torch.manual_seed(step)  # all processes draw alike and keep their part
        ids, rewards = torch.randint(VOCABULARY, (ANSWERS, PROMPT + ANSWER)), torch.randint(2, (ANSWERS,)).float()
        prompts = [f"{step}-{b % 2}" for b in range(ANSWERS)]  # the answers to a prompt are on all processes
        batch = batch_of(policy, reward_model, ids[own], rewards[own], prompts[own])

        def loss_at(hidden, head, batch=batch):
            return ic.distrl_loss(rows(hidden), head.weight, batch, ic.PolicyLossConfig(alpha=1.0))

        loss, _ = policy(ids[own], at_head=loss_at)
        accelerator.backward(loss) if accelerate else loss.backward()
        norm = nn.utils.clip_grad_norm_(policy.parameters(), 1e9)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone() / world
        if world > 1:
            dist.all_reduce(total)
        found.append((total.item(), norm.item()))
    return found


if __name__ == "__main__":
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    numbers = train("--sharded" in sys.argv, "--accelerate" in sys.argv)
    if not dist.is_initialized() or dist.get_rank() == 0:
        for step, (loss, norm) in enumerate(numbers):
            print(f"step {step}: loss {loss:.7f}, gradient norm {norm:.7f}")
    if dist.is_initialized():
        dist.destroy_process_group()
