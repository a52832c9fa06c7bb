"""Does the TD advantage favour the true token? Measurable where a task determines the next token.

Over positions where the next token is determined, the true token is in C_t and |C_t| > 1: how often has it the highest
TD advantage? Compared with the policy's own most probable token, and with chance (mean of 1 / |C_t|).
"""

from collections.abc import Sequence

import torch

from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.data.example import Example
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.sampling.base import Sample
from ipvrm_core.trainer.truth import due_tokens


def candidate_credit(
    experiment: Experiment,
    policy: LanguageModel,
    reward_models: dict[str, LanguageModel],
    examples: Sequence[Example],
    samples: Sequence[Sample],
    p_min: float = 0.1,
    reference: LanguageModel | bool = True,
) -> dict[str, float]:
    """Shares over the qualifying positions: {"positions": count, "chance", "policy", "<reward model>", ...}.

    policy: whose candidates say which positions qualify. reference: the reward models' scores are log-ratios to the
    policy, or to another one, so that positions stay fixed while it learns; False: log-probs alone.
    """
    answers = [Answer(sample.prompt_ids, sample.response_ids) for sample in samples]
    candidates = policy.candidates(answers, p_min)
    all_NK, old_NK = candidates.ids_NS[:, 1:], candidates.logprobs_NS[:, 1:]
    due_N = due_tokens(experiment.task, experiment.text, examples, [answer.response_ids for answer in answers])
    true_N = due_N.to(all_NK.device)
    usable_N = (true_N >= 0) & (candidates.counts_N > 1) & (all_NK == true_N[:, None]).any(1)
    ids_NK, true_N = all_NK[usable_N], true_N[usable_N]
    if not len(ids_NK):
        return {"positions": 0}

    def share(score_NK: torch.Tensor) -> float:
        best_N = score_NK[usable_N].masked_fill(ids_NK < 0, -torch.inf).argmax(1, keepdim=True)
        return (ids_NK.gather(1, best_N)[:, 0] == true_N).float().mean().item()

    result = {
        "positions": len(ids_NK),
        "chance": (1 / candidates.counts_N[usable_N]).mean().item(),
        "policy": share(old_NK),
    }
    against_NK = old_NK
    if reference is False:
        against_NK = torch.zeros_like(old_NK)
    elif isinstance(reference, LanguageModel):
        against_NK = reference.slot_logprobs(answers, all_NK)
    for name, model in reward_models.items():
        result[name] = share(model.slot_logprobs(answers, all_NK) - against_NK)
    return result
