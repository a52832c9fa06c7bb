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
    agreement_advantages,
    answer_advantages,
    candidate_advantages,
    center_on_candidates,
    sigma_v,
    value_moments,
)
from ipvrm_core.sequences.groups import Groups, all_reduced
from ipvrm_core.sequences.segments import expand
from ipvrm_core.sequences.values import prefix_values


class Credit(NamedTuple):
    """credit_NS: A_t of the sampled token, then delta_t(v) of the candidates, which sigma_V has still to divide.

    values_N: V of the sampled path; sigma_V is theirs, over a scope that the method names. None without token rewards:
    then there are no TD errors, and candidates, where they have credit, have it as an advantage already.
    done_N: rows whose candidates have advantages already, which are not made from sigma_V; None: no row.
    """

    credit_NS: Tensor
    values_N: Tensor | None
    done_N: Tensor | None = None

    def advantages(self, method: Method, sigma: Tensor) -> Tensor:
        """[N, S], what PolicyBatch takes."""
        given_NK = made_NK = self.credit_NS[:, 1:]
        if method.candidate_form != "agreement":
            made_NK = candidate_advantages(given_NK, sigma, method.candidate_form)
        if self.done_N is not None:
            made_NK = torch.where(self.done_N[:, None], given_NK, made_NK)
        return torch.cat([self.credit_NS[:, :1], made_NK], dim=1)

    def rows(self, index) -> "Credit":
        """The rows selected by a slice or an index tensor."""
        return Credit(*(None if value is None else value[index] for value in self))


def assign_credit(
    delta_NS: Tensor | None,
    ids_NS: Tensor,
    old_logprobs_NS: Tensor,
    rewards_B: Tensor,
    cu_seqlens: Tensor,
    groups_B: Groups,
    method: Method,
    process_group=None,
    beta: float | None = None,
    outcome_B: Tensor | None = None,
) -> Credit:
    """A_t by the method's outcome and estimator, TD errors by its rules for the last token and the baseline.

    delta_NS: TD errors of the slots, or [N, 1] where only sampled tokens have a reward; None: there are none.
    beta: of the TD errors, which then are against pi_old; `agreement` needs it.
    outcome_B: advantages of the answers that a framework has made itself; None: those of the method's outcome.
    """
    if outcome_B is None:
        outcome_B = answer_advantages(rewards_B, groups_B, method.outcome, process_group)
    if delta_NS is None:
        return Credit(expand(outcome_B, cu_seqlens, len(ids_NS))[:, None], None)
    delta_NK, done_N = _of_candidates(delta_NS, ids_NS, old_logprobs_NS, method, beta)
    delta_NS = torch.cat([delta_NS[:, :1], delta_NK], dim=1)
    if method.skip_last_token:
        delta_NS = delta_NS.index_fill(0, cu_seqlens[1:] - 1, 0.0)
    values_N = prefix_values(delta_NS[:, 0], cu_seqlens, beta=1.0)  # beta is in delta already
    sigma = batch_sigma(values_N, method, process_group)
    tokens = TokenRewards(delta_NS[:, 0], outcome_B, rewards_B, cu_seqlens, groups_B, sigma, process_group)
    sampled_N = estimators.find(method.estimator)().advantages(tokens, method)
    return Credit(torch.cat([sampled_N[:, None], delta_NS[:, 1:]], dim=1), values_N, done_N)


def _of_candidates(
    delta_NS: Tensor, ids_NS: Tensor, old_logprobs_NS: Tensor, method: Method, beta: float | None
) -> tuple[Tensor, Tensor | None]:
    """The candidates' TD errors [N, K] by the method's baseline, and the rows [N] that hold advantages instead."""
    own = slice(1, delta_NS.shape[1])
    raw_NK, ids_NK, old_NK = delta_NS[:, own], ids_NS[:, own], old_logprobs_NS[:, own]
    if not raw_NK.shape[1]:
        return raw_NK, None
    agree = method.candidate_form == "agreement"
    delta_NK = agreement_advantages(raw_NK, ids_NK, old_NK, beta) if agree else raw_NK
    if method.candidate_baseline == "mean":
        delta_NK = center_on_candidates(delta_NK, ids_NK, old_NK)
    if method.single_candidate == "same":
        return delta_NK, torch.ones_like(ids_NK[:, 0], dtype=torch.bool) if agree else None
    sure = method.single_candidate == "agreement"
    single_NK = agreement_advantages(raw_NK, ids_NK, old_NK, beta) if sure else torch.zeros_like(raw_NK)
    single_N = (ids_NK >= 0).sum(1) <= 1
    return torch.where(single_N[:, None], single_NK, delta_NK), single_N | agree


def batch_sigma(values_N: Tensor, method: Method, process_group=None) -> Tensor:
    """sigma_V of these values, over all processes and within the method's bounds: 0-d."""
    sigma = sigma_v(all_reduced(value_moments(values_N), process_group), method.sigma_form)
    return sigma.clamp(min=method.sigma_min, max=method.sigma_max)


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
    beta: float | None = None,
) -> Tensor:
    """[N, S]: A_t = outcome + process_coef * process_t, then A_TD(v), in `paper` delta_t(v) / sigma_V; no gradient.

    delta_NS from `linear_td_errors` at the slots of `select_candidates`. rewards_B: 0/1 outcomes. groups_B: the prompt
    of each answer, integers or a list of uids. method: a Method, or the name of one of METHODS. sigma_V and all other
    statistics are over this batch and, with process_group, those of its other processes. beta: of the TD errors, for
    candidate_form = "agreement".
    Source: the paper, sections 3 and 4; docs/method.md.
    """
    method = METHODS[method] if isinstance(method, str) else method
    with torch.no_grad():
        rest = rewards_B, cu_seqlens, groups_B, method, process_group, beta
        credit = assign_credit(delta_NS, ids_NS, old_logprobs_NS, *rest)
        return credit.advantages(method, batch_sigma(credit.values_N, method, process_group))
