"""The work on the rows of a chunk in torch, where this rank has only some columns (fused/shard.py).

Shape letters: n rows of a chunk, V columns here, K ids a row, k candidate slots, R ranks.
"""

from torch import Tensor

from ipvrm_core.fused.head import RowGradient
from ipvrm_core.fused.rows import Found, TorchRows
from ipvrm_core.fused.shard import VocabularyShard, elsewhere
from ipvrm_core.fused.softmax import RowSoftmax, row_softmax_


class ShardedTorchRows(TorchRows):
    """TorchRows with an exchange after the statistics, and ids as the whole head counts them."""

    def __init__(self, shard: VocabularyShard, *arguments, **options) -> None:
        super().__init__(*arguments, **options | {"widest": shard.widest})
        self.shard = shard

    def _softmax(self, x_nV: Tensor, ids_nK: Tensor) -> RowSoftmax:
        local_nK = self.shard.local_ids(ids_nK, x_nV.shape[1])
        y_nK = self.shard.sum(x_nV.gather(1, local_nK.clamp(min=0)).masked_fill_(local_nK < 0, 0.0))
        return self._combined(row_softmax_(x_nV, self.scratch, local_nK), y_nK, ids_nK)

    def _combined(self, softmax: RowSoftmax, y_nK: Tensor, ids_nK: Tensor) -> RowSoftmax:
        """Of the whole row: sum_v over this rank's exp(l - max) / sum is this rank's share of it."""
        first_n = self.shard.reference(y_nK)
        log_sum_n = softmax.sum_N1[:, 0].log()
        whole = self.shard.combined(softmax.max_N - first_n + log_sum_n, softmax.entropy_N)
        logp_nK = ((y_nK - first_n[:, None]) - whole.log_sum_n[:, None]).masked_fill_(ids_nK < 0, 0.0)
        sum_n1 = (log_sum_n - whole.log_share_n).exp()[:, None]
        return RowSoftmax(softmax.exp_NV, sum_n1, logp_nK, first_n + whole.log_sum_n, whole.entropy_n, softmax.max_N)

    def _gradient(self, rows, softmax, ids_nK, c_nK, slope_nV, grad_lse_n, grad_entropy_n) -> RowGradient:
        local_nK = self.shard.local_ids(ids_nK, softmax.exp_NV.shape[1])
        grad_lse_n = elsewhere(ids_nK, local_nK, c_nK, grad_lse_n)
        return super()._gradient(rows, softmax, local_nK, c_nK, slope_nV, grad_lse_n, grad_entropy_n)

    def _candidates(self, x_nV: Tensor, sampled_n: Tensor, k: int, threshold: float) -> tuple[Found, RowSoftmax]:
        """As those of one rank, [n, R k] of them. A rank's own probabilities are the larger ones: it misses none."""
        likely_nk = x_nV.topk(min(k, x_nV.shape[1]), dim=-1, sorted=False).indices.sort(dim=-1).values
        likely_y_nk = x_nV.gather(1, likely_nk)
        softmax = self._softmax(x_nV, sampled_n[:, None])
        logp_nk = (likely_y_nk - softmax.max_N[:, None]) - softmax.sum_N1.log()
        ids_nk, logp_nk = self.shard.merged(likely_nk.masked_fill(logp_nk < threshold, -1), logp_nk, k)
        return (ids_nk, logp_nk, softmax.logprobs_NK[:, 0], softmax.entropy_N), softmax
