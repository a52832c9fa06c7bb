"""The FSDP engine: verl's own forward, and at its hidden states what a batch asks for under the key "distrl".

    {"task": "candidates", p_min, ...}   infer: distrl_ids, distrl_old [B, r, S] beside log_probs
    {"task": "td_errors", beta, reference}        infer, of the reward model: distrl_delta [B, r, S]
    {"task": "loss", alpha, ...}         train: alpha times the candidates' loss is added to any policy loss

Remove-padding, fused kernels and every loss_mode stay as they are. Shape letters: B answers, N tokens, S slots.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ipvrm_core.heads import Head, at_forward, attach
from ipvrm_core.integrations.verl.rows import Rows
from ipvrm_core.ops.distrl_loss import distrl_loss
from ipvrm_core.ops.select_candidates import select_candidates
from ipvrm_core.ops.td_errors import linear_td_errors
from ipvrm_core.types import PolicyBatch, PolicyLossConfig

if TYPE_CHECKING:
    Base = Any  # verl's FSDPEngineWithLMHead
else:
    Base = object


class DistRLEngineMixin(Base):
    """Over an engine of verl with a language-model head."""

    def _build_module(self):
        if getattr(self, "use_ulysses_sp", False):
            raise ValueError("DistRL needs whole sequences on a process; got ulysses_sequence_parallel_size > 1")
        return attach(super()._build_module())

    def forward_step(self, micro_batch, loss_function, forward_only):
        from verl.utils import tensordict_utils as tu
        from verl.utils.device import get_device_id

        asked = tu.get_non_tensor_data(micro_batch, "distrl", None)
        if not asked:
            return super().forward_step(micro_batch, loss_function, forward_only)
        micro_batch = micro_batch.to(get_device_id())
        rows = Rows.of(micro_batch["input_ids"], micro_batch["response_mask"])
        asked = dict(asked)
        task, temperature = asked.pop("task"), _temperature(micro_batch["temperature"])
        if task == "loss" and not forward_only:
            return self._with_candidates(micro_batch, loss_function, rows, asked, temperature)

        def at_rows(hidden_BLD: Tensor, head: Head):
            with torch.autocast(hidden_BLD.device.type, enabled=False):
                how = head.options(temperature)
                if task == "candidates":
                    found = select_candidates(rows.hidden(hidden_BLD), head.weight, rows.tokens_N, **asked, **how)
                    ids_NS, old_NS = found.ids_NS, found.logprobs_NS
                    return {"distrl_ids": rows.nested(ids_NS, -1), "distrl_old": rows.nested(old_NS)}
                ids_NS, old_NS = (rows.packed(micro_batch[name]) for name in ("distrl_ids", "distrl_old"))
                against_NS = old_NS if asked["reference"] else torch.zeros_like(old_NS)
                given = ids_NS, against_NS, asked["beta"]
                delta_NS = linear_td_errors(rows.hidden(hidden_BLD), head.weight, *given, **how)
                return {"distrl_delta": rows.nested(delta_NS)}

        with at_forward(self.module, at_rows) as found:
            loss, output = super().forward_step(micro_batch, loss_function, forward_only)
        if task in ("candidates", "td_errors"):
            output["model_output"].update(found[0])
        return loss, output

    def _with_candidates(self, micro_batch, loss_function, rows: Rows, asked: dict, temperature: float):
        from verl.utils.metric import AggregationType, Metric

        ids_NS, old_NS, adv_NS = (rows.packed(micro_batch[f"distrl_{name}"]) for name in ("ids", "old", "adv"))
        weights_N = row_weights(rows, asked.pop("loss_agg_mode"), asked.pop("loss_scale_factor", None), micro_batch)
        batch = PolicyBatch(ids_NS, old_NS, adv_NS, torch.zeros_like(weights_N), weights_N)
        config = PolicyLossConfig(**asked)

        def candidates(hidden_BLD: Tensor, head: Head):
            with torch.autocast(hidden_BLD.device.type, enabled=False):
                settled = head.settle(config, temperature)
                return distrl_loss(rows.hidden(hidden_BLD), head.weight, batch, settled, bias=head.bias)

        def both(model_output=None, data=None, dp_group=None, **kwargs):
            if model_output is None:  # the call of distillation with logits
                return loss_function(data=data, dp_group=dp_group, **kwargs)
            loss, metrics = loss_function(model_output=model_output, data=data, dp_group=dp_group)
            term, own = found[0]
            names = ("loss_candidates", "candidate_clip_fraction")
            summed = {f"distrl/{name}": Metric(value=own[name], aggregation=AggregationType.SUM) for name in names}
            return loss + term, {**metrics, **summed}

        with at_forward(self.module, candidates) as found:
            return super().forward_step(micro_batch, both, False)


def _temperature(given) -> float:
    """One for the batch; verl may hand it on as a tensor [B]."""
    if not isinstance(given, Tensor):
        return float(given)
    if given.numel() and (given != given.flatten()[0]).any():
        raise ValueError(f"DistRL needs one temperature a batch; got {given.unique().tolist()}")
    return float(given.flatten()[0])


def row_weights(rows: Rows, mode: str, scale: float | None, data) -> Tensor:
    """Weights [N] under which a sum over tokens is verl's `agg_loss`, dp_size included (FSDP averages gradients)."""
    dp_size, live_R = data["dp_size"], rows.mask_R.float()
    if mode == "token-mean":
        return (live_R / data["batch_num_tokens"] * dp_size)[rows.mask_R]
    if mode == "token-sum":
        return (live_R * dp_size)[rows.mask_R]
    lengths_B = rows.responses_B1.diff()
    if mode == "seq-mean-token-mean":
        live_R = live_R / (rows.cu_seqlens.diff().repeat_interleave(lengths_B) + 1e-8)
    elif mode == "seq-mean-token-sum-norm":
        live_R = live_R / (int(lengths_B.max()) if scale is None else scale)
    elif mode != "seq-mean-token-sum":
        raise ValueError(f"loss_agg_mode {mode!r} is not known to DistRL")
    return (live_R / data["global_batch_size"] * dp_size)[rows.mask_R]


def register_engine(device: str, vendor: str | None = None) -> None:
    """For fsdp and fsdp2 on this device; a vendor's engine goes before verl's own of the device."""
    from verl.workers.engine.base import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    engine = type("DistRLEngine", (DistRLEngineMixin, FSDPEngineWithLMHead), {"__module__": __name__})
    register = EngineRegistry.register("language_model", ["fsdp", "fsdp2"], device=device, vendor=vendor)
    register(engine)
