"""The on-policy DistRL step in one pass over both heads."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ipvrm_core.dispatch import resolve
from ipvrm_core.fused.on_policy import OnPolicyLoss, RewardHead
from ipvrm_core.fused.shard import VocabularyShard
from ipvrm_core.ops import checks
from ipvrm_core.ops.distrl_loss import distrl_loss
from ipvrm_core.ops.select_candidates import select_candidates
from ipvrm_core.ops.td_errors import linear_td_errors
from ipvrm_core.types import METRICS, Candidates, PolicyBatch, PolicyLossConfig


class OnPolicyOutput(NamedTuple):
    """`loss` carries the gradient; `metrics` as in PolicyLossOutput; candidates and td_errors [N, S] are constants.

    td_errors are beta (log pi_phi - log pi), not divided by sigma_V: slot 0 gives the values of the sampled path, of
    which the next step's sigma_V can be made.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    candidates: Candidates
    td_errors_NS: Tensor


def on_policy_distrl_loss(
    hidden: Tensor,
    weight: Tensor,
    batch: PolicyBatch,
    reward_hidden: Tensor,
    reward_weight: Tensor,
    beta: float,
    sigma: float | Tensor,
    config: PolicyLossConfig | None = None,
    *,
    p_min: float = 0.1,
    strict: bool = False,
    top_k: int | None = None,
    keep_sampled: bool = False,
    exclude: Tensor | None = None,
    bias: Tensor | None = None,
    reward_bias: Tensor | None = None,
    backend: str = "auto",
    shard: VocabularyShard | None = None,
    max_buffer_bytes: int | None = None,
) -> OnPolicyOutput:
    """`distrl_loss` at pi_old = pi, with the candidates and A_TD(v) = delta(v) / sigma_V found on the way.

    The same as select_candidates(hidden), linear_td_errors(reward_hidden) and distrl_loss of both without old
    log-probs, to rounding, at 3 products for a frozen weight instead of 4 (4 instead of 5 with its gradient), and
    without the forward pass of an old policy: for one update a batch.

    batch: sampled tokens alone, ids and advantages A_t [N, 1], no old log-probs; its candidate_weights may be those of
    any aggregation but token_mean, which needs the candidates beforehand. reward_hidden [N, D'], reward_weight [V, D'],
    reward_bias [V] of the reward model, under the same temperature and soft cap. sigma: sigma_V > 0 of this batch, if
    it is known, or of the step before. The rule of the candidates is that of `select_candidates`. shard: of both heads;
    max_buffer_bytes: for both together, None for the default of each; see `distrl_loss`.

    Raises ValueError as those functions do, for a batch with candidates or old log-probs, and for sigma <= 0.
    Source: the paper, sections 3 and 4.
    """
    config = config or PolicyLossConfig()
    hidden, weight, bias = checks.local_parts(hidden, weight, bias, shard)
    N, V = checks.check_head(hidden, weight, bias)
    V = checks.checked_shard(shard, backend, V)[0]
    reward_hidden, reward_weight, reward_bias = checks.local_parts(reward_hidden, reward_weight, reward_bias, shard)
    M, W = checks.check_head(reward_hidden, reward_weight, reward_bias)
    if M != N or len(weight) != W:
        raise ValueError(f"the reward model must have the rows and vocabulary {(N, len(weight))}; got {(M, W)}")
    checks.check_ids("ids_NS", batch.ids_NS, (N, 1), V, hidden)
    if batch.old_logprobs_NS is not None:
        raise ValueError("batch must have no old log-probs: the policy is the old one; got old_logprobs_NS")
    if config.kl_coef and batch.ref_logprobs_N is None:
        raise ValueError("kl_coef > 0 needs batch.ref_logprobs_N; got None")
    if not isinstance(sigma, Tensor) and not sigma > 0:
        raise ValueError(f"sigma must be > 0; got {sigma}")
    rule = {"p_min": p_min, "strict": strict, "top_k": top_k, "keep_sampled": keep_sampled, "exclude": exclude}
    checks.check_rule(rule, N, hidden)
    budget = checks.checked_budget(max_buffer_bytes, hidden, weight) * (2 if max_buffer_bytes is None else 1)
    backend = resolve(backend, hidden, weight, bias)
    reward = RewardHead(reward_hidden.detach(), reward_weight.detach(), reward_bias, float(beta), sigma)
    if backend == "reference":
        return _reference(hidden, weight, bias, batch, reward, rule, config)
    need = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    settings = (rule, config, shard, budget, backend == "triton", need)
    loss, metrics_M, *candidates, delta_NS = OnPolicyLoss.apply(hidden, weight, bias, batch, reward, *settings)
    ids_NS, old_NS, counts_N, entropy_N = candidates
    metrics = dict(zip(METRICS, metrics_M.unbind(), strict=True))
    return OnPolicyOutput(loss, metrics, Candidates(ids_NS, old_NS, counts_N, entropy_N), delta_NS)


def _reference(hidden, weight, bias, batch, reward, rule, config) -> OnPolicyOutput:
    """The three calls."""
    T = config.temperature if batch.temperatures_N is None else batch.temperatures_N
    options = {"temperature": T, "softcap": config.softcap, "backend": "reference"}
    found = select_candidates(hidden, weight, batch.ids_NS[:, 0], **rule, bias=bias, **options)
    head = reward.hidden_ND, reward.weight_VD
    delta_NS = linear_td_errors(*head, found.ids_NS, found.logprobs_NS, reward.beta, bias=reward.bias_V, **options)
    advantages_NS = torch.cat([batch.advantages_NS.to(delta_NS.dtype), delta_NS[:, 1:] / reward.sigma], dim=1)
    batch = replace(batch, ids_NS=found.ids_NS, advantages_NS=advantages_NS)
    return OnPolicyOutput(*distrl_loss(hidden, weight, batch, config, bias=bias, backend="reference"), found, delta_NS)
