"""Plain data that crosses the public interface.

Shape letters: N response tokens of the packed batch (rows), B sequences, V vocabulary, D hidden size, K candidates,
S = 1 + K slots a row: slot 0 is the sampled token, the others are the candidates, padded with id -1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ipvrm_core.sequences.aggregation import Aggregation, Normalizers, branch_weights, candidate_mass, normalizers

# log pi - log pi_old and log pi_ref - log pi are bounded from above before the exponential: beyond, a term stays as it
# is there and has no gradient. e^40 = 2e17, whose square, which a gradient's norm takes, is finite in float32.
LOG_RATIO_LIMIT = 40.0


class LogProbs(NamedTuple):
    """Per-row quantities of a softmax head. `lse_N` is log sum_v exp(z_v), `entropy_N` is -sum_v p_v log p_v (nats)."""

    logprobs_NK: Tensor
    lse_N: Tensor
    entropy_N: Tensor


@dataclass(frozen=True)
class Truncation:
    """The tokens that a sampler draws from; the others have probability 0. None switches a rule off.

    With the logits l after the temperature, p = softmax(l), and the rules one after another,

        A = {v : p_v >= min_p max_w p_w}
        B = {v in A : l_v >= the top_k-th largest l}
        C = {v in B : sum of p_w over the w in B with l_w > l_v is below top_p of the sum over B}

    log-probs are l_v - log sum_{w in C} e^{l_w} for v in C, and -inf elsewhere. C is never empty. That is the order and
    the renormalisation of vLLM's V1 sampler (temperature, min-p, top-k, top-p; as in v0.21.0). Equal logits stay or
    go together: a sampler that drops some of them at a border, by chance or by id, draws from a smaller set there.
    """

    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if self.top_k is not None and (self.top_k != int(self.top_k) or self.top_k < 1):
            raise ValueError(f"top_k must be an integer >= 1, or None for all tokens; got {self.top_k}")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} must be in (0, 1], or None for all tokens; got {value}")

    def packed(self) -> list[float]:
        """For an operator: inf stands for None; `unpacked` is the way back."""
        return [math.inf if value is None else float(value) for value in (self.top_k, self.top_p, self.min_p)]

    @classmethod
    def unpacked(cls, packed: list[float]) -> "Truncation | None":
        """None of an empty list: nothing is truncated."""
        if not packed:
            return None
        top_k, top_p, min_p = (None if value == math.inf else value for value in packed)
        return cls(None if top_k is None else int(top_k), top_p, min_p)


class Candidates(NamedTuple):
    """The sampled token and C_t = {v : pi_old(v | s_t) >= P_min} of every row, in slots.

    Slot 0 is the sampled token; then C_t, ids ascending (the sampled token again where it is a member), then padding.
    """

    ids_NS: Tensor  # int64, -1 at padding
    logprobs_NS: Tensor  # log pi_old of the full vocabulary, not renormalised over C_t; 0 at padding
    counts_N: Tensor  # int64, |C_t|
    entropy_N: Tensor  # of pi_old, nats

    @property
    def sampled_logprobs_N(self) -> Tensor:
        """log pi_old(y_t | s_t)."""
        return self.logprobs_NS[:, 0]

    @classmethod
    def from_ragged(
        cls, sampled_ids_N: Tensor, sampled_logprobs_N: Tensor, ids_M: Tensor, logprobs_M: Tensor, offsets: Tensor
    ) -> Self:
        """From the candidates of all rows behind one another: row n owns offsets[n] : offsets[n + 1] of ids, log-probs.

        ids of any integer type, offsets [N+1]. The entropy is unknown: NaN. For transports that carry no padding.
        """
        _check_offsets(offsets, len(sampled_ids_N), len(ids_M))
        counts_N = offsets.diff().to(torch.int64)
        K = int(counts_N.max()) if len(counts_N) else 0
        used_NK = torch.arange(K, device=ids_M.device) < counts_N[:, None]
        ids_NK = torch.full(used_NK.shape, -1, device=ids_M.device).masked_scatter(used_NK, ids_M.to(torch.int64))
        logprobs_NK = logprobs_M.new_zeros(used_NK.shape).masked_scatter(used_NK, logprobs_M)
        return cls(
            torch.cat([sampled_ids_N[:, None].to(torch.int64), ids_NK], dim=1),
            torch.cat([sampled_logprobs_N[:, None].to(logprobs_NK.dtype), logprobs_NK], dim=1),
            counts_N,
            torch.full_like(sampled_logprobs_N, torch.nan),
        )


@dataclass(frozen=True)
class PolicyBatch:
    """One row per response token. All normalisation is inside the two weight vectors, so that losses of pieces add up.

    ids_NS: int64, the sampled id in slot 0, then candidates; a candidate id < 0 is padding.
    old_logprobs_NS: log pi_old at the sampling temperature. None: the policy itself is the old one (on-policy): the
        current log-probs, held constant.
    advantages_NS: A_t of the sampled token, then A_TD(v) = delta_t(v) / sigma_V of the candidates.
    token_weights_N, candidate_weights_N: from `branch_weights`; 0 masks the row out of that branch. A row masked out of
        both is not looked at: its hidden state or logits may hold NaN, and so may everything else of it but the ids.
    ref_logprobs_N: log pi_ref of the sampled token, only for the KL term.
    temperatures_N: one temperature a row, > 0, in place of PolicyLossConfig.temperature.
    """

    ids_NS: Tensor
    old_logprobs_NS: Tensor | None
    advantages_NS: Tensor
    token_weights_N: Tensor
    candidate_weights_N: Tensor
    ref_logprobs_N: Tensor | None = None
    temperatures_N: Tensor | None = None

    def __post_init__(self) -> None:
        if self.ids_NS.dim() != 2 or not self.ids_NS.shape[1]:
            raise ValueError(f"ids_NS must be [N, 1 + K], the sampled id first; got shape {tuple(self.ids_NS.shape)}")
        if self.ids_NS.dtype != torch.int64:
            raise ValueError(f"ids_NS must be int64; got {self.ids_NS.dtype}")
        N, S = self.ids_NS.shape
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.name in OPTIONAL:
                continue
            expected, letters = ((N, S), "[N, S]") if field.name.endswith("_NS") else ((N,), "[N]")
            if tuple(value.shape) != expected:
                raise ValueError(f"{field.name} must be {letters} = {expected}; got shape {tuple(value.shape)}")

    @classmethod
    def of(
        cls,
        ids: Tensor,
        old_logprobs: Tensor | None,
        advantages: Tensor,
        cu_seqlens: Tensor,
        *,
        aggregation: Aggregation = "sequence_mean",
        mask_N: Tensor | None = None,
        totals: Normalizers | None = None,
        constant: float | None = None,
        scale: float = 1.0,
        ref_logprobs_N: Tensor | None = None,
        temperatures_N: Tensor | None = None,
    ) -> Self:
        """A batch of whole sequences with the weights of `branch_weights`.

        ids, old_logprobs, advantages: [N, S] slots, as `select_candidates` and `distrl_advantages` give them; or all
        [N], the sampled tokens alone (GRPO). mask_N bool: tokens that count; None: all. totals: the `normalizers` of
        the global batch where this is a part of one; None: of this batch. constant, scale: see `branch_weights`.
        """
        ids, old_logprobs, advantages = (
            x[:, None] if x is not None and x.dim() == 1 else x for x in (ids, old_logprobs, advantages)
        )
        if mask_N is None:
            mask_N = torch.ones_like(ids[:, 0], dtype=torch.bool)
        if totals is None:
            if old_logprobs is None and ids.shape[1] > 1 and aggregation == "token_mean":
                raise ValueError("token_mean divides by the candidates' pi_old: it needs old_logprobs; got None")
            mass_N = torch.zeros_like(advantages[:, 0]) if old_logprobs is None else candidate_mass(ids, old_logprobs)
            totals = normalizers(cu_seqlens, mask_N, mass_N)
        weights = branch_weights(cu_seqlens, mask_N, totals, aggregation, constant=constant, scale=scale)
        return cls(ids, old_logprobs, advantages, *weights, ref_logprobs_N, temperatures_N)

    @property
    def masked_N(self) -> Tensor:
        """[N] bool: rows of weight 0 in both branches, which nobody looks at."""
        return (self.token_weights_N == 0) & (self.candidate_weights_N == 0)

    def rows(self, index) -> Self:
        """The rows selected by a slice or an index tensor; weights stay global, so pieces add up to the whole."""
        return self._map(lambda value: value[index])

    def to(self, device) -> Self:
        return self._map(lambda value: value.to(device))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return type(self)(**{name: None if value is None else function(value) for name, value in values.items()})


OPTIONAL = ("old_logprobs_NS", "ref_logprobs_N", "temperatures_N")  # of a PolicyBatch


def _check_offsets(offsets: Tensor, rows: int, total: int) -> None:
    if offsets.shape != (rows + 1,) or offsets.is_floating_point():
        raise ValueError(f"offsets must be integers [N+1] = ({rows + 1},); got {offsets.dtype}, {tuple(offsets.shape)}")
    if offsets.device.type == "cpu" and (offsets[0] != 0 or offsets[-1] != total or (offsets.diff() < 0).any()):
        raise ValueError(f"offsets must rise from 0 to {total} ids; got {offsets.tolist()}")


@dataclass(frozen=True)
class PolicyLossConfig:
    """Settings of L = L_tok + alpha * L_dist + kl_coef * KL(pi || pi_ref) - entropy_coef * H. Defaults: the paper's.

    clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high] (0.20 / 0.28).
    dual_clip: on negative advantages the loss of a token is capped at dual_clip * |A|; None switches it off.
    temperature divides the logits and must be the one the batch was sampled at.
    softcap: the logits are first bounded to softcap * tanh(logits / softcap), as in Gemma 2; None switches it off.
    kl_ratio: the KL term is multiplied by rho_t(y_t), which corrects its gradient for samples of the old policy.
    """

    alpha: float = 0.1
    clip_low: float = 0.20
    clip_high: float = 0.28
    dual_clip: float | None = None
    candidate_clip_low: float = 0.20
    candidate_clip_high: float = 0.28
    candidate_dual_clip: float | None = None
    temperature: float = 1.0
    softcap: float | None = None
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    kl_ratio: bool = False

    def __post_init__(self) -> None:
        # Comparisons that nan fails; and no inf, which does not survive a product with 0.
        for name in ("clip_low", "candidate_clip_low"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1]; got {getattr(self, name)}")
        for name in ("alpha", "clip_high", "candidate_clip_high", "kl_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite; got {getattr(self, name)}")
        for name in ("dual_clip", "candidate_dual_clip"):
            value = getattr(self, name)
            if value is not None and not 1 < value < math.inf:
                raise ValueError(f"{name} must be > 1 and finite, or None; got {value}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be > 0 and finite; got {self.temperature}")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"softcap must be > 0 and finite, or None; got {self.softcap}")
        if self.kl_ratio not in (True, False):
            raise ValueError(f"kl_ratio must be True or False; got {self.kl_ratio}")
        if not math.isfinite(self.entropy_coef):
            raise ValueError(f"entropy_coef must be finite; got {self.entropy_coef}")


class PolicyLossOutput(NamedTuple):
    """`loss` carries the gradient. `metrics` are detached 0-d tensors, sums over rows with the batch's weights.

    Because the weights are global, the metrics of micro-batches add up to those of the batch.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


METRICS = (
    "loss_sampled",  # L_tok
    "loss_candidates",  # L_dist (before alpha)
    "clip_fraction",  # weighted share of sampled tokens whose clipped term is the active one
    "candidate_clip_fraction",  # same over candidates, weighted by candidate_weights * pi_old
    "ratio",  # mean pi / pi_old of the sampled tokens
    "kl_old",  # k3 estimate of KL(pi_old || pi) from the sampled tokens: rho - 1 - log rho
    "kl_ref",  # k3 estimate of KL(pi || pi_ref), times the ratio under kl_ratio; 0 when there is no reference
    "entropy",  # mean entropy of pi, nats
)
