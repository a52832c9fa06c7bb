"""The work on the rows of a chunk in Triton kernels, and no private buffer where the logits are given.

Shape letters: n rows of a chunk, V vocabulary, K ids a row, k candidate slots of the search.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ipvrm_core.fused.head import Head
from ipvrm_core.fused.rows import ValueAndGradient
from ipvrm_core.fused.transform import LogitTransform
from ipvrm_core.kernels.candidates import candidate_rows
from ipvrm_core.kernels.logit_gradient import logit_gradient
from ipvrm_core.kernels.logprobs import row_logprobs
from ipvrm_core.kernels.policy_rows import Clip, policy_rows
from ipvrm_core.types import LogProbs, PolicyBatch, PolicyLossConfig


class GivenLogits(Head):
    """Logits that exist already: one chunk, read where they lie (masked rows are left to the kernel)."""

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        x_NV = self.hidden if self.hidden.stride(1) == 1 else self.hidden.contiguous()
        yield slice(0, self.N), x_NV


class TritonRows:
    """See TorchRows: the same interface. Products have a fixed shape, so a row's bits do not depend on N."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        transform: LogitTransform,
        max_buffer_bytes: int,
        masked_N: Tensor | None = None,
    ) -> None:
        if transform.temperatures_N is not None:
            transform = transform._replace(temperatures_N=transform.temperatures_N.to(torch.float32))
        self.transform = transform
        kind = GivenLogits if weight is None else Head
        self.head = kind(hidden, weight, bias, max_buffer_bytes, fixed=True, masked_N=masked_N)

    def _options(self, rows: slice) -> dict:
        return self.transform.rows(rows)._asdict()

    def logprobs(self, rows: slice, x_nV: Tensor, ids_nK: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return row_logprobs(x_nV, ids_nK, **self._options(rows))

    def td_errors(self, rows: slice, x_nV: Tensor, ids_nK: Tensor, old_nK: Tensor, beta: float) -> Tensor:
        return row_logprobs(x_nV, ids_nK, old_logprobs_NK=old_nK, beta=beta, **self._options(rows))[0]

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
    ) -> Tensor:
        grads = {"grad_lse_N": grad_lse_n, "grad_entropy_N": grad_entropy_n}
        logit_gradient(x_nV, target_nV, ids_nK, c_nK, normalizer_n2, entropy_n, **grads, **self._options(rows))
        return target_nV

    def loss(
        self, rows: slice, x_nV: Tensor, target_nV: Tensor | None, ids_nK: Tensor, fn: ValueAndGradient
    ) -> tuple[Tensor, Tensor | None]:
        *outputs, normalizer_n2 = self.logprobs(rows, x_nV, ids_nK)
        value, (c_nK, lse_n, entropy_n) = fn(LogProbs(*outputs))
        if target_nV is None:
            return value, None
        c_nK = torch.zeros_like(outputs[0]) if c_nK is None else c_nK
        grads = c_nK, lse_n, entropy_n, normalizer_n2, outputs[2]
        return value, self.logprobs_gradient(rows, x_nV, target_nV, ids_nK, *grads)

    def policy(
        self, rows: slice, x_nV: Tensor, target_nV: Tensor | None, batch: PolicyBatch, settings: PolicyLossConfig
    ) -> tuple[Tensor, Tensor | None]:
        batch = batch.rows(rows)
        slots = (batch.old_logprobs_NS, batch.advantages_NS)
        vectors = (batch.token_weights_N, batch.candidate_weights_N, batch.ref_logprobs_N)
        inf = float("inf")
        metrics_nM = policy_rows(
            x_nV,
            target_nV,
            batch.ids_NS,
            *(None if value is None else value.to(torch.float32) for value in (*slots, *vectors)),
            alpha=settings.alpha,
            clip=Clip(settings.clip_low, settings.clip_high, settings.dual_clip or inf),
            candidate_clip=Clip(
                settings.candidate_clip_low, settings.candidate_clip_high, settings.candidate_dual_clip or inf
            ),
            kl_coef=settings.kl_coef,
            kl_ratio=bool(settings.kl_ratio),
            entropy_coef=settings.entropy_coef,
            **self._options(rows),
        )
        return metrics_nM, target_nV

    def candidates(
        self, rows: slice, x_nV: Tensor, sampled_n: Tensor, k: int, threshold: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ids_nk, logp_nk, _, sampled_n, entropy_n = candidate_rows(
            x_nV, sampled_n, k, threshold=threshold, **self._options(rows)
        )
        return ids_nk, logp_nk, sampled_n, entropy_n
