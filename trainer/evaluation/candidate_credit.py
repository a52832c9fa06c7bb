"""Does the TD advantage favour the true token? Measurable where a task determines the next token.

Over positions where the next token is determined, the true token is in C_t and |C_t| > 1: how often has it the highest
TD advantage? Compared with the policy's own most probable token, and with chance (mean of 1 / |C_t|).
"""

from collections.abc import Sequence

import torch
from torch import nn

from ipvrm_core import Candidates, linear_logprobs, select_candidates
from ipvrm_core.trainer.batching import Answer, map_rows
from ipvrm_core.trainer.data.example import Example
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.models import head_of
from ipvrm_core.trainer.sampling.generate import Sample


def true_tokens(experiment: Experiment, examples: Sequence[Example], samples: Sequence[Sample]) -> torch.Tensor:
    """The due token id of every packed response token, -1 where the task does not determine it: [N]."""
    tokenizer, due = experiment.tokenizer, []
    for example, sample in zip(examples, samples, strict=True):
        text = experiment.decode(sample.response_ids)
        ids, special = sample.response_ids, set(tokenizer.all_special_ids)
        starts = {len(experiment.decode(ids[:t])): t for t, token in enumerate(ids) if token not in special}
        row = [-1] * len(sample.response_ids)
        for position, character in experiment.task.due_positions(example, text):
            if position in starts:
                row[starts[position]] = tokenizer.convert_tokens_to_ids(character)
        due += row
    return torch.tensor(due)


def candidate_credit(
    experiment: Experiment,
    policy: nn.Module,
    reward_models: dict[str, nn.Module],
    examples: Sequence[Example],
    samples: Sequence[Sample],
    p_min: float = 0.1,
    reference: bool = True,
) -> dict[str, float]:
    """Shares over the qualifying positions: {"positions": count, "chance", "policy", "<reward model>", ...}.

    reference: the reward models' scores are log-ratios to the policy, else log-probs alone.
    """
    answers = [Answer(sample.prompt_ids, sample.response_ids) for sample in samples]
    limit, temperature = experiment.config.micro_batch_tokens, experiment.config.generation.temperature
    policy_head = head_of(policy)

    def choose(hidden, tokens, _):
        options = {"temperature": temperature, **policy_head.options}
        return select_candidates(hidden, policy_head.weight, tokens.targets_N, p_min, **options)

    candidates = Candidates(*map_rows(policy, answers, limit, choose))
    true_N = true_tokens(experiment, examples, samples).to(candidates.ids_NK.device)
    usable_N = (true_N >= 0) & (candidates.counts_N > 1) & (candidates.ids_NK == true_N[:, None]).any(1)
    ids_NK, true_N = candidates.ids_NK[usable_N], true_N[usable_N]
    if not len(ids_NK):
        return {"positions": 0}

    def share(score_NK: torch.Tensor) -> float:
        best_N = score_NK[usable_N].masked_fill(ids_NK < 0, -torch.inf).argmax(1, keepdim=True)
        return (ids_NK.gather(1, best_N)[:, 0] == true_N).float().mean().item()

    result = {
        "positions": len(ids_NK),
        "chance": (1 / candidates.counts_N[usable_N]).mean().item(),
        "policy": share(candidates.logprobs_NK),
    }
    for name, model in reward_models.items():
        head = head_of(model)

        def score(hidden, _, rows, head=head):
            ids = candidates.ids_NK[rows]
            return (linear_logprobs(hidden, head.weight, ids, temperature=temperature, **head.options).logprobs_NK,)

        score_NK = map_rows(model, answers, limit, score)[0]
        result[name] = share(score_NK - candidates.logprobs_NK if reference else score_NK)
    return result
