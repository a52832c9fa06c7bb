"""An estimator in one file: the best TD error still to come, instead of their discounted sum.

As "examples.own_estimator:BestToCome" it serves in a configuration, rl.<name>.method.estimator, and in a Method:

    replace(METHODS["paper"], estimator="examples.own_estimator:BestToCome")
"""

import torch
from torch import Tensor

from ipvrm_core import group_normalize
from ipvrm_core.estimators import Estimator, TokenRewards
from ipvrm_core.method import Method
from ipvrm_core.packing import pack, unpack


class BestToCome(Estimator):
    """process_t = max_{i >= t} delta_hat_i, delta_hat normalised over the prompt's tokens."""

    name = "best_to_come"

    def process(self, tokens: TokenRewards, method: Method) -> Tensor:
        normal_N = group_normalize(
            tokens.reward_N, tokens.cu_seqlens, tokens.groups_B, process_group=tokens.process_group
        )
        padded_BT = unpack(normal_N, tokens.cu_seqlens, fill=-torch.inf)
        best_BT = padded_BT.flip(1).cummax(1).values.flip(1)
        return pack(best_BT, padded_BT > -torch.inf)[0]
