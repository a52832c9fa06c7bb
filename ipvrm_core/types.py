"""Plain data that crosses the public interface.

Shape letters: N response tokens of the packed batch (rows), V vocabulary, D hidden size, K candidate slots.
"""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

# log pi - log pi_old and log pi_ref - log pi are bounded from above before the exponential: beyond, a term stays as it
# is there and has no gradient. e^40 = 2e17, whose square, which a gradient's norm takes, is finite in float32.
LOG_RATIO_LIMIT = 40.0


class LogProbs(NamedTuple):
    """Per-row quantities of a softmax head. `lse_N` is log sum_v exp(z_v), `entropy_N` is -sum_v p_v log p_v (nats)."""

    logprobs_NK: Tensor
    lse_N: Tensor
    entropy_N: Tensor


class Candidates(NamedTuple):
    """The set C_t = {v : pi_old(v | s_t) >= P_min} of every row, ids ascending, padded with id -1 and log-prob 0."""

    ids_NK: Tensor  # int64
    logprobs_NK: Tensor  # float32, of the full vocabulary, not renormalised over C_t
    counts_N: Tensor  # int64, |C_t|
    sampled_logprobs_N: Tensor
    entropy_N: Tensor


class Normalizers(NamedTuple):
    """What the loss of one optimiser step divides by, counted over the GLOBAL batch (all micro-batches and ranks)."""

    sequences: float  # sequences with at least one unmasked token
    tokens: float  # unmasked tokens
    candidate_mass: float  # sum of pi_old(v) over all candidates of unmasked tokens


@dataclass(frozen=True)
class PolicyBatch:
    """One row per response token. All normalisation is inside the two weight vectors, so that losses of pieces add up.

    sampled_ids_N, candidate_ids_NK: int64; a candidate id < 0 is padding. K may be 0.
    old_logprobs_N, candidate_old_logprobs_NK: log pi_old at the sampling temperature.
    advantages_N: A_t of the sampled token. candidate_advantages_NK: A_TD(v) = delta_t(v) / sigma_V.
    token_weights_N, candidate_weights_N: from `branch_weights`; 0 masks the row out of that branch. A row masked out of
    both is not looked at: its hidden state or logits may hold NaN, and so may everything else of it but the ids.
    ref_logprobs_N: log pi_ref of the sampled token, only for the KL term.
    temperatures_N: one temperature a row, > 0, in place of PolicyLossConfig.temperature.
    """

    sampled_ids_N: Tensor
    old_logprobs_N: Tensor
    advantages_N: Tensor
    token_weights_N: Tensor
    candidate_ids_NK: Tensor
    candidate_old_logprobs_NK: Tensor
    candidate_advantages_NK: Tensor
    candidate_weights_N: Tensor
    ref_logprobs_N: Tensor | None = None
    temperatures_N: Tensor | None = None

    def __post_init__(self) -> None:
        N = self.sampled_ids_N.shape[0]
        K = self.candidate_ids_NK.shape[-1]
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            expected = (N, K) if field.name.endswith("_NK") else (N,)
            if tuple(value.shape) != expected:
                letters = "[N, K]" if field.name.endswith("_NK") else "[N]"
                raise ValueError(f"{field.name} must be {letters} = {expected}; got shape {tuple(value.shape)}")
            if "_ids_" in field.name and value.dtype != torch.int64:
                raise ValueError(f"{field.name} must be int64; got {value.dtype}")

    @property
    def ids_NK(self) -> Tensor:
        """[N, 1+K]: the sampled id in slot 0, then the candidates."""
        return torch.cat([self.sampled_ids_N[:, None], self.candidate_ids_NK], dim=1)

    @property
    def masked_N(self) -> Tensor:
        """[N] bool: rows of weight 0 in both branches."""
        return (self.token_weights_N == 0) & (self.candidate_weights_N == 0)

    def rows(self, index) -> "PolicyBatch":
        """The rows selected by a slice or an index tensor; weights stay global, so pieces add up to the whole."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return PolicyBatch(**{name: None if value is None else value[index] for name, value in values.items()})

    def to(self, device) -> "PolicyBatch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return PolicyBatch(**{name: None if value is None else value.to(device) for name, value in values.items()})


@dataclass(frozen=True)
class PolicyLossConfig:
    """Settings of L = L_tok + alpha * L_dist + kl_coef * KL(pi || pi_ref) - entropy_coef * H. Defaults: the paper's.

    clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high] (0.20 / 0.28).
    dual_clip: on negative advantages the loss of a token is capped at dual_clip * |A|; None switches it off.
    temperature divides the logits and must be the one the batch was sampled at.
    softcap: the logits are first bounded to softcap * tanh(logits / softcap), as in Gemma 2; None switches it off.
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
    "kl_ref",  # k3 estimate of KL(pi || pi_ref); 0 when there is no reference
    "entropy",  # mean entropy of pi, nats
)
