"""Liger-Kernel 0.8.5: chunked GRPO, Triton GRPO (logits level), fused linear CE, fused linear scaled CE.

The GRPO losses take one advantage a sequence, which is what the problems have, and no candidates.
"""

from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import Tensor

from ipvrm_core import PolicyLossConfig
from ipvrm_core.bench.peers.base import Peer, around_logprobs, needs
from ipvrm_core.bench.problems import Problem

CLIP = PolicyLossConfig()
INSTALL = "pip install liger-kernel==0.8.5"


def _in_sequences(problem: Problem, x_N: Tensor) -> Tensor:
    """[N, ...] -> [B, T, ...]."""
    return x_N.unflatten(0, (problem.sequences, -1))


def chunked_grpo(problem: Problem) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=problem.hidden_ND.is_cuda,  # compiles the loss of a chunk, which takes half a minute on a CPU
        use_ref_model=False,
        epsilon_low=CLIP.clip_low,
        epsilon_high=CLIP.clip_high,
        loss_type="bnpo",
        temperature=1.0,
    )
    hidden, ids, mask, advantages, old = (_in_sequences(problem, x) for x in (problem.hidden_ND, *problem.sampled))
    return loss(hidden, problem.weight_VD, ids, mask.float(), advantages[:, 0], old_per_token_logps=old)[0]


def pad_logits(problem: Problem) -> Problem:
    """[N, V] -> [B, T + 1, V], as its interface wants them; the last position of a sequence is not read."""
    logits_BTV = _in_sequences(problem, problem.logits_NV.detach())
    padded_BTV = torch.cat([logits_BTV, torch.zeros_like(logits_BTV[:, :1])], dim=1)
    return replace(problem, logits_NV=padded_BTV.requires_grad_())


def triton_grpo(problem: Problem) -> Tensor:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    ids, mask, advantages, old = (_in_sequences(problem, x) for x in problem.sampled)
    settings = {"temperature": 1.0, "beta": 0.0, "eps_low": CLIP.clip_low, "eps_high": CLIP.clip_high}
    return triton_grpo_loss(
        problem.logits_NV,
        old,
        None,
        ids,
        advantages[:, 0].contiguous(),
        mask.float(),
        **settings,
        inplace=False,  # the logits stay as they are, as with the library
        loss_type="bnpo",
        reduce=True,
    )[0]


def linear_ce(problem: Problem) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
    return loss(problem.weight_VD, problem.hidden_ND, problem.targets_N())


def scaled_ce_logprobs(problem: Problem) -> Tensor:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return -LigerFusedLinearScaledCrossEntropyFunction.apply(problem.hidden_ND, problem.weight_VD, problem.targets_N())


def no_scaled_ce(device: torch.device) -> str | None:
    """On Hopper it is CuTe; elsewhere Liger itself runs a chunked fallback in torch."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    if hopper and find_spec("cutlass") is None:
        return "not installed: nvidia-cutlass-dsl >= 4.6 (the extra `cutedsl`)"
    return needs("liger_kernel")(device)


GRPO = "GRPO, one advantage a sequence"
PEERS = [
    Peer(
        "Liger chunked GRPO",
        INSTALL,
        "LigerFusedLinearGRPOLoss(beta=0, loss_type='bnpo')",
        GRPO,
        needs("liger_kernel"),
        chunked_grpo,
        package="liger_kernel",
    ),
    Peer(
        "Liger Triton GRPO",
        INSTALL,
        "triton_grpo_loss(inplace=False, loss_type='bnpo')",
        GRPO,
        needs("liger_kernel", triton=True),
        triton_grpo,
        level="logits",
        package="liger_kernel",
        prepare=pad_logits,
    ),
    Peer(
        "Liger fused linear CE",
        INSTALL,
        "LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)",
        "NLL only, no PPO clip",
        needs("liger_kernel", triton=True),
        linear_ce,
        kind="nll",
        package="liger_kernel",
    ),
    Peer(
        "Liger scaled CE",
        "pip install 'liger-kernel[cutedsl]==0.8.5'",
        "LigerFusedLinearScaledCrossEntropyFunction.apply + PPO in torch",
        "log-probs; always computes dW",
        no_scaled_ce,
        package="liger_kernel",
        **around_logprobs(scaled_ce_logprobs),
    ),
]
