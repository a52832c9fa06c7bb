"""The work on the rows of a chunk in Triton kernels, and no private buffer where the logits are given.

Shape letters: n rows of a chunk, V vocabulary, K ids a row, k candidate slots of the search.
"""

from collections.abc import Iterator
from dataclasses import fields

import torch
from torch import Tensor

from ipvrm_core.fused.head import Head, RowGradient
from ipvrm_core.fused.rows import CandidateTerms, Found, ValueAndGradient
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
    """See TorchRows: the same interface. x stays as it is; its gradient has memory of its own."""

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
        bfloat16_logits: bool = False,
    ) -> None:
        if transform.temperatures_N is not None:
            transform = transform._replace(temperatures_N=transform.temperatures_N.to(torch.float32))
        self.transform, self.near_N = transform, near_N
        kind = GivenLogits if weight is None else Head
        self.head = kind(
            hidden,
            weight,
            bias,
            max_buffer_bytes,
            apart=True,
            with_gradient=with_gradient,
            masked_N=masked_N,
            widest=widest,
            bfloat16_logits=bfloat16_logits,
        )

    def _options(self, rows: slice) -> dict:
        return self.transform.rows(rows)._asdict()

    def _statistics(self, rows: slice, x_nV: Tensor, ids_nK: Tensor, target_nV: Tensor | None = None, **td) -> tuple:
        near_n = None if self.near_N is None else self.near_N[rows]
        return row_logprobs(x_nV, ids_nK, near_N=near_n, out_NV=target_nV, **td, **self._options(rows))

    def logprobs(self, rows: slice, x_nV: Tensor, ids_nK: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._statistics(rows, x_nV, ids_nK)[:4]

    def td_errors(self, rows: slice, x_nV: Tensor, ids_nK: Tensor, old_nK: Tensor, beta: float) -> Tensor:
        return self._statistics(rows, x_nV, ids_nK, old_logprobs_NK=old_nK, beta=beta)[0]

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
        total_n: Tensor | None = None,
    ) -> RowGradient:
        options = {"grad_lse_N": grad_lse_n, "grad_entropy_N": grad_entropy_n} | self._options(rows)
        scale_n = logit_gradient(x_nV, target_nV, ids_nK, c_nK, normalizer_n2, entropy_n, total_N=total_n, **options)
        return RowGradient(target_nV, None if scale_n is None else scale_n[:, None])

    def loss(
        self, rows: slice, x_nV: Tensor, target_nV: Tensor | None, ids_nK: Tensor, fn: ValueAndGradient
    ) -> tuple[Tensor, RowGradient | None]:
        apart_nV = target_nV if self.head.apart else None  # given logits get their gradient itself
        *outputs, normalizer_n2, total_n = self._statistics(rows, x_nV, ids_nK, apart_nV)
        value, (c_nK, lse_n, entropy_n) = fn(LogProbs(*outputs))
        if target_nV is None:
            return value, None
        c_nK = torch.zeros_like(outputs[0]) if c_nK is None else c_nK
        total_n = total_n if entropy_n is None else None
        grads = c_nK, lse_n, entropy_n, normalizer_n2, outputs[2], total_n
        return value, self.logprobs_gradient(rows, x_nV, target_nV, ids_nK, *grads)

    def prepared(self, batch: PolicyBatch) -> PolicyBatch:
        values = {field.name: getattr(batch, field.name) for field in fields(batch)}
        floats = {name: x.to(torch.float32) for name, x in values.items() if x is not None and name != "ids_NS"}
        return PolicyBatch(**{name: x if x is None else floats.get(name, x).contiguous() for name, x in values.items()})

    def policy(
        self,
        rows: slice,
        x_nV: Tensor,
        target_nV: Tensor | None,
        batch: PolicyBatch,
        settings: PolicyLossConfig,
        metrics_nM: Tensor,
    ) -> RowGradient | None:
        per_row = (
            batch.ids_NS,
            batch.old_logprobs_NS,
            batch.advantages_NS,
            batch.token_weights_N,
            batch.candidate_weights_N,
            batch.ref_logprobs_N,
        )
        inf, known = float("inf"), batch.old_logprobs_NS is not None and not settings.entropy_coef
        scale_n = metrics_nM.new_empty(len(x_nV)) if self.head.apart and target_nV is not None and known else None
        policy_rows(
            x_nV,
            target_nV,
            *(None if value is None else value[rows] for value in per_row),
            alpha=settings.alpha,
            clip=Clip(settings.clip_low, settings.clip_high, settings.dual_clip or inf),
            candidate_clip=Clip(
                settings.candidate_clip_low, settings.candidate_clip_high, settings.candidate_dual_clip or inf
            ),
            kl_coef=settings.kl_coef,
            kl_ratio=bool(settings.kl_ratio),
            entropy_coef=settings.entropy_coef,
            metrics_NM=metrics_nM,
            scale_N=scale_n,
            **self._options(rows),
        )
        if target_nV is None:
            return None
        return RowGradient(target_nV, None if scale_n is None else scale_n[:, None])

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
        """The sampled log-prob that the search found is the known shift of the visit that stores the exponentials."""
        found = self.candidates(rows, x_nV, sampled_n, k, threshold)
        ids_nS, c_nS, grad_entropy_n = terms(*found)
        if target_nV is None:
            return None
        self.near_N = found[2].new_empty(self.head.N) if self.near_N is None else self.near_N
        self.near_N[rows] = found[2]
        apart_nV = target_nV if grad_entropy_n is None else None
        _, _, entropy_n, normalizer_n2, total_n = self._statistics(rows, x_nV, ids_nS, apart_nV)
        grads = c_nS, None, grad_entropy_n, normalizer_n2, entropy_n, total_n
        return self.logprobs_gradient(rows, x_nV, target_nV, ids_nS, *grads)

    def candidates(self, rows: slice, x_nV: Tensor, sampled_n: Tensor, k: int, threshold: float) -> Found:
        ids_nk, logp_nk, _, sampled_n, entropy_n = candidate_rows(
            x_nV, sampled_n, k, threshold=threshold, **self._options(rows)
        )
        return ids_nk, logp_nk, sampled_n, entropy_n
