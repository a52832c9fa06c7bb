"""A batch of answers to two prompts, and what the trainer's tests do with it."""

import torch

from ipvrm_core import Candidates
from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.models import add_value_head
from ipvrm_core.trainer.rl.collect import Collected
from ipvrm_core.trainer.rl.old_policy import OldPolicy

LENGTHS = [4, 7, 2, 5, 10, 3]  # of the answers, EOS included
CU = torch.tensor([0, *LENGTHS]).cumsum(0)
REWARDS = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]


def two_prompts() -> Collected:
    """Two prompts, three answers each, of different lengths."""
    generator = torch.Generator().manual_seed(5)

    def ids(count: int) -> list[int]:
        return torch.randint(2, 19, (count,), generator=generator).tolist()

    prompts = [ids(4), ids(6)]
    answers = [Answer(prompts[i // 3], [*ids(length - 1), 1]) for i, length in enumerate(LENGTHS)]
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    return Collected(answers, torch.tensor(REWARDS), groups, torch.tensor([1 / 3] * 3 + [2 / 3] * 3), 0, {})


def two_short_answers() -> tuple[Collected, OldPolicy]:
    """A right and a wrong answer of two tokens; candidates at the first token of each, of probability .6 and .2."""
    answers = [Answer([5], [6, 1]), Answer([5], [7, 1])]
    groups_B, mu_B = torch.zeros(2, dtype=torch.int64), torch.full((2,), 0.5)
    batch = Collected(answers, torch.tensor([1.0, 0.0]), groups_B, mu_B, 0, {})
    ids_NK = torch.tensor([[6, 8], [-1, -1], [7, 8], [-1, -1]])
    logprobs_NK = torch.tensor([0.6, 0.2]).log().where(ids_NK >= 0, 0.0)
    candidates = Candidates(ids_NK, logprobs_NK, (ids_NK >= 0).sum(1), torch.zeros(4), torch.zeros(4))
    return batch, OldPolicy(torch.tensor([0, 2, 4]), torch.zeros(4), candidates, {})


@torch.no_grad()
def full_logits(model, answers: list[Answer]) -> torch.Tensor:
    """Full logits of all response positions, one answer at a time, without padding: [N, V]."""
    rows = []
    for answer in answers:
        ids = torch.tensor([answer.prompt_ids + answer.response_ids])
        rows.append(model(input_ids=ids).logits[0, len(answer.prompt_ids) - 1 : -1])
    return torch.cat(rows)


def at_limit(make, limit: int) -> Experiment:
    """A run folder of its own for every micro-batch size: a folder keeps one configuration."""
    first = make()
    config = first.config.model_copy(update={"micro_batch_tokens": limit})
    return Experiment(config, first.run.parent / f"limit-{limit}")


def with_value_head(model):
    head = add_value_head(model)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(9)))
        head.bias.fill_(0.3)
    return model
