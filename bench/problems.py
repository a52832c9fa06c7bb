"""Inputs of the GPU benchmark, on the device, in the dtype of training.

Flat rows: logits of standard deviation 1, so that no token reaches P_min. Peaked rows have the candidate statistics
that the paper's authors give for Qwen3-0.6B, mean |C| 1.33 and mean mass 96.11% at P_min 0.1: logits of standard
deviation 3, and above them one lifted token in a share of the rows and four in the others, with a lift that is found by
bisection. The logits stay below 40, as those of language models do, so that bfloat16 rounds them as it would theirs.
What came out is in `Problem.statistics`.

Shape letters: N rows, n rows of a chunk, D hidden size, V vocabulary, K candidate slots, S = 1 + K slots, B sequences
of T tokens, M candidates of all rows together.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

import ipvrm_core
from ipvrm_core import Candidates, PolicyBatch
from ipvrm_core.bench.cases import Setting
from ipvrm_core.bench.inputs import random_batch

P_MIN, MEAN_CANDIDATES, MEAN_MASS = 0.1, 1.33, 0.9611
SLOTS = 10  # floor(1 / P_min)
# |C| of flat rows, which have no candidates of their own: 1 to 5 with these shares have the mean 1.33.
COUNT_SHARES = (0.78, 0.145, 0.05, 0.018, 0.007)
STD, LIFTED, CERTAIN_LIFT = 3.0, 4, 25.0  # of the logits; tokens lifted in an uncertain row; the lift in a certain one
SAMPLE = 512  # rows for the bisection
NOISE = 0.2  # nats between old and current policy, so that some ratios are clipped
TOKENS = 1024  # of a sequence


class Sampled(NamedTuple):
    """The sampled tokens alone, contiguous: what losses take that know no candidates."""

    ids_N: Tensor
    mask_N: Tensor  # bool
    advantages_N: Tensor
    old_logprobs_N: Tensor


@dataclass(frozen=True)
class Problem:
    """One optimiser step's rows. `hidden_ND` requires a gradient, `weight_VD` unless the head is frozen.

    At the logits level `logits_NV` takes the place of both. Advantages of sampled tokens are equal within a sequence
    and the weights are 1 / unmasked tokens, so that losses which know only GRPO compute the same function.
    """

    setting: Setting
    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    batch: PolicyBatch
    sampled: Sampled
    candidates_M: tuple[Tensor, Tensor]  # rows and slots
    statistics: dict
    logits_NV: Tensor | None = None

    @property
    def wanted(self) -> list[Tensor]:
        """What a step differentiates by."""
        inputs = (self.logits_NV, self.hidden_ND, self.weight_VD)
        return [x for x in inputs if x is not None and x.requires_grad]

    @property
    def sequences(self) -> int:
        """B, with N = B T. One sequence where N is no multiple of T."""
        N = len(self.sampled.mask_N)
        return N // TOKENS if N % TOKENS == 0 else 1

    def targets_N(self) -> Tensor:
        """The sampled ids, -100 at masked rows: what cross entropies take."""
        return self.sampled.ids_N.masked_fill(~self.sampled.mask_N, -100)

    def at_logits(self) -> "Problem":
        """The same rows given as logits, which require the gradient."""
        with torch.no_grad():
            logits_NV = torch.mm(self.hidden_ND, self.weight_VD.t())
        return replace(self, hidden_ND=None, weight_VD=None, logits_NV=logits_NV.requires_grad_())


def make_problem(setting: Setting, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Problem:
    """Random rows of the setting; equal settings give equal problems."""
    N, D, V = setting.shape.N, setting.shape.D, setting.shape.V
    rng = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=rng, device=device)

    weight_VD = (normal(V, D) / D**0.5).to(dtype)
    hidden_ND, sampled_N = _hidden(setting, weight_VD, normal, rng)
    weight_VD.requires_grad_(not setting.frozen)
    mask_N = torch.rand(N, generator=rng, device=device) >= setting.masked
    old = ipvrm_core.select_candidates(hidden_ND.detach(), weight_VD.detach(), sampled_N, P_MIN, backend="chunked")
    ids_NS = _slots(setting, old.ids_NS, V, rng)
    logp_NS = old.logprobs_NS
    if ids_NS is not old.ids_NS:
        with torch.no_grad():
            logp_NS = ipvrm_core.linear_logprobs(hidden_ND, weight_VD, ids_NS, backend="chunked").logprobs_NK
    batch = random_batch(ids_NS, logp_NS, rng, noise=NOISE, weights_N=mask_N / mask_N.sum().clamp(min=1))
    batch.advantages_NS[:, 0] = normal(-(-N // TOKENS)).repeat_interleave(TOKENS)[:N]
    sampled = Sampled(sampled_N, mask_N, *(x[:, 0].contiguous() for x in (batch.advantages_NS, batch.old_logprobs_NS)))
    rows_M, columns_M = (ids_NS[:, 1:] >= 0).nonzero(as_tuple=True)
    facts = {**_statistics(old), "candidates_used": len(rows_M) / N}
    return Problem(setting, hidden_ND.requires_grad_(), weight_VD, batch, sampled, (rows_M, 1 + columns_M), facts)


def _statistics(natural: Candidates) -> dict[str, float]:
    """Of the rows' own candidates."""
    mass_N = (natural.logprobs_NS.exp() * (natural.ids_NS >= 0))[:, 1:].sum(-1)
    return {
        "candidates_of_the_rows": natural.counts_N.float().mean().item(),
        "mass_of_the_rows": mass_N.mean().item(),
    }


