"""The online update of the reward model (paper eq. 15).

Shape letters: N packed response tokens, B answers.
"""

import torch
from torch import Tensor

from ipvrm_core import difficulty_boundary, dynamic_loss_weights
from ipvrm_core.method import Method
from ipvrm_core.objectives import Objective
from ipvrm_core.trainer.config import RlRewardModel
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.optim import apply_step
from ipvrm_core.trainer.reward import backward_reward_loss
from ipvrm_core.trainer.rl.collect import Collected
from ipvrm_core.trainer.rl.old_policy import OldPolicy


def update_reward_model(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    settings: RlRewardModel,
    method: Method,
    batch: Collected,
    old: OldPolicy,
    ref_logprobs_N: Tensor,
    step: int,
    total: int,
) -> dict[str, float]:
    """`passes` over the batch with the difficulty boundary and the dynamic loss weights, where the objective has them.

    ref_logprobs_N: of the reference that the method names, the old policy's or the start's.
    """
    weights_B = torch.ones_like(batch.rewards_B)
    if objective.dynamic_weights and method.dlw_scale != "none":
        weights_B = dynamic_loss_weights(batch.rewards_B, batch.group_mean_B, method.dlw_scale)
    boundary_B = difficulty_boundary(batch.group_mean_B) if objective.boundary and method.online_boundary else None
    size, bounds = len(batch.answers), old.cu_seqlens.tolist()
    orders = [torch.randperm(size).tolist() for _ in range(settings.passes)]
    model.train()
    losses, norm = [], 0.0
    for index in (
        order[start : start + settings.batch] for order in orders for start in range(0, size, settings.batch)
    ):
        rows_N = torch.cat([torch.arange(bounds[b], bounds[b + 1]) for b in index]).to(ref_logprobs_N.device)
        losses.append(
            backward_reward_loss(
                model,
                objective,
                [batch.answers[b] for b in index],
                ref_logprobs_N[rows_N],
                batch.rewards_B[index],
                weights_B[index] / len(index),
                None if boundary_B is None else boundary_B[index],
                old.logprobs_N[rows_N],
            )
        )
        norm = apply_step(optimizer, settings.optim, step, total)
    return {"rm_loss": sum(losses) / len(losses), "rm_grad_norm": norm}
