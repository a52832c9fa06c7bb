"""Problems, tokenizer and random models of a size that a test can afford, shared by the tests of the evaluation."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tokenizers import Regex, pre_tokenizers
from transformers import PretrainedConfig

from ipvrm_core.trainer.config import Scratch
from ipvrm_core.trainer.evaluation.token_scores import Scorer
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.models import add_value_head, build_scratch, character_tokenizer, save_model

ALPHABET = "0123456789+-*=?;.:# \nSteparodbmnuswi<>|"
TEMPLATE = "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}<e>\n{% endfor %}"
ROWS = [
    {"problem": "1+2?", "steps": ["1+2=3.", "so 3"], "label": -1, "generator": "a", "final_answer_correct": True},
    {"problem": "2*3?", "steps": ["2*3=5.", "so 5", "5."], "label": 0, "generator": "a", "final_answer_correct": False},
    {"problem": "4-1?", "steps": ["4-1=3. ", "so 4"], "label": 1, "generator": "b", "final_answer_correct": False},
    {"problem": "9+9?", "steps": ["9+9=18.", "so 18"], "label": -1, "generator": "b", "final_answer_correct": 1},
]


def made_up(folder: Path, rows=ROWS, name: str = "gsm8k") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    other = "" if name == "gsm8k" else "?"  # no problem twice
    rows = [{"id": f"{name}-{i}", **row, "problem": row["problem"] + other} for i, row in enumerate(rows)]
    path.write_text(json.dumps(rows))
    return path


def tokenizer(template: str | None = TEMPLATE):
    made = character_tokenizer(ALPHABET)
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # newlines too
    made.chat_template = template
    return made


def model(seed: int, scale: float = 6.0):
    torch.manual_seed(seed)
    scratch = Scratch(hidden_size=32, layers=1, heads=2, kv_heads=2, intermediate_size=64)
    made = build_scratch(scratch, tokenizer())
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.mul_(scale)
    return made.eval()


def value_model(seed: int):
    made = model(seed)
    head = add_value_head(made)
    with torch.no_grad():
        head.weight.normal_()
        head.bias.fill_(0.5)
    return made


def scorer(model, reference=None, **settings) -> Scorer:
    """Of plain models."""
    wrapped = [None if one is None else LanguageModel(one) for one in (model, reference)]
    return Scorer(tokenizer(), *wrapped, **settings)


def log_ratio_scorer() -> Scorer:
    return scorer(model(1), model(2))


def scorer_of(kind: str) -> Scorer:
    made = {
        "log-ratio": log_ratio_scorer,
        "log-prob": lambda: scorer(model(1), decay=0.9),
        "value": lambda: scorer(value_model(1)),
    }[kind]()
    assert made.kind == kind
    return made


def saved(folder: Path, **parts) -> dict[str, str]:
    """Folders of models, by name."""
    for name, part in parts.items():
        save_model(part, tokenizer(), folder / name)
    return {name: str(folder / name) for name in parts}


@torch.no_grad()
def plain_scores(scorer: Scorer, ids: list[int], start: int, unseen: int | None = None) -> np.ndarray:
    """Of the tokens from `start`, from the models' own logits or hidden states; `unseen`: a token that is masked."""
    row = torch.tensor([ids])
    mask = torch.tensor([[token != unseen for token in ids]]).long()
    if scorer.kind == "value":
        head = scorer.model.value_head
        hidden = scorer.model.model.model(input_ids=row).last_hidden_state[0]
        return (hidden @ head.weight[0] + head.bias)[start:].numpy()

    def logprobs(one):
        logits = one.model(input_ids=row, attention_mask=mask).logits[0, :-1]
        return logits.log_softmax(-1).gather(1, row[0, 1:, None])[start - 1 :, 0]

    ours = logprobs(scorer.model)
    if scorer.kind == "log-ratio":
        return (ours - logprobs(scorer.reference)).numpy()
    return (ours * scorer.decay ** torch.arange(len(ours))).numpy()


class _Table(torch.nn.Module):
    """The next token's logits are a function of the tokens so far."""

    def __init__(self, size: int, logits_of):
        super().__init__()
        self.config, self.logits_of = PretrainedConfig(), logits_of
        self.head = torch.nn.Linear(size, size, bias=False)
        torch.nn.init.eye_(self.head.weight)

    def get_output_embeddings(self):
        return self.head

    def base_model(self, input_ids, attention_mask, use_cache):
        return SimpleNamespace(last_hidden_state=torch.stack([self.logits_of(row) for row in input_ids]))


def table(experiment, logits_of) -> LanguageModel:
    """A language model by hand: logits_of(ids [L]) -> [L, V]."""
    return experiment.language_model(_Table(len(experiment.text.tokenizer), logits_of))
