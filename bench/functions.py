"""Every public function that has a backend, called by name on one set of inputs; for bench/correctness.py.

Shape letters: N rows or packed tokens, D hidden size, V vocabulary, K candidate slots, B sequences.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import ipvrm_core as ic
from ipvrm_core import PolicyLossConfig
from ipvrm_core.bench.inputs import Inputs

LINEAR = ("distrl_loss", "linear_logprobs", "select_candidates", "linear_td_errors", "row_loss")
FROM_LOGITS = (
    "distrl_loss_from_logits",
    "logprobs_from_logits",
    "select_candidates_from_logits",
    "td_errors_from_logits",
    "row_loss_from_logits",
)
WITHOUT_HEAD = dict(zip(LINEAR, FROM_LOGITS, strict=True))
ALL = LINEAR + FROM_LOGITS
EVERYTHING = PolicyLossConfig(
    alpha=1.5,
    clip_low=0.1,
    dual_clip=1.6,
    candidate_dual_clip=1.4,
    temperature=1.7,
    softcap=6.0,
    kl_coef=0.2,
    entropy_coef=0.3,
)
BETA = 10.0


def call(name: str, x: Inputs, backend: str) -> tuple[list[Tensor], Tensor | None]:
    """(every output, a scalar to differentiate or None). Outputs have weights of their own in the scalar."""
    function, ids = getattr(ic, name), x.batch.ids_NS
    first = (x.hidden, x.weight) if x.logits is None else (x.logits,)
    options = {"backend": backend} | ({"bias": x.bias} if x.logits is None else {})
    if "distrl" in name:
        loss, metrics = function(*first, x.batch, x.config, **options)
        return [loss.detach(), *metrics.values()], 3.0 * loss
    options |= x.transform
    if "row_loss" in name:
        loss = function(*first, ids, partial(own_loss, x), **options)
        return [loss.detach()], 3.0 * loss
    if "td_errors" in name:
        return [function(*first, ids, x.batch.old_logprobs_NS, BETA, **options)], None
    if "logprobs" in name:
        outputs = list(function(*first, ids, **options))
        return [value.detach() for value in outputs], sum(_weighted(value) for value in outputs)
    return list(function(*first, ids[:, 0], **options)), None


def own_loss(x: Inputs, logprobs: ic.LogProbs, rows: slice) -> Tensor:
    """For `row_loss`: ratios times advantages, with LSE and entropy."""
    batch = x.batch.rows(rows)
    ratios_NS = (logprobs.logprobs_NK - batch.old_logprobs_NS).clamp(max=1.0).exp()
    terms_N = (ratios_NS * batch.advantages_NS).sum(1) + 0.1 * logprobs.lse_N + logprobs.entropy_N
    return (batch.token_weights_N * terms_N).sum()


def outputs_and_gradients(name: str, x: Inputs, backend: str) -> list[Tensor]:
    outputs, total = call(name, x, backend)
    return outputs if total is None else [*outputs, *torch.autograd.grad(total, x.wanted)]


def torch_in_the_same_dtype(name: str, x: Inputs) -> list[Tensor]:
    """F.linear in the inputs' dtype, then the reference in float32, and autograd."""
    logits = F.linear(x.hidden, x.weight, x.bias) if x.logits is None else x.logits
    outputs, total = call(WITHOUT_HEAD.get(name, name), replace(x, logits=logits), "reference")
    return outputs if total is None else [*outputs, *torch.autograd.grad(total, x.wanted)]


def _weighted(value: Tensor) -> Tensor:
    weights = torch.linspace(-1, 2, max(value.numel(), 1), dtype=torch.float64, device=value.device)
    return (weights[: value.numel()].view(value.shape) * value).sum()


def sequence_functions(lengths: list[int], device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    """Functions of packed token values [N]. Two sequences a prompt."""
    B = len(lengths)
    cu = ic.cu_seqlens_from_lengths(torch.tensor(lengths, device=device))
    labels, groups = torch.arange(B, device=device) % 2, torch.arange(B, device=device) // 2
    pairs = torch.arange(B - B % 2, device=device).view(-1, 2)
    sigma = torch.tensor(2.0, dtype=torch.float64, device=device)
    return {
        "prefix_values": lambda x: ic.prefix_values(x, cu, 10.0),
        "mean_prefix_values": lambda x: ic.mean_prefix_values(x, cu, 10.0),
        "gae": lambda x: ic.gae(x, cu, 0.99, 0.95),
        "group_normalize": lambda x: ic.group_normalize(x, cu, groups),
        "process_advantages": lambda x: ic.process_advantages(x, cu, groups, normalize="batch", sigma=sigma),
        "ipvrm_loss": lambda x: ic.ipvrm_loss(x, cu, labels),
        "implicit_prm_loss": lambda x: ic.implicit_prm_loss(x, cu, labels),
        "dpo_reward_loss": lambda x: ic.dpo_reward_loss(x, cu, pairs),
    }
