"""The old-policy pass: log-probs of the sampled tokens and the candidates under the policy before its update, which
sampled the batch or, with `ahead`, is one update on from the one that did.

Shape letters: N packed response tokens, B answers, S = 1 + K slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ipvrm_core import Candidates, candidate_mass
from ipvrm_core.method import Method
from ipvrm_core.packing import cu_seqlens_from_lengths
from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.language_model import LanguageModel


@dataclass(frozen=True)
class OldPolicy:
    cu_seqlens: Tensor
    candidates: Candidates
    numbers: dict[str, float]

    @property
    def logprobs_N(self) -> Tensor:
        """Of the sampled tokens."""
        return self.candidates.sampled_logprobs_N


def old_policy(policy: LanguageModel, method: Method, answers: Sequence[Answer]) -> OldPolicy:
    """Candidates are of the full distribution at the sampling temperature."""
    policy.eval()
    lengths_B = torch.tensor([len(answer.response_ids) for answer in answers], device=policy.device)
    cu_seqlens = cu_seqlens_from_lengths(lengths_B)
    last_N = torch.zeros(int(lengths_B.sum()), dtype=torch.bool, device=policy.device)
    last_N[cu_seqlens[1:] - 1] = True
    exclude_N = last_N if method.skip_last_token else None
    found = policy.candidates(answers, exclude_N=exclude_N, **method.candidate_rule())
    numbers = {
        "candidates": found.counts_N.float().mean().item(),
        "candidate_mass": candidate_mass(found.ids_NS, found.logprobs_NS).mean().item(),
        "several_candidates": (found.counts_N > 1).float().mean().item(),
        "entropy": found.entropy_N.mean().item(),
    }
    return OldPolicy(cu_seqlens, found, numbers)
