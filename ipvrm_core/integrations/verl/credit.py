"""What the trainer does with a batch on one process, and what the reward model learns on its workers.

Shape letters: B answers, N tokens, S slots.
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from ipvrm_core.credit import assign_credit, batch_sigma
from ipvrm_core.integrations.verl.rows import Rows
from ipvrm_core.integrations.verl.settings import DistRL
from ipvrm_core.objectives import Objective, RewardBatch
from ipvrm_core.sequences.reward_losses import difficulty_boundary, dynamic_loss_weights


def credited(distrl: DistRL, rows: Rows, data, rewards_B: Tensor, uids: Sequence[Hashable]) -> dict[str, Tensor]:
    """Nested `advantages` [B, r], verl's with the process advantage, and `distrl_adv` [B, r, S] of the slots.

    data: advantages, distrl_ids, distrl_old, distrl_delta, nested. ValueError unless verl's advantages are those of
    whole answers (grpo, rloo, ...; not gae).
    """
    given_N, cu_seqlens = rows.packed(data["advantages"]), rows.cu_seqlens
    outcome_B = given_N.new_zeros(len(rewards_B))
    filled = cu_seqlens.diff() > 0
    outcome_B[filled] = given_N[cu_seqlens[:-1][filled]]
    if not torch.allclose(outcome_B.repeat_interleave(cu_seqlens.diff()), given_N):
        raise ValueError("algorithm.adv_estimator must give one advantage an answer (grpo, rloo, ...) beside distrl")
    ids_NS, old_NS, delta_NS = (rows.packed(data[name]) for name in ("distrl_ids", "distrl_old", "distrl_delta"))
    slots = delta_NS, ids_NS, old_NS, rewards_B, cu_seqlens, list(uids)
    credit = assign_credit(*slots, distrl, beta=distrl.reward_objective().beta, outcome_B=outcome_B)
    assert credit.values_N is not None  # there are TD errors
    advantages_NS = credit.advantages(distrl, batch_sigma(credit.values_N, distrl))
    return {"advantages": rows.nested(advantages_NS[:, 0]), "distrl_adv": rows.nested(advantages_NS)}


def reward_fields(
    distrl: DistRL, objective: Objective, rewards_B: Tensor, uids: Sequence[Hashable]
) -> dict[str, Tensor]:
    """What the loss of the reward model looks at, one number an answer; the weights are those of the whole batch."""
    labels_B = (rewards_B > distrl.right_above).float()
    numbers: dict[Hashable, int] = {}
    index_B = torch.tensor([numbers.setdefault(uid, len(numbers)) for uid in uids])
    sizes_G = index_B.bincount().clamp(min=1)
    mean_B = (torch.zeros(len(sizes_G)).index_add(0, index_B, labels_B) / sizes_G)[index_B]
    weights_B = torch.full_like(labels_B, 1 / len(labels_B))
    if objective.dynamic_weights and distrl.dlw_scale != "none":
        weights_B = weights_B * dynamic_loss_weights(labels_B, mean_B, distrl.dlw_scale)
    bounded = objective.boundary and distrl.online_boundary
    boundary_B = difficulty_boundary(mean_B) if bounded else torch.zeros_like(mean_B)
    return {"distrl_labels": labels_B, "distrl_weights": weights_B, "distrl_boundary": boundary_B}


def reward_loss(model_output, data, dp_group=None, *, objective: Objective) -> tuple[Tensor, dict[str, float]]:
    """The loss function of the reward model's workers: the objective on its log-probs against the old policy's."""
    rows = Rows.of(data["input_ids"], data["response_mask"])
    score_N = model_output["log_probs"].values()[rows.index_R][rows.mask_R]
    if objective.reference:
        score_N = score_N - rows.packed(data["old_log_probs"])
    boundary_B = data["distrl_boundary"] if objective.boundary else None
    weights_B = data["distrl_weights"] * data["dp_size"]  # FSDP averages gradients
    loss = objective.loss(score_N, RewardBatch(rows.cu_seqlens, data["distrl_labels"], weights_B, boundary_B))
    return loss, {}