def _hidden(setting: Setting, weight_VD: Tensor, normal, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hidden states [N, D] and a token drawn from each row's softmax [N]."""
    (V, D), N = weight_VD.shape, setting.shape.N
    if not setting.peaked:
        return normal(N, D).to(weight_VD.dtype), torch.randint(V, (N,), generator=rng, device=weight_VD.device)
    lift, certain_share = calibrate(weight_VD, rng)
    lifts_N4 = torch.full((N, LIFTED), lift, device=weight_VD.device)
    certain_N = torch.rand(N, generator=rng, device=weight_VD.device) < certain_share
    lifts_N4[certain_N] = lifts_N4.new_tensor([CERTAIN_LIFT, *[0.0] * (LIFTED - 1)])
    ids_N4 = torch.randint(V, (N, LIFTED), generator=rng, device=weight_VD.device)
    hidden_ND = lifted(STD * normal(N, D), weight_VD, ids_N4, lifts_N4).to(weight_VD.dtype)
    sampled_N = torch.empty(N, dtype=torch.int64, device=weight_VD.device)
    n = max(1, (256 << 20) // (4 * V))
    for start in range(0, N, n):
        z_nV = torch.mm(hidden_ND[start : start + n], weight_VD.t()).float()
        # The largest of z - log(exponential) is a draw from softmax(z).
        z_nV -= torch.empty_like(z_nV).exponential_(generator=rng).log_()
        sampled_N[start : start + n] = z_nV.argmax(-1)
    return hidden_ND, sampled_N


def _slots(setting: Setting, natural_NS: Tensor, V: int, rng: torch.Generator) -> Tensor:
    """[N, S]: no candidates, the rows' own (peaked, mean 1.33), or random ids: 10, or 1 to 5 in COUNT_SHARES."""
    if setting.loss == "ppo" or setting.candidates == "0":
        return natural_NS[:, :1].contiguous()
    if setting.candidates == "mean 1.33" and setting.peaked:
        return natural_NS
    N, device = len(natural_NS), natural_NS.device
    ids_NK = torch.randint(V, (N, SLOTS), generator=rng, device=device)
    if setting.candidates != "10":
        shares = torch.tensor(COUNT_SHARES, device=device).expand(N, -1)
        counts_N1 = 1 + torch.multinomial(shares, 1, generator=rng)
        ids_NK.masked_fill_(torch.arange(SLOTS, device=device) >= counts_N1, -1)
    return torch.cat([natural_NS[:, :1], ids_NK], dim=1)


def lifted(hidden_ND: Tensor, weight_VD: Tensor, ids_N4: Tensor, lifts_N4: Tensor) -> Tensor:
    """Hidden states whose logits at the ids are higher by the lifts, and elsewhere by lift / sqrt(D) noise."""
    for ids_N, lifts_N in zip(ids_N4.unbind(1), lifts_N4.unbind(1), strict=True):
        rows_ND = weight_VD[ids_N].float()
        hidden_ND = hidden_ND + rows_ND * (lifts_N / rows_ND.square().sum(-1))[:, None]
    return hidden_ND


def calibrate(weight_VD: Tensor, rng: torch.Generator) -> tuple[float, float]:
    """(lift of an uncertain row's tokens, share of certain rows) for the statistics above.

    A certain row has one candidate and mass 1, so over the uncertain rows (mean |C| - 1) / (1 - mass) must be
    0.33 / 0.0389. It grows with the lift, because fewer of the other tokens' probability is left.
    """
    V, D = weight_VD.shape
    base_ND = STD * torch.randn(SAMPLE, D, generator=rng, device=weight_VD.device)
    ids_N4 = torch.randint(V, (SAMPLE, LIFTED), generator=rng, device=weight_VD.device)
    low, high, wanted = 0.0, 40.0, (MEAN_CANDIDATES - 1) / (1 - MEAN_MASS)
    ends = (lifted(base_ND, weight_VD, ids_N4, base_ND.new_full(ids_N4.shape, lift)) for lift in (low, high))
    z_NV, highest_NV = (torch.mm(h_ND.to(weight_VD.dtype), weight_VD.t()).float() for h_ND in ends)
    step_NV = (highest_NV - z_NV) / high  # logits are linear in the lift
    p_NV = torch.empty_like(z_NV)  # in place: on a CPU fresh pages would cost more than the arithmetic
    for _ in range(16):
        lift = (low + high) / 2
        torch.add(z_NV, step_NV, alpha=lift, out=p_NV)
        p_NV.sub_(p_NV.amax(-1, keepdim=True)).exp_()
        p_NV.div_(p_NV.sum(-1, keepdim=True))
        likely = p_NV[p_NV >= P_MIN]
        mean, mass = len(likely) / SAMPLE, likely.sum().item() / SAMPLE
        low, high = (lift, high) if (mean - 1) / (1 - mass) < wanted else (low, lift)
    return lift, min(max(1 - (1 - MEAN_MASS) / (1 - mass), 0.0), 1.0)
