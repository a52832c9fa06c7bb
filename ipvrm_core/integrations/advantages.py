"""Token advantages for frameworks that hold answers in padded rows and take advantages [B, T].

A batch of answers is input_ids [B, L] with its attention mask, whose last T columns are the response, and mask_BT:
which of them the policy wrote (not padding, and not the output of tools, so it may have holes).

Shape letters: B answers, L padded length, T padded length of the responses, N tokens of mask_BT, D hidden size.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ipvrm_core.credit import assign_credit
from ipvrm_core.heads import AtHead, Head, attach
from ipvrm_core.method import METHODS, Method
from ipvrm_core.ops.td_errors import linear_td_errors
from ipvrm_core.packing import pack, unpack
from ipvrm_core.sequences.groups import Groups


def at_answers(mask_BT: Tensor, function: Callable) -> AtHead:
    """An `at_head` that calls function(hidden_ND, head) on the states that predict the answers' tokens, packed.

    Outside of autocast: the fused functions choose their own precision.
    """

    def at_head(hidden_BLD: Tensor, head: Head):
        T = mask_BT.shape[1]
        if hidden_BLD.shape[0] != len(mask_BT) or hidden_BLD.shape[1] <= T:
            got = f"{tuple(hidden_BLD.shape[:2])} for a mask of {tuple(mask_BT.shape)}"
            raise ValueError(f"hidden states must be [B, L] with L > T, a prompt before each response; got {got}")
        with torch.autocast(hidden_BLD.device.type, enabled=False):
            return function(hidden_BLD[:, -T - 1 : -1][mask_BT], head)

    return at_head


@torch.no_grad()
def map_answers(
    model: nn.Module,
    ids_BL: Tensor,
    attention_BL: Tensor,
    mask_BT: Tensor,
    function: Callable[[Tensor, Head, slice], Iterable[Tensor]],
    *,
    batch: int | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> list[Tensor]:
    """function(hidden_nD, head, its slice of the N tokens) -> tensors [n, ...], over `batch` answers at a time.

    The model has `attach`. autocast: what the framework runs its own forward under. Returns whole tensors [N, ...].
    """
    mask_BT, pieces, row = mask_BT.bool(), [], 0
    for first in range(0, len(ids_BL), batch or len(ids_BL)):
        own = slice(first, first + (batch or len(ids_BL)))
        rows = slice(row, row + int(mask_BT[own].sum()))
        row = rows.stop
        at_head = at_answers(mask_BT[own], lambda hidden_nD, head, rows=rows: function(hidden_nD, head, rows))
        with autocast():
            pieces.append(model(input_ids=ids_BL[own], attention_mask=attention_BL[own], at_head=at_head))
    return [torch.cat(column) for column in zip(*pieces, strict=True)]


def token_rewards(
    reward_model: nn.Module,
    ids_BL: Tensor,
    attention_BL: Tensor,
    mask_BT: Tensor,
    old_logprobs_BT: Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
    batch: int | None = None,
) -> Tensor:
    """beta (log pi_phi(y_t | s_t) - log pi_old(y_t | s_t)), the TD error of every token: [B, T], 0 outside the mask.

    reward_model: a causal language model of transformers with the policy's vocabulary, as `ipvrm train-rm` makes it.
    old_logprobs_BT: of the policy that sampled the answers, at the temperature. batch: answers a forward.
    """
    old_N1, cu_seqlens = pack(old_logprobs_BT[..., None].to(torch.float32), mask_BT)
    tokens_N1 = ids_BL[:, -mask_BT.shape[1] :][mask_BT.bool()][:, None]

    def errors(hidden_nD: Tensor, head: Head, rows: slice) -> tuple[Tensor]:
        given = tokens_N1[rows], old_N1[rows], beta
        return (linear_td_errors(hidden_nD, head.weight, *given, **head.options(temperature)),)

    (delta_N1,) = map_answers(attach(reward_model), ids_BL, attention_BL, mask_BT, errors, batch=batch)
    return unpack(delta_N1[:, 0], cu_seqlens, mask=mask_BT.bool())


@torch.no_grad()
def token_advantages(
    token_rewards_BT: Tensor,
    mask_BT: Tensor,
    rewards_B: Tensor,
    groups_B: Groups,
    method: Method | str = "paper",
    *,
    outcome_B: Tensor | None = None,
    process_group=None,
) -> Tensor:
    """A_t = outcome + process_coef * process_t by any estimator from any token rewards: [B, T], 0 outside the mask.

    token_rewards_BT: of `token_rewards`, of a value head, of a judge. rewards_B: of the whole answers. groups_B: the
    prompt of each answer, integers or uids. method: a Method (estimator, outcome, process_coef, gamma, ...), or the
    name of one of METHODS. outcome_B: the answers' advantages where the framework has made them; None: the method's.
    process_group: of torch.distributed, whose batches share their statistics.
    """
    if token_rewards_BT.shape != mask_BT.shape:
        shapes = f"{tuple(token_rewards_BT.shape)} and {tuple(mask_BT.shape)}"
        raise ValueError(f"token_rewards and mask must both be [B, T]; got shapes {shapes}")
    method = METHODS[method] if isinstance(method, str) else method
    reward_N, cu_seqlens = pack(token_rewards_BT, mask_BT)
    reward_N1 = reward_N[:, None].float()
    slots = torch.zeros_like(reward_N1, dtype=torch.int64), torch.zeros_like(reward_N1)  # of candidates there are none
    given = rewards_B.float(), cu_seqlens, groups_B
    credit = assign_credit(reward_N1, *slots, *given, method, process_group, outcome_B=outcome_B)
    return unpack(credit.credit_NS[:, 0], cu_seqlens, mask=mask_BT.bool())
