"""The work on the rows of a chunk in Triton kernels, where this rank has only some columns (fused/shard.py).

The policy loss takes its coefficients from `policy_terms` in torch, on [n, K]: between the visit of a row and its
gradient stands an exchange, so no one kernel can do both.

Shape letters: n rows of a chunk, V columns here, K ids a row, k candidate slots, R ranks.
"""

import torch
from torch import Tensor

from ipvrm_core.fused.head import RowGradient
from ipvrm_core.fused.policy_terms import policy_terms
from ipvrm_core.fused.shard import VocabularyShard, elsewhere
from ipvrm_core.fused.triton_rows import TritonRows
from ipvrm_core.kernels.candidates import candidate_rows
from ipvrm_core.kernels.logprobs import row_logprobs
from ipvrm_core.types import LogProbs, PolicyBatch, PolicyLossConfig


class ShardedTritonRows(TritonRows):
    """TritonRows with an exchange after the statistics, and ids as the whole head counts them."""

    def __init__(self, shard: VocabularyShard, *arguments, **options) -> None:
        super().__init__(*arguments, **options | {"widest": shard.widest})
        self.shard = shard

    def _statistics(self, rows: slice, x_nV: Tensor, ids_nK: Tensor, target_nV: Tensor | None = None, **_) -> tuple:
        """Of the whole row. The logit that all ranks subtract is the shift of their visits too."""
        transform, local_nK = self.transform.rows(rows), self.shard.local_ids(ids_nK, x_nV.shape[1])
        y_nK = self.shard.sum(self._logits(rows, x_nV, local_nK).masked_fill_(local_nK < 0, 0.0))
        reference_n, near_n = self.shard.reference(y_nK), None if self.near_N is None else self.near_N[rows].float()
        _, _, entropy_n, normalizer_n2, total_n = row_logprobs(
            x_nV, local_nK, near_N=near_n, reference_N=reference_n, out_NV=target_nV, **transform._asdict()
        )
        T = transform.column(y_nK)
        T_n = T if isinstance(T, float) else T[:, 0]
        shift_n, log_sum_n = normalizer_n2.unbind(1)
        whole = self.shard.combined((shift_n - reference_n) / T_n + log_sum_n, entropy_n)
        logp_nK = ((y_nK - reference_n[:, None]) / T - whole.log_sum_n[:, None]).masked_fill_(ids_nK < 0, 0.0)
        if total_n is not None and near_n is not None:  # what was stored is p times this
            total_n = (whole.log_sum_n + near_n.clamp(-20.0, 0.0)).exp().masked_fill(total_n == 0, 0.0)
        normalizer_n2 = torch.stack([reference_n, whole.log_sum_n], dim=1)
        return logp_nK, reference_n / T_n + whole.log_sum_n, whole.entropy_n, normalizer_n2, total_n

    def _logits(self, rows: slice, x_nV: Tensor, ids_nK: Tensor) -> Tensor:
        """y at local ids, of any value where id < 0."""
        y_nK, cap = x_nV.gather(1, ids_nK.clamp(min=0)).float(), self.transform.softcap
        return y_nK if cap is None else cap * (y_nK / cap).tanh()

    def td_errors(self, rows: slice, x_nV: Tensor, ids_nK: Tensor, old_nK: Tensor, beta: float) -> Tensor:
        return beta * (self.logprobs(rows, x_nV, ids_nK)[0] - old_nK).masked_fill(ids_nK < 0, 0.0)

    def logprobs_gradient(self, rows, x_nV, target_nV, ids_nK, c_nK, grad_lse_n, *rest) -> RowGradient:
        local_nK = self.shard.local_ids(ids_nK, x_nV.shape[1])
        grad_lse_n = elsewhere(ids_nK, local_nK, c_nK, grad_lse_n)
        return super().logprobs_gradient(rows, x_nV, target_nV, local_nK, c_nK, grad_lse_n, *rest)

    def policy(
        self,
        rows: slice,
        x_nV: Tensor,
        target_nV: Tensor | None,
        batch: PolicyBatch,
        settings: PolicyLossConfig,
        metrics_nM: Tensor,
    ) -> RowGradient | None:
        batch_n = batch.rows(rows)
        self.near_N = None if batch.old_logprobs_NS is None else batch.old_logprobs_NS[:, 0]

        def value_and_gradient(logprobs: LogProbs) -> tuple[Tensor, list]:
            terms = policy_terms(logprobs.logprobs_NK, logprobs.entropy_N, batch_n, settings)
            metrics_nM.copy_(terms.metrics_NM)
            return metrics_nM, [terms.c_NS, None, terms.grad_entropy_N if settings.entropy_coef else None]

        return self.loss(rows, x_nV, target_nV, batch_n.ids_NS, value_and_gradient)[1]

    def candidates(
        self, rows: slice, x_nV: Tensor, sampled_n: Tensor, k: int, threshold: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As those of one rank, [n, R k] of them. A rank's own probabilities are the larger ones: it misses none."""
        logp_n1, _, entropy_n, normalizer_n2, _ = self._statistics(rows, x_nV, sampled_n[:, None])
        none_n = torch.full_like(sampled_n, -1)
        ids_nk, *_ = candidate_rows(
            x_nV, none_n, min(k, x_nV.shape[1]), threshold=threshold, **self.transform.rows(rows)._asdict()
        )
        y_nk = self._logits(rows, x_nV, ids_nk)
        shift_n1, log_sum_n1 = normalizer_n2[:, :1], normalizer_n2[:, 1:]
        logp_nk = (y_nk - shift_n1) / self.transform.rows(rows).column(y_nk) - log_sum_n1
        ids_nk, logp_nk = self.shard.merged(ids_nk.masked_fill(logp_nk < threshold, -1), logp_nk, k)
        return ids_nk, logp_nk, logp_n1[:, 0], entropy_n
