"""TD errors of the vocabulary at the ids that matter: the reward-model pass of an RL step."""

import torch
from torch import Tensor

from ipvrm_core.dispatch import resolve
from ipvrm_core.fused.shard import VocabularyShard
from ipvrm_core.fused.td_errors import linear_td_errors as fused
from ipvrm_core.ops import checks
from ipvrm_core.reference.logprobs import head_logits, logprobs_from_logits
from ipvrm_core.sequences.advantages import td_errors as reference


def linear_td_errors(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    old_logprobs: Tensor,
    beta: float,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
    shard: VocabularyShard | None = None,
    max_buffer_bytes: int | None = None,
) -> Tensor:
    """delta_t(v) = beta (log pi_phi(v | s_t) - log pi_old(v | s_t)) at ids, pi_phi = softmax((h W^T + b) / T).

    hidden [N, D] and weight [V, D] of the reward model; ids [N, S] int64 and old_logprobs [N, S] in the slots of
    `select_candidates` -> [N, S] in float32, or in float64 if an input of the head is; an id < 0 is padding: 0. Slot 0
    gives the TD error of the sampled path. No gradient: advantages are constants. The old log-probs must be of the same
    temperature. Raises ValueError as `linear_logprobs` does. Source: the paper, section 3 of its method.
    """
    return _run(hidden, weight, bias, ids, old_logprobs, beta, temperature, softcap, backend, max_buffer_bytes, shard)


def td_errors_from_logits(
    logits: Tensor,
    ids: Tensor,
    old_logprobs: Tensor,
    beta: float,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
    max_buffer_bytes: int | None = None,
) -> Tensor:
    """`linear_td_errors` of given logits [N, V], which stay as they are."""
    return _run(logits, None, None, ids, old_logprobs, beta, temperature, softcap, backend, max_buffer_bytes)


@torch.no_grad()
def _run(
    hidden, weight, bias, ids, old_logprobs, beta, temperature, softcap, backend, max_buffer_bytes, shard=None
) -> Tensor:
    hidden, weight, bias = checks.local_parts(hidden, weight, bias, shard)
    N, V = checks.check_head(hidden, weight, bias)
    V, packed = checks.checked_shard(shard, backend, V)
    checks.check_ids("ids", ids, (N, None), V, hidden)
    if old_logprobs.shape != ids.shape or not old_logprobs.is_floating_point():
        given = f"{old_logprobs.dtype}, shape {tuple(old_logprobs.shape)}"
        raise ValueError(f"old_logprobs must be floating point [N, S] = {tuple(ids.shape)}; got {given}")
    transform = checks.checked_transform(temperature, softcap, N, hidden)
    budget = checks.checked_budget(max_buffer_bytes, hidden)
    backend = resolve(backend, hidden, weight, bias)
    if backend != "reference":
        return fused(
            hidden, weight, bias, ids, old_logprobs, float(beta), *transform, packed, budget, backend == "triton"
        )
    logits = hidden if weight is None else head_logits(hidden, weight, bias)
    rows = logprobs_from_logits(logits, ids, temperature=temperature, softcap=softcap)
    return reference(rows.logprobs_NK, old_logprobs.to(logits.dtype), beta).masked_fill(ids < 0, 0.0)
