"""The reward model beside the policy: its TD errors, what it learns from a batch, and what a checkpoint keeps of it.

Shape letters: B answers of this process, A of all processes, N tokens, n of a micro-batch, S = 1 + K slots.
"""

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ipvrm_core.heads import Head, head_of
from ipvrm_core.integrations.advantages import at_answers
from ipvrm_core.integrations.trl.passes import Asked, Batch, place, scored, slot_logprobs
from ipvrm_core.objectives import RewardBatch
from ipvrm_core.ops.linear_logprobs import linear_logprobs
from ipvrm_core.ops.td_errors import linear_td_errors
from ipvrm_core.packing import cu_seqlens_from_lengths, lengths_of
from ipvrm_core.sequences.groups import gather
from ipvrm_core.sequences.reward_losses import difficulty_boundary, dynamic_loss_weights
from ipvrm_core.types import Candidates


class Judged(NamedTuple):
    """The answers of all processes: their reward, NaN where there is none, their prompt, and which are this one's."""

    rewards_A: Tensor
    groups_A: Tensor
    own: slice


class RewardModel:
    """A model of its own, or an adapter on the policy's base; with an optimizer where it learns."""

    def __init__(self, trainer, given: str | nn.Module):
        self.trainer, self.learns = trainer, trainer.distrl.online != "none"
        if isinstance(given, str) and given in getattr(trainer.model, "peft_config", {}):
            self.asked = Asked(trainer.model, given)
            self._adapter_rests()
        else:
            self.asked = Asked(place(trainer, self._checked(given), self.learns))
        if self.learns and not self._learning():
            raise ValueError(f"online={trainer.distrl.online!r}: no parameter of reward_model requires a gradient")

    def _learning(self) -> list[nn.Parameter]:
        with self.asked.ready() as model:
            return [parameter for parameter in model.parameters() if parameter.requires_grad]

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """Made at the first step: before that FSDP2 puts other parameters in the place of an adapter's."""
        return torch.optim.AdamW(self._learning(), self.trainer.distrl.learning_rate, weight_decay=0.0)

    def _adapter_rests(self) -> None:
        """TRL's optimizer leaves it alone."""
        model, name = self.asked
        if name == model.active_adapter:
            raise ValueError(f"reward_model={name!r} is the adapter that the policy trains; make another one active")
        for path, parameter in model.named_parameters():
            if f".{name}." in path:
                parameter.requires_grad_(False)

    def _checked(self, given: str | nn.Module) -> nn.Module:
        if isinstance(given, str):
            from transformers import AutoModelForCausalLM

            given = AutoModelForCausalLM.from_pretrained(given, dtype=self.trainer.model.dtype)
        theirs, ours = (len(head_of(model).weight) for model in (given, self.trainer.model))
        if theirs != ours:
            raise ValueError(f"reward_model must have the policy's vocabulary, {ours} tokens; got {theirs}")
        if self.learns and any(p.requires_grad and p.dtype != torch.float32 for p in given.parameters()):
            raise ValueError("a reward model that learns must be float32; GRPOConfig(bf16=True) runs it in bfloat16")
        return given

    # ---- scores

    def td_errors(self, batch: Batch, old: Candidates, start_NS: Tensor | None) -> Tensor:
        """delta of the slots, against the old policy or the start: [N, S]."""
        trainer, objective = self.trainer, self.trainer.objective
        against_NS = old.logprobs_NS
        if start_NS is not None and trainer.distrl.td_reference == "sft":
            against_NS = start_NS
        if not objective.reference:
            against_NS = torch.zeros_like(old.logprobs_NS)

        def errors(hidden_nD: Tensor, head: Head, rows: slice) -> tuple[Tensor]:
            given = old.ids_NS[rows], against_NS[rows], objective.beta
            return (linear_td_errors(hidden_nD, head.weight, *given, **head.options(trainer.temperature)),)

        return scored(trainer, self.asked, batch, errors)[0]

    # ---- learning

    @torch.enable_grad()
    def learn(self, batch: Batch, old: Candidates, start_NS: Tensor | None, judged: Judged) -> Tensor:
        """One step of the objective on the batch of all processes; returns this process's share of the loss."""
        trainer, objective = self.trainer, self.trainer.objective
        against_N = old.sampled_logprobs_N
        if start_NS is not None and trainer.distrl.online_reference == "sft":
            against_N = start_NS[:, 0]
        if not objective.reference:
            against_N = torch.zeros_like(against_N)
        labels_B, weights_B, boundary_B = self._labels(judged)
        if objective.reweighs:
            weights_B = self._reweighed(batch, old, against_N, labels_B, weights_B)
        weights_B = weights_B * trainer.accelerator.num_processes  # gradients are averaged over processes
        bounds, total = batch.cu_seqlens.tolist(), weights_B.new_zeros(())
        with self.asked.ready() as model:
            model.train()
            for first in range(0, len(labels_B), trainer.args.per_device_train_batch_size):
                own = slice(first, first + trainer.args.per_device_train_batch_size)
                rows = slice(bounds[own.start], bounds[min(own.stop, len(labels_B))])
                score_n = self._logprobs(model, batch, own, rows) - against_N[rows]
                boundary = None if boundary_B is None else boundary_B[own]
                cu_seqlens = cu_seqlens_from_lengths(batch.mask_BT[own].sum(1))
                loss = objective.loss(score_n, RewardBatch(cu_seqlens, labels_B[own], weights_B[own], boundary))
                loss.backward()
                total += loss.detach()
            self._step()
        return total

    def _labels(self, judged: Judged) -> tuple[Tensor, Tensor, Tensor | None]:
        """(right or wrong, weight, boundary) of this process's answers; those without a reward weigh nothing."""
        rewards_A, groups_A, own = judged
        known_A = ~rewards_A.isnan()
        labels_A = (rewards_A > self.trainer.distrl.right_above).float()
        sums_2G = labels_A.new_zeros(2, int(groups_A[-1]) + 1)
        sums_2G.index_add_(1, groups_A, torch.stack([labels_A * known_A, known_A.float()]))
        mean_B = (sums_2G[0] / sums_2G[1].clamp(min=1))[groups_A][own]
        labels_B, weights_B = labels_A[own], known_A[own] / known_A.sum().clamp(min=1)
        objective, method = self.trainer.objective, self.trainer.distrl
        if objective.dynamic_weights and method.dlw_scale != "none":
            weights_B = weights_B * dynamic_loss_weights(labels_B, mean_B, method.dlw_scale)
        bounded = objective.boundary and method.online_boundary
        return labels_B, weights_B, difficulty_boundary(mean_B) if bounded else None

    def _logprobs(self, model: nn.Module, batch: Batch, own: slice, rows: slice) -> Tensor:
        """log pi_phi of the tokens of some answers, with a gradient: [n]."""
        ids_n1 = batch.tokens_N[rows][:, None]

        def logprobs(hidden_nD: Tensor, head: Head) -> Tensor:
            return linear_logprobs(hidden_nD, head.weight, ids_n1, **head.options(self.trainer.temperature))[0][:, 0]

        at_head = at_answers(batch.mask_BT[own], logprobs)
        with self.trainer.accelerator.autocast():
            return model(input_ids=batch.ids_BL[own], attention_mask=batch.attention_BL[own], at_head=at_head)

    def _reweighed(
        self, batch: Batch, old: Candidates, against_N: Tensor, labels_B: Tensor, weights_B: Tensor
    ) -> Tensor:
        """`Objective.reweigh`, which looks at the answers of all processes."""
        score_N = slot_logprobs(self.trainer, self.asked, batch, batch.tokens_N[:, None])[:, 0] - against_N
        rows_N2 = torch.stack([score_N, old.sampled_logprobs_N], dim=1)
        answers_B3 = torch.stack([lengths_of(batch.cu_seqlens), labels_B, weights_B], dim=1)
        zeros, world = batch.cu_seqlens.new_zeros, self.trainer.distrl_world
        rows_A2 = gather(rows_N2, zeros(len(rows_N2)), world).values
        answers, _, own = gather(answers_B3, zeros(len(answers_B3)), world)
        lengths_A, labels_A, weights_A = answers.unbind(1)
        given = rows_A2[:, 0], rows_A2[:, 1], cu_seqlens_from_lengths(lengths_A.long())
        return self.trainer.objective.reweigh(*given, labels_A, weights_A)[own]

    def _step(self) -> None:
        """An adapter is outside of what DDP averages, so that is done here."""
        learning, trainer = self.optimizer.param_groups[0]["params"], self.trainer
        if self.asked.adapter and trainer.distrl_world is not None and not trainer.is_fsdp_enabled:
            for parameter in learning:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= trainer.accelerator.num_processes
        if trainer.args.max_grad_norm:
            nn.utils.clip_grad_norm_(learning, trainer.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    # ---- checkpoints

    def state(self) -> dict:
        """Weights and optimizer, whole on every process."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        how = {"full_state_dict": True, "cpu_offload": True, "ignore_frozen_params": bool(self.asked.adapter)}
        with self.asked.ready() as model:
            weights, optimizer = get_state_dict(model, self.optimizer, options=StateDictOptions(**how))
        return {"model": weights, "optimizer": optimizer}

    def load_state(self, state: dict) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        states = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        options = StateDictOptions(full_state_dict=True, strict=not self.asked.adapter)
        with self.asked.ready() as model:
            set_state_dict(model, self.optimizer, **states, options=options)
