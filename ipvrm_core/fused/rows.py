"""The work on the rows of a chunk in torch alone. `triton_rows` is the same in Triton kernels; `row_work` chooses.

Shape letters: n rows of a chunk, V vocabulary, K ids a row, k candidate slots of the search.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from ipvrm_core.fused.head import _SCRATCH_BYTES, Head, RowGradient, rows_per_chunk
from ipvrm_core.fused.policy_terms import policy_terms
from ipvrm_core.fused.shard import VocabularyShard
from ipvrm_core.fused.softmax import RowSoftmax, logit_gradient_, row_softmax_
from ipvrm_core.fused.transform import LogitTransform
from ipvrm_core.fused.truncation import BYTES_PER_LOGIT, truncate_
from ipvrm_core.types import LogProbs, PolicyBatch, PolicyLossConfig, Truncation

if TYPE_CHECKING:
    from ipvrm_core.fused.triton_rows import TritonRows

Found: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]  # see `candidates`
# (ids, log p, sampled log p, entropy) -> (ids [n, S], dLoss/dlog p there, dLoss/dH or None).
CandidateTerms: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]
# A function of log-probs -> its value and its derivatives by log-probs, LSE and entropy, None where there is none.
ValueAndGradient: TypeAlias = Callable[[LogProbs], tuple[Tensor, list]]


def row_work(
    triton: bool,
    *arguments,
    shard: VocabularyShard | None = None,
    bfloat16_logits: bool = False,
    truncation: Truncation | None = None,
    **options,
) -> "TorchRows | TritonRows":
    """TorchRows(...) or TritonRows(...), whose interface is the same, or what they are on a rank of a split head.

    bfloat16_logits: of the kernels alone. truncation: in torch alone, whichever is asked for, and of a whole head.
    """
    if bfloat16_logits:
        assert triton
        options["bfloat16_logits"] = True
    if truncation is not None:
        assert shard is None
        triton, options["truncation"] = False, truncation
    if shard is not None:
        return _sharded(triton)(shard, *arguments, **options)
    if not triton:
        return TorchRows(*arguments, **options)
    from ipvrm_core.fused.triton_rows import TritonRows

    return TritonRows(*arguments, **options)


def _sharded(triton: bool) -> Callable:
    if triton:
        from ipvrm_core.fused.sharded_triton_rows import ShardedTritonRows

        return ShardedTritonRows
    from ipvrm_core.fused.sharded_rows import ShardedTorchRows

    return ShardedTorchRows


class TorchRows:
    """`head` makes the chunks, which this work overwrites; `transform` turns them into logits. masked_N: see `Head`.

    with_gradient: whether a gradient will be asked for. near_N [N]: about log p of the first id, for TritonRows.
    widest: columns by which chunks are measured, None for those of the head. truncation: for `logprobs` and gradient.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        transform: LogitTransform,
        max_buffer_bytes: int,
        masked_N: Tensor | None = None,
        near_N: Tensor | None = None,
        with_gradient: bool = False,
        widest: int | None = None,
        truncation: Truncation | None = None,
    ) -> None:
        self.transform, self.truncation = transform, truncation
        scratch_bytes = min(_SCRATCH_BYTES.get(hidden.device.type, 256 << 20), max_buffer_bytes // 4)
        bfloat16 = 2 * (hidden.is_cuda and hidden.dtype == torch.bfloat16 and weight is not None)
        slope = 0 if transform.softcap is None else 4
        budget, extra = max_buffer_bytes - (1 if truncation is None else 2) * scratch_bytes, bfloat16 + slope
        self.head = Head(hidden, weight, bias, budget, extra_bytes_per_logit=extra, masked_N=masked_N, widest=widest)
        b = rows_per_chunk(self.head.n, widest or self.head.V, self.head.wide.itemsize, scratch_bytes)
        self.scratch = hidden.new_empty(b, self.head.V, dtype=self.head.wide)

    def _logits_(self, rows: slice, x_nV: Tensor) -> Tensor | None:
        """x becomes the logits of the softmax, -inf where they are truncated; dy/dx where there is a soft cap."""
        slope_nV = self.transform.rows(rows).apply_(x_nV)
        if self.truncation is not None:
            truncate_(x_nV, self.truncation, max(1, self.scratch.nbytes // (self.head.V * BYTES_PER_LOGIT)))
        return slope_nV

    def _softmax(self, x_nV: Tensor, ids_nK: Tensor) -> RowSoftmax:
        """x, already logits, becomes exp(x - max)."""
        return row_softmax_(x_nV, self.scratch, ids_nK)

    def logprobs(self, rows: slice, x_nV: Tensor, ids_nK: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(log p at ids [n, K]; LSE [n]; entropy [n]; what `logprobs_gradient` wants to be told again, [n, 2])."""
        self._logits_(rows, x_nV)
        softmax = self._softmax(x_nV, ids_nK)
        nothing_n2 = softmax.lse_N.new_zeros(len(x_nV), 2)
        return softmax.logprobs_NK, softmax.lse_N, softmax.entropy_N, nothing_n2

    def td_errors(self, rows: slice, x_nV: Tensor, ids_nK: Tensor, old_nK: Tensor, beta: float) -> Tensor:
        """beta (log p - old) at ids [n, K], 0 at padding."""
        return beta * (self.logprobs(rows, x_nV, ids_nK)[0] - old_nK).masked_fill(ids_nK < 0, 0.0)

    def logprobs_gradient(
        self,
        rows: slice,
        x_nV: Tensor,
        target_nV: Tensor,
        ids_nK: Tensor,
        c_nK: Tensor,
        grad_lse_n: Tensor | None,
        grad_entropy_n: Tensor | None,
        normalizer_n2: Tensor,
        entropy_n: Tensor,
    ) -> RowGradient:
        """dLoss/dx. The statistics are made again: here x becomes exp(l - max), which the gradient needs."""
        slope_nV = self._logits_(rows, x_nV)
        softmax = self._softmax(x_nV, ids_nK)
        if self.truncation is not None:  # -inf is a constant, like padding
            ids_nK = ids_nK.masked_fill(softmax.logprobs_NK == -torch.inf, -1)
        return self._gradient(rows, softmax, ids_nK, c_nK, slope_nV, grad_lse_n, grad_entropy_n)

    def loss(
        self, rows: slice, x_nV: Tensor, target_nV: Tensor | None, ids_nK: Tensor, fn: ValueAndGradient
    ) -> tuple[Tensor, RowGradient | None]:
        """(fn's value, dLoss/dx or None if no target is given)."""
        slope_nV = self.transform.rows(rows).apply_(x_nV)
        softmax = self._softmax(x_nV, ids_nK)
        value, (c_nK, *others) = fn(LogProbs(softmax.logprobs_NK, softmax.lse_N, softmax.entropy_N))
        if target_nV is None:
            return value, None
        c_nK = torch.zeros_like(softmax.logprobs_NK) if c_nK is None else c_nK
        return value, self._gradient(rows, softmax, ids_nK, c_nK, slope_nV, *others)

    def prepared(self, batch: PolicyBatch) -> PolicyBatch:
        """The batch as `policy` takes it, once for all chunks."""
        return batch

    def policy(
        self,
        rows: slice,
        x_nV: Tensor,
        target_nV: Tensor | None,
        batch: PolicyBatch,
        settings: PolicyLossConfig,
        metrics_nM: Tensor,
    ) -> RowGradient | None:
        """dLoss/dx, or None if no target is given; fills metrics."""
        slope_nV, batch_n = self.transform.rows(rows).apply_(x_nV), batch.rows(rows)
        softmax = self._softmax(x_nV, batch_n.ids_NS)
        terms = policy_terms(softmax.logprobs_NK, softmax.entropy_N, batch_n, settings)
        metrics_nM.copy_(terms.metrics_NM)
        if target_nV is None:
            return None
        grad_entropy_n = terms.grad_entropy_N if settings.entropy_coef else None
        return self._gradient(rows, softmax, batch_n.ids_NS, terms.c_NS, slope_nV, None, grad_entropy_n)

    def _gradient(
        self,
        rows: slice,
        softmax: RowSoftmax,
        ids_nK: Tensor,
        c_nK: Tensor,
        slope_nV: Tensor | None,
        grad_lse_n: Tensor | None,
        grad_entropy_n: Tensor | None,
    ) -> RowGradient:
        """Equation (1) divided by T, times dy/dx."""
        T = self.transform.rows(rows).column(c_nK)
        per_row = T if isinstance(T, float) else T[:, 0]
        lse_n, entropy_n = (None if grad is None else grad / per_row for grad in (grad_lse_n, grad_entropy_n))
        head = self.head  # without a weight dx is the result; db wants dx; on a GPU the lost rows would be waited for
        scaled = head.weight is not None and head.bias is None and not softmax.exp_NV.is_cuda
        dx_nV, scale_n1 = logit_gradient_(softmax, self.scratch, ids_nK, c_nK / T, lse_n, entropy_n, scaled=scaled)
        return RowGradient(dx_nV if slope_nV is None else dx_nV.mul_(slope_nV), scale_n1)

    def candidates(self, rows: slice, x_nV: Tensor, sampled_n: Tensor, k: int, threshold: float) -> Found:
        """(ids [n, k] ascending, < 0 where no member; log p [n, k]; sampled log p [n]; entropy [n]).

        Members have log p >= threshold. At most k tokens can, and they are the most probable ones: a top-k of each row
        holds them all.
        """
        self.transform.rows(rows).apply_(x_nV)
        return self._candidates(x_nV, sampled_n, k, threshold)[0]

    def _candidates(self, x_nV: Tensor, sampled_n: Tensor, k: int, threshold: float) -> tuple[Found, RowSoftmax]:
        """x, already logits, becomes exp(x - max)."""
        likely_nk = x_nV.topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values
        softmax = self._softmax(x_nV, torch.cat([likely_nk, sampled_n[:, None]], dim=1))
        logp_nk, sampled_logp_n = softmax.logprobs_NK[:, :k], softmax.logprobs_NK[:, k]
        ids_nk = likely_nk.masked_fill(logp_nk < threshold, -1)
        return (ids_nk, logp_nk, sampled_logp_n, softmax.entropy_N), softmax

    def on_policy(
        self,
        rows: slice,
        x_nV: Tensor,
        target_nV: Tensor | None,
        sampled_n: Tensor,
        k: int,
        threshold: float,
        terms: CandidateTerms,
    ) -> RowGradient | None:
        """dLoss/dx of a loss on the candidates that are found here; None if no target is given."""
        slope_nV = self.transform.rows(rows).apply_(x_nV)
        found, softmax = self._candidates(x_nV, sampled_n, k, threshold)
        ids_nS, c_nS, grad_entropy_n = terms(*found)
        if target_nV is None:
            return None
        return self._gradient(rows, softmax, ids_nS, c_nS, slope_nV, None, grad_entropy_n)
