"""A batch of answers to two prompts, and what the trainer's tests do with it."""

import torch

from ipvrm_core import Candidates
from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.language_model import LanguageModel
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
    ids_NS = torch.tensor([[6, 6, 8], [1, -1, -1], [7, 7, 8], [1, -1, -1]])
    logprobs_NS = torch.tensor([0.6, 0.6, 0.2]).log().where(torch.tensor([[True], [False]] * 2), 0.0)
    candidates = Candidates(ids_NS, logprobs_NS, torch.tensor([2, 0, 2, 0]), torch.zeros(4))
    return batch, OldPolicy(torch.tensor([0, 2, 4]), candidates, {})


def full_logits(model: LanguageModel, answers: list[Answer]) -> torch.Tensor:
    """Full logits of all response positions, one answer at a time, without padding: [N, V], with a gradient."""
    rows = []
    for answer in answers:
        ids = torch.tensor([answer.prompt_ids + answer.response_ids])
        rows.append(model.model(input_ids=ids).logits[0, len(answer.prompt_ids) - 1 : -1])
    return torch.cat(rows)


def with_value_head(model):
    head = add_value_head(model)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(9)))
        head.bias.fill_(0.3)
    return model
