"""Models and TRL's padded batches: how a model is placed, and passes without a gradient over all answers of a batch.

Shape letters: B answers, L and T padded lengths, N tokens of the mask, n of a micro-batch, S = 1 + K slots.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ipvrm_core.heads import Head, attach
from ipvrm_core.integrations.advantages import map_answers
from ipvrm_core.ops.linear_logprobs import linear_logprobs
from ipvrm_core.ops.select_candidates import select_candidates
from ipvrm_core.packing import cu_seqlens_from_lengths, lengths_of
from ipvrm_core.types import Candidates


class Asked(NamedTuple):
    """A model, or an adapter of one. adapter None: as it is; "": without its adapters."""

    model: nn.Module
    adapter: str | None = None

    @contextmanager
    def ready(self) -> Iterator[nn.Module]:
        """In eval mode with this adapter alone; afterwards mode, adapters and trainable parameters are as they were."""
        model, training = self.model, self.model.training
        trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        before = None if self.adapter is None else model.active_adapter
        model.eval()
        try:
            if self.adapter:
                model.set_adapter(self.adapter)
            if self.adapter == "":
                with model.disable_adapter():
                    yield model
            else:
                yield model
        finally:
            if self.adapter:
                model.set_adapter(before)
            for parameter, was in trainable:
                parameter.requires_grad_(was)
            model.train(training)


def place(trainer, model: nn.Module, learns: bool) -> nn.Module:
    """On its device, sharded as TRL shards a reference model."""
    attach(model)
    if not learns:
        model.requires_grad_(False)
    if trainer.is_fsdp_enabled:
        from trl.models import prepare_fsdp

        return prepare_fsdp(model, trainer.accelerator)
    if trainer.is_deepspeed_enabled and not learns:
        from trl.models import prepare_deepspeed

        return prepare_deepspeed(model, trainer.accelerator)
    return trainer.accelerator.prepare_model(model, evaluation_mode=not learns)


def reference(trainer, given: nn.Module | None) -> Asked | None:
    """The start of the policy: the given model, TRL's own reference model, or the policy without its adapters."""
    if given is not None:
        return Asked(place(trainer, given, learns=False))
    theirs = getattr(trainer, "ref_model", None)
    if theirs is not None:
        return Asked(attach(theirs))
    adapters = getattr(trainer.model, "peft_config", {})
    if adapters:
        return Asked(trainer.model, "ref" if "ref" in adapters else "")  # TRL's copy of an adapter that it goes on from
    return None


class Batch(NamedTuple):
    """TRL's inputs as the passes take them."""

    ids_BL: Tensor
    attention_BL: Tensor
    mask_BT: Tensor  # tokens that the policy wrote
    tokens_N: Tensor
    cu_seqlens: Tensor

    @classmethod
    def of(cls, inputs) -> "Batch":
        mask = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        return cls(
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            mask,
            inputs["completion_ids"][mask],
            cu_seqlens_from_lengths(mask.sum(1)),
        )


def scored(trainer, asked: Asked, batch: Batch, function: Callable) -> list[Tensor]:
    """`map_answers` in TRL's micro-batches."""
    a = trainer.args
    size = a.per_device_train_batch_size if trainer.model.training else a.per_device_eval_batch_size
    with asked.ready() as model:
        given = model, batch.ids_BL, batch.attention_BL, batch.mask_BT, function
        return map_answers(*given, batch=size, autocast=trainer.accelerator.autocast)


def old_policy(trainer, batch: Batch) -> Candidates:
    """The candidates of every token under the policy that sampled it; the sampled tokens alone with alpha = 0."""
    last_N = torch.zeros_like(batch.tokens_N, dtype=torch.bool)
    last_N[batch.cu_seqlens[1:][lengths_of(batch.cu_seqlens) > 0] - 1] = trainer.distrl.skip_last_token
    rule = trainer.distrl.candidate_rule()

    def select(hidden_nD: Tensor, head: Head, rows: slice) -> Candidates:
        how = {**rule, "exclude": last_N[rows], **head.options(trainer.temperature)}
        return select_candidates(hidden_nD, head.weight, batch.tokens_N[rows], **how)

    found = Candidates(*scored(trainer, Asked(trainer.model), batch, select))
    S = 1 + int(found.counts_N.max()) if trainer.distrl.alpha and len(batch.tokens_N) else 1
    return found._replace(ids_NS=found.ids_NS[:, :S], logprobs_NS=found.logprobs_NS[:, :S])


def slot_logprobs(trainer, asked: Asked, batch: Batch, ids_NS: Tensor) -> Tensor:
    """log pi(id | s_t) at the slots, 0 at padding: [N, S]."""

    def logprobs(hidden_nD: Tensor, head: Head, rows: slice) -> tuple[Tensor]:
        return (linear_logprobs(hidden_nD, head.weight, ids_NS[rows], **head.options(trainer.temperature))[0],)

    return scored(trainer, asked, batch, logprobs)[0]
