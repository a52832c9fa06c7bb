"""From outcomes and TD errors to the advantages of every slot: the credit that the policy loss takes.

Shape letters: N packed response tokens, B answers, S = 1 + K slots: the sampled token, then the candidates.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ipvrm_core import estimators
from ipvrm_core.estimators import TokenRewards
from ipvrm_core.method import METHODS, Method
from ipvrm_core.sequences.advantages import (
    answer_advantages,
    center_on_candidates,
    sigma_v,
    td_advantages,
    value_moments,
)
from ipvrm_core.sequences.groups import Groups, all_reduced
from ipvrm_core.sequences.segments import expand
from ipvrm_core.sequences.values import prefix_values


class Credit(NamedTuple):
    """credit_NS: A_t of the sampled token, then delta_t(v) of the candidates, which sigma_V has still to divide.

    values_N: V of the sampled path, None without token rewards. sigma_V is theirs, over a scope that the method names.
    """

    credit_NS: Tensor
    values_N: Tensor | None

    def advantages(self, sigma: Tensor) -> Tensor:
        """[N, S], what PolicyBatch takes."""
        return torch.cat([self.credit_NS[:, :1], td_advantages(self.credit_NS[:, 1:], sigma)], dim=1)

    def rows(self, index) -> "Credit":
        """The rows selected by a slice or an index tensor."""
        return Credit(self.credit_NS[index], None if self.values_N is None else self.values_N[index])


def assign_credit(
    delta_NS: Tensor | None,
    ids_NS: Tensor,
    old_logprobs_NS: Tensor,
    rewards_B: Tensor,
    cu_seqlens: Tensor,
    groups_B: Groups,
    method: Method,
    process_group=None,
    outcome_B: Tensor | None = None,
) -> Credit:
    """A_t by the method's outcome and estimator, TD errors by its rules for the last token and the baseline.

    delta_NS: TD errors of the slots, or [N, 1] where only sampled tokens have a reward; None: there are none.
    outcome_B: advantages of the answers that a framework has made itself; None: those of the method's outcome.
    """
    if outcome_B is None:
        outcome_B = answer_advantages(rewards_B, groups_B, method.outcome, process_group)
    if delta_NS is None:
        return Credit(expand(outcome_B, cu_seqlens, len(ids_NS))[:, None], None)
    if method.candidate_baseline == "mean" and delta_NS.shape[1] > 1:
        centred_NK = center_on_candidates(delta_NS[:, 1:], ids_NS[:, 1:], old_logprobs_NS[:, 1:])
        delta_NS = torch.cat([delta_NS[:, :1], centred_NK], dim=1)
    if method.skip_last_token:
        delta_NS = delta_NS.index_fill(0, cu_seqlens[1:] - 1, 0.0)
    values_N = prefix_values(delta_NS[:, 0], cu_seqlens, beta=1.0)  # beta is in delta already
    sigma = batch_sigma(values_N, method, process_group)
    tokens = TokenRewards(delta_NS[:, 0], outcome_B, rewards_B, cu_seqlens, groups_B, sigma, process_group)
    sampled_N = estimators.find(method.estimator)().advantages(tokens, method)
    return Credit(torch.cat([sampled_N[:, None], delta_NS[:, 1:]], dim=1), values_N)


def batch_sigma(values_N: Tensor, method: Method, process_group=None) -> Tensor:
    """sigma_V of these values, over all processes: 0-d."""
    return sigma_v(all_reduced(value_moments(values_N), process_group), method.sigma_form)


def distrl_advantages(
    delta_NS: Tensor,
    ids_NS: Tensor,
    old_logprobs_NS: Tensor,
    rewards_B: Tensor,
    cu_seqlens: Tensor,
    groups_B: Groups,
    method: Method | str = "paper",
    *,
    process_group=None,
) -> Tensor:
    """[N, S]: A_t = outcome + process_coef * process_t, then A_TD(v) = delta_t(v) / sigma_V; no gradient.

    delta_NS from `linear_td_errors` at the slots of `select_candidates`. rewards_B: 0/1 outcomes. groups_B: the prompt
    of each answer, integers or a list of uids. method: a Method, or the name of one of METHODS. sigma_V and all other
    statistics are over this batch and, with process_group, those of its other processes.
    Source: the paper, sections 3 and 4; docs/method.md.
    """
    method = METHODS[method] if isinstance(method, str) else method
    with torch.no_grad():
        rest = rewards_B, cu_seqlens, groups_B, method, process_group
        credit = assign_credit(delta_NS, ids_NS, old_logprobs_NS, *rest)
        return credit.advantages(batch_sigma(credit.values_N, method, process_group))
