"""Random inputs of the public functions, and the one maker of random policy batches: `random_batch`.

`make_inputs` takes any size and every option, for checks of values (bench/correctness.py, tests/); bench/problems.py
makes rows as a language model has them, for times. Shape letters: N rows, D hidden size, V vocabulary, K candidate
slots, S = 1 + K slots.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ipvrm_core import PolicyBatch, PolicyLossConfig, logprobs_from_logits


def random_ids(N: int, V: int, K: int, rng: torch.Generator) -> Tensor:
    """[N, S] on the generator's device; a quarter of the candidates padding, the sampled id one of them in odd rows.

    The last row's sampled id is V - 1: in the last, partial block of a sweep.
    """
    ids_NS = torch.randint(V, (N, 1 + K), generator=rng, device=rng.device)
    ids_NS[-1:, 0] = V - 1
    padded_NK = torch.rand(N, K, generator=rng, device=rng.device) < 0.25
    ids_NS[:, 1:].masked_fill_(padded_NK, -1)
    ids_NS[1::2, 1:2] = ids_NS[1::2, :1]
    return ids_NS


def random_batch(
    ids_NS: Tensor,
    logprobs_NS: Tensor,
    rng: torch.Generator,
    *,
    noise: float = 0.4,
    weights_N: Tensor | None = None,
    reference: bool = False,
    temperatures_N: Tensor | None = None,
) -> PolicyBatch:
    """Normal advantages, and an old policy that is `noise` nats away from `logprobs_NS`, those of the current one.

    weights_N: of both branches; None: random ones, 1 / 2 N on average, a fifth of each branch masked (never in row 0).
    reference: with ref_logprobs_N, 0.3 nats from the old ones. All on the generator's device, float32.
    """
    shape, N = ids_NS.shape, len(ids_NS)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=rng, device=rng.device)

    def weights() -> Tensor:
        size_N, luck_N = torch.rand(2, N, generator=rng, device=rng.device)
        luck_N[:1] = 1.0
        return size_N / N * (luck_N > 0.2)

    old_NS = (logprobs_NS.float() + noise * normal(*shape)).masked_fill(ids_NS < 0, 0.0)
    branches = (weights(), weights()) if weights_N is None else (weights_N, weights_N)
    ref_N = old_NS[:, 0] + 0.3 * normal(N) if reference else None
    return PolicyBatch(ids_NS, old_NS, normal(*shape), *branches, ref_N, temperatures_N)


@dataclass(frozen=True)
class Inputs:
    """`logits` is set for the functions that take them. Leaves require a gradient."""

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

    @property
    def transform(self) -> dict:
        """The options by which functions of a head turn its output into logits."""
        rows = self.batch.temperatures_N
        return {"temperature": self.config.temperature if rows is None else rows, "softcap": self.config.softcap}


def make_inputs(
    N: int,
    D: int,
    V: int,
    K: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    scale: float = 3.0,
    shift: float = 0.0,
    row_temperatures: bool = False,
    config: PolicyLossConfig | None = None,
) -> Inputs:
    """`random_ids` and a `random_batch` on them with a reference: ratios of 0.5 to 2. Equal sizes, equal inputs.

    The logits have the standard deviation `scale` and, with a bias, the mean `shift`. row_temperatures: one a row, 0.5
    to 2, in the batch.
    """
    rng, config = torch.Generator().manual_seed(N * 1009 + V), config or PolicyLossConfig()

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=rng)

    head = (normal(N, D) * scale / D**0.5, normal(V, D), normal(V) + shift if bias else None)
    hidden, weight, bias_V = (None if x is None else x.to(device, dtype).requires_grad_() for x in head)
    ids_NS = random_ids(N, V, K, rng)
    temperatures_N = torch.linspace(0.5, 2.0, N) if row_temperatures else None
    with torch.no_grad():
        logits = F.linear(*(None if x is None else x.double() for x in (hidden, weight, bias_V)))
        transform = {"temperature": config.temperature, "softcap": config.softcap}
        transform |= {"temperature": temperatures_N.to(device)} if row_temperatures else {}
        logp_NS = logprobs_from_logits(logits, ids_NS.to(device), backend="reference", **transform).logprobs_NK
    batch = random_batch(ids_NS, logp_NS.cpu(), rng, reference=True, temperatures_N=temperatures_N)
    return Inputs(hidden, weight, bias_V, batch.to(device), config)
