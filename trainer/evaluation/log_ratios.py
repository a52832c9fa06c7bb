"""Any reward model and its reference, by path, and their log-ratios on any answers.

Shape letters: n tokens of some answers, N tokens of one.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ipvrm_core import linear_logprobs
from ipvrm_core.trainer import models
from ipvrm_core.trainer.batching import Answer, map_rows, micro_batches
from ipvrm_core.trainer.config import Model


class Pair(NamedTuple):
    """A reward model, its reference, and the tokenizer of both."""

    tokenizer: object
    model: nn.Module
    reference: nn.Module


def load_pair(model: str, reference: str, dtype: str = "float32", device: str = "auto") -> Pair:
    """Hugging Face names or folders; FOLDER/FILE.gguf for one GGUF file. Both are held in memory.

    ValueError when the two do not share a vocabulary, or do more in their heads than a matrix product.
    """
    tokenizers, loaded = zip(*(load_one(path, dtype, device) for path in (model, reference)), strict=True)
    check_vocabulary(*tokenizers)
    return Pair(tokenizers[0], *loaded)


def load_one(path: str, dtype: str = "float32", device: str = "auto") -> tuple[object, nn.Module]:
    """(tokenizer, model in evaluation mode) of a Hugging Face name or folder, or of FOLDER/FILE.gguf."""
    settings = _settings(path)
    tokenizer = models.load_tokenizer(settings, None)
    model = models.load_pretrained(settings.path, dtype, settings.gguf_file)
    if hasattr(models.causal_lm(model), "value_head"):
        raise ValueError(f"{path} scores by a value head; this command reads log-probs")
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    model = model.to(place).eval()
    models.check_head(model)
    return tokenizer, model


def _settings(path: str) -> Model:
    if path.endswith(".gguf"):
        return Model(path=str(Path(path).parent), gguf_file=Path(path).name)
    return Model(path=path)


def check_vocabulary(model, reference) -> None:
    """ValueError unless every token has the same id in both tokenizers: the log-ratio compares ids."""
    ours, theirs = model.get_vocab(), reference.get_vocab()
    if ours == theirs:
        return
    differing = min(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    raise ValueError(
        "model and reference must have the same vocabulary; "
        f"got {len(ours)} and {len(theirs)} tokens, {differing!r} is {ours.get(differing)} and {theirs.get(differing)}"
    )


def length_limit(pair: Pair) -> int | None:
    """Tokens that both models have positions for; None where neither says."""
    texts = [models.causal_lm(model).config.get_text_config() for model in (pair.model, pair.reference)]
    known = [getattr(text, "max_position_embeddings", None) for text in texts]
    return min((limit for limit in known if limit), default=None)


def log_ratios(
    pair: Pair,
    answers: Sequence[Answer],
    max_tokens: int,
    temperature: float = 1.0,
    progress: Callable[[int], None] = lambda count: None,
) -> list[Tensor]:
    """q of every response token, log pi_phi - log pi_ref: per answer [N] float32 on CPU, in the order of `answers`.

    Longest first, so that micro-batches of at most `max_tokens` padded tokens hold little padding and memory runs out
    at once or never. `progress` is told how many answers are done. ValueError when the first micro-batch has q = 0
    throughout: model and reference are then the same.
    """
    order = sorted(range(len(answers)), key=lambda i: -len(answers[i].prompt_ids) - len(answers[i].response_ids))
    ordered = [answers[i] for i in order]
    found: list[Tensor] = [torch.empty(0)] * len(answers)
    for part in micro_batches(ordered, max_tokens):
        ours_n, theirs_n = (
            _logprobs(model, ordered[part], max_tokens, temperature) for model in (pair.model, pair.reference)
        )
        q_n = (ours_n - theirs_n).float().cpu()
        if part.start == 0 and not q_n.any():
            raise ValueError("all log-ratios are 0: model and reference have the same weights, so nothing is scored")
        for i, q_N in zip(order[part], q_n.split([len(a.response_ids) for a in ordered[part]]), strict=True):
            found[i] = q_N.clone()
        progress(part.stop - part.start)
    return found


def _logprobs(model: nn.Module, answers: Sequence[Answer], max_tokens: int, temperature: float) -> Tensor:
    head = models.head_of(model)

    def function(hidden_ND, batch, _):
        ids_N1 = batch.targets_N[:, None]
        return (
            linear_logprobs(hidden_ND, head.weight, ids_N1, temperature=temperature, **head.options).logprobs_NK[:, 0],
        )

    return map_rows(model, answers, max_tokens, function)[0]
