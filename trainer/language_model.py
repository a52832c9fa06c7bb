"""A causal language model that ends in a fused function: its logits [tokens, vocabulary] are never made.

Shape letters: n tokens of a micro-batch, N packed response tokens, B answers, S slots, K candidates, D hidden size.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ipvrm_core import (
    Candidates,
    Head,
    PolicyBatch,
    PolicyLossConfig,
    PolicyLossOutput,
    attach,
    distrl_loss,
    linear_logprobs,
    linear_td_errors,
    select_candidates,
)
from ipvrm_core.heads import causal_lm
from ipvrm_core.trainer.batching import Answer, TokenBatch, micro_batches
from ipvrm_core.trainer.models.head import value_head_of
from ipvrm_core.trainer.models.packing import attention_arguments
from ipvrm_core.trainer.progress import Progress

AtHead = Callable[[Tensor, Head], Any]  # (hidden states of the response rows [n, D], head) -> anything


class LanguageModel(nn.Module):
    """model + temperature + token budget. DDP and FSDP2 can wrap it: all it computes, its forward computes.

    temperature: of every log-prob. max_tokens: of a micro-batch, padding included. packed: micro-batches are one row
    without padding, for which the model must have been made ready (`can_pack`). autocast: a context for the layers;
    the head is always outside of it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        temperature: float = 1.0,
        max_tokens: int = 16384,
        packed: bool = False,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        super().__init__()
        self.model = attach(model)
        self.temperature, self.max_tokens, self.packed, self.autocast = temperature, max_tokens, packed, autocast

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def positions(self) -> int | None:
        """Tokens that the model has positions for; None where it does not say."""
        return getattr(causal_lm(self.model).config.get_text_config(), "max_position_embeddings", None)

    @property
    def value_head(self) -> nn.Linear | None:
        return value_head_of(self.model)

    def forward(self, batch: TokenBatch, at_head: AtHead) -> Any:
        """at_head(hidden states of the batch's rows, head), computed inside the model's own forward."""

        def at_rows(hidden_BLD: Tensor, head: Head) -> Any:
            with torch.autocast(hidden_BLD.device.type, enabled=False):
                return at_head(hidden_BLD.flatten(0, 1)[batch.rows_N], head)

        how = {"attention_mask": batch.mask_BL}
        if batch.bounds is not None:
            how = attention_arguments(self.model, batch.bounds, batch.positions_1L)
        with self.autocast():
            return self.model(input_ids=batch.ids_BL, at_head=at_rows, **how)

    # ---- one micro-batch, with a gradient

    def parts(self, answers: Sequence[Answer], max_tokens: int | None = None, unit: int = 1) -> Iterator[slice]:
        """The micro-batches of these answers. max_tokens: another budget. unit: so many answers stay together."""
        return micro_batches(answers, max_tokens or self.max_tokens, unit=unit, packed=self.packed)

    def batch(self, answers: Sequence[Answer], **how) -> TokenBatch:
        return TokenBatch.make(answers, self.device, packed=self.packed, **how)

    def batch_logprobs(self, batch: TokenBatch) -> Tensor:
        """log pi(y_t | s_t) of the response tokens: [n]."""
        return self.batch_slot_logprobs(batch, batch.targets_N[:, None])[:, 0]

    def batch_slot_logprobs(self, batch: TokenBatch, ids_nS: Tensor) -> Tensor:
        """log pi(id | s_t) at any ids, 0 at padding: [n, S]."""

        def at_head(hidden_nD: Tensor, head: Head) -> Tensor:
            return linear_logprobs(hidden_nD, head.weight, ids_nS, **head.options(self.temperature)).logprobs_NK

        return self(batch, at_head)

    def batch_values(self, batch: TokenBatch) -> Tensor:
        """The value head's scores of the response tokens, of a batch made with after=True: [n]."""

        def at_head(hidden_nD: Tensor, head: Head) -> Tensor:
            own = self.value_head
            return (hidden_nD.to(own.weight.dtype) @ own.weight.T + own.bias)[:, 0]

        return self(batch, at_head)

    def policy_loss(self, batch: TokenBatch, rows: PolicyBatch, config: PolicyLossConfig) -> PolicyLossOutput:
        """`distrl_loss` of the batch's rows; temperature, soft cap and logit scale are the model's own."""

        def at_head(hidden_nD: Tensor, head: Head) -> PolicyLossOutput:
            return distrl_loss(hidden_nD, head.weight, rows, head.settle(config, self.temperature), bias=head.bias)

        return self(batch, at_head)

    # ---- any number of answers, without a gradient

    def logprobs(self, answers: Sequence[Answer], **how) -> Tensor:
        """log pi(y_t | s_t), packed [N]. how: see `_map`."""
        return self._map(answers, lambda batch, rows: (self.batch_logprobs(batch),), **how)[0]

    def slot_logprobs(self, answers: Sequence[Answer], ids_NS: Tensor) -> Tensor:
        """log pi(id | s_t) at any ids [N, S], 0 at padding."""
        return self._map(answers, lambda batch, rows: (self.batch_slot_logprobs(batch, ids_NS[rows]),))[0]

    def values(self, answers: Sequence[Answer], **how) -> Tensor:
        """The value head's scores, packed [N]."""
        return self._map(answers, lambda batch, rows: (self.batch_values(batch),), after=True, **how)[0]

    def candidates(
        self,
        answers: Sequence[Answer],
        p_min: float = 0.1,
        exclude_N: Tensor | None = None,
        label: str | None = None,
        **rule,
    ) -> Candidates:
        """`select_candidates` at every response token, of [N, S]. rule: strict, top_k, keep_sampled."""

        def select(batch: TokenBatch, rows: slice) -> Candidates:
            def at_head(hidden_nD: Tensor, head: Head) -> Candidates:
                options = {**rule, **head.options(self.temperature)}
                exclude = None if exclude_N is None else exclude_N[rows]
                return select_candidates(hidden_nD, head.weight, batch.targets_N, p_min, exclude=exclude, **options)

            return self(batch, at_head)

        return Candidates(*self._map(answers, select, label=label))

    def td_errors(self, answers: Sequence[Answer], ids_NS: Tensor, old_logprobs_NS: Tensor, beta: float) -> Tensor:
        """beta (log pi - log pi_old) at the slots: [N, S]."""

        def errors(batch: TokenBatch, rows: slice) -> tuple[Tensor]:
            def at_head(hidden_nD: Tensor, head: Head) -> Tensor:
                given = ids_NS[rows], old_logprobs_NS[rows], beta
                return linear_td_errors(hidden_nD, head.weight, *given, **head.options(self.temperature))

            return (self(batch, at_head),)

        return self._map(answers, errors)[0]

    @torch.no_grad()
    def _map(
        self,
        answers: Sequence[Answer],
        function: Callable[[TokenBatch, slice], Iterable[Tensor]],
        *,
        label: str | None = None,
        max_tokens: int | None = None,
        **how,
    ) -> list[Tensor]:
        """function(micro-batch, its slice of the packed rows) -> tensors [n, ...]; concatenated.

        label: of long work, which then says how far it has come. max_tokens: another budget. how: see TokenBatch.make.
        """
        pieces, row = [], 0
        with Progress(label, len(answers), unit="answer") if label else nullcontext() as shown:
            for part in self.parts(answers, max_tokens):
                batch = self.batch(answers[part], **how)
                rows = slice(row, row + len(batch.targets_N))
                row = rows.stop
                pieces.append(function(batch, rows))
                if shown:
                    shown.update(part.stop - part.start)
        return [torch.cat(column) for column in zip(*pieces, strict=True)]
