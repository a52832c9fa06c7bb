"""Every public function that has a backend, called by name on one set of inputs; for bench/correctness.py.

Shape letters: N rows or packed tokens, D hidden size, V vocabulary, K candidate slots, B sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import ipvrm_core as ic
from ipvrm_core import PolicyBatch, PolicyLossConfig

LINEAR = ("distrl_loss", "linear_logprobs", "select_candidates")
FROM_LOGITS = ("distrl_loss_from_logits", "logprobs_from_logits", "select_candidates_from_logits")
WITHOUT_HEAD = dict(zip(LINEAR, FROM_LOGITS, strict=True))
LINEAR += ("linear_td_errors",)
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


@dataclass(frozen=True)
class Inputs:
    """`logits` is set for the functions of FROM_LOGITS. Leaves require a gradient."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    batch: PolicyBatch
    config: PolicyLossConfig
    logits: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Inputs":
        fields = ("hidden", "weight", "bias", "logits")
        leaves = {name: getattr(self, name) for name in fields if getattr(self, name) is not None}
        return replace(self, **{name: x.detach().to(dtype).requires_grad_() for name, x in leaves.items()})

    def at_logits(self) -> "Inputs":
        """With logits of the inputs' dtype as the leaf."""
        logits = F.linear(self.hidden, self.weight, self.bias).detach().requires_grad_()
        return replace(self, logits=logits)

    @property
    def wanted(self) -> list[Tensor]:
        leaves = (self.hidden, self.weight, self.bias) if self.logits is None else (self.logits,)
        return [x for x in leaves if x is not None and x.requires_grad]


def make_inputs(
    N: int,
    D: int,
    V: int,
    K: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    scale: float = 3.0,
    shift: float = 0.0,
    config: PolicyLossConfig | None = None,
) -> Inputs:
    """Ratios of 0.5 to 2, a quarter of the candidates padding, slot 0 the sampled id in odd rows, some rows masked.

    The last row's sampled id is V - 1: in the last, partial block of a sweep.
    """
    rng = torch.Generator().manual_seed(N * 1009 + V)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=rng)

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=rng)

    config = config or PolicyLossConfig()
    hidden, weight, bias = (
        x.to(device, dtype) for x in (normal(N, D) * scale / D**0.5, normal(V, D), normal(V) + shift)
    )
    sampled = torch.randint(V, (N,), generator=rng)
    sampled[-1] = V - 1
    candidates = torch.randint(V, (N, K), generator=rng).where(uniform(N, K) > 0.25, -1)
    if K:
        candidates[1::2, 0] = sampled[1::2]
    ids = torch.cat([sampled[:, None], candidates], dim=1)
    logits = F.linear(hidden.double(), weight.double(), bias.double())
    options = {"temperature": config.temperature, "softcap": config.softcap, "backend": "reference"}
    logp = ic.logprobs_from_logits(logits, ids.to(device), **options).logprobs_NK.float().cpu()
    old = (logp + 0.4 * normal(N, 1 + K)).masked_fill(ids < 0, 0.0)
    batch = PolicyBatch(
        sampled_ids_N=sampled,
        old_logprobs_N=old[:, 0],
        advantages_N=normal(N),
        token_weights_N=uniform(N) / N * (uniform(N) > 0.2),
        candidate_ids_NK=candidates,
        candidate_old_logprobs_NK=old[:, 1:],
        candidate_advantages_NK=normal(N, K),
        candidate_weights_N=uniform(N) / N * (uniform(N) > 0.2),
        ref_logprobs_N=old[:, 0] + 0.3 * normal(N),
    )
    leaves = (x.requires_grad_() for x in (hidden, weight, bias))
    return Inputs(*leaves, batch.to(device), config)


def call(name: str, x: Inputs, backend: str) -> tuple[list[Tensor], Tensor | None]:
    """(every output, a scalar to differentiate or None). Outputs have weights of their own in the scalar."""
    head = {"bias": x.bias} if x.logits is None else {}
    first = (x.hidden, x.weight) if x.logits is None else (x.logits,)
    options = {"temperature": x.config.temperature, "softcap": x.config.softcap, "backend": backend}
    if name == "linear_td_errors":
        return [_td_errors(x, first, options | head)], None
    function = getattr(ic, name)
    if "distrl" in name:
        loss, metrics = function(*first, x.batch, x.config, backend=backend, **head)
        return [loss.detach(), *metrics.values()], 3.0 * loss
    if "logprobs" in name:
        outputs = list(function(*first, x.batch.ids_NK, **options, **head))
        return [value.detach() for value in outputs], sum(_weighted(value) for value in outputs)
    return list(function(*first, x.batch.sampled_ids_N, **options, **head)), None


def _td_errors(x: Inputs, first: tuple[Tensor, ...], options: dict) -> Tensor:
    """With given logits, from log-probs: there is no function of its own for them."""
    ids = x.batch.ids_NK
    old = torch.cat([x.batch.old_logprobs_N[:, None], x.batch.candidate_old_logprobs_NK], dim=1)
    if x.logits is None:
        return ic.linear_td_errors(*first, ids, old, BETA, **options)
    logprobs = ic.logprobs_from_logits(*first, ids, **options).logprobs_NK.detach()
    return (BETA * (logprobs - old)).masked_fill(ids < 0, 0.0)


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


def sequence_functions(lengths: list[int], device: torch.device) -> dict[str, Callable[[Tensor, str], Tensor]]:
    """Functions of packed token values [N] and a backend. Two sequences a prompt."""
    B = len(lengths)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=device)
    labels, groups = torch.arange(B, device=device) % 2, torch.arange(B, device=device) // 2
    pairs = torch.arange(B - B % 2, device=device).view(-1, 2)
    sigma = torch.tensor(2.0, dtype=torch.float64, device=device)
    return {
        "prefix_values": lambda x, b: ic.prefix_values(x, cu, 10.0, backend=b),
        "mean_prefix_values": lambda x, b: ic.mean_prefix_values(x, cu, 10.0, backend=b),
        "gae": lambda x, b: ic.gae(x, cu, 0.99, 0.95, backend=b),
        "group_normalize": lambda x, b: ic.group_normalize(x, cu, groups, backend=b),
        "process_advantages": lambda x, b: ic.process_advantages(
            x, cu, groups, normalize="batch", sigma=sigma, backend=b
        ),
        "ipvrm_loss": lambda x, b: ic.ipvrm_loss(x, cu, labels, backend=b),
        "implicit_prm_loss": lambda x, b: ic.implicit_prm_loss(x, cu, labels, backend=b),
        "dpo_reward_loss": lambda x, b: ic.dpo_reward_loss(x, cu, pairs, backend=b),
    }
