"""For tests of what is saved: steps of a tiny model on data that depends on the step alone, and its weights."""

import torch

from ipvrm_core.trainer.config import Optim
from ipvrm_core.trainer.data.tasks import ChainTask
from ipvrm_core.trainer.models import character_tokenizer
from ipvrm_core.trainer.optim import apply_step

TOKENIZER = character_tokenizer(ChainTask.alphabet)
OPTIM = Optim(lr=1e-2, warmup=2, schedule="cosine", weight_decay=0.1)


def train_step(model, optimizer, step: int) -> None:
    """One step on data that depends on the step alone."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(2, 19, (4, 7), generator=generator)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    apply_step(optimizer, OPTIM, step, 10)


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def suffixes_in(folder) -> set[str]:
    return {path.suffix for path in folder.rglob("*") if path.is_file()}
