"""Any reward model, by path, and its scores of the tokens of any answers.

Shape letters: n tokens of some answers, N tokens of one.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ipvrm_core.objectives.endorm import Endorm
from ipvrm_core.packing import cu_seqlens_from_lengths
from ipvrm_core.trainer import models
from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.config import Model
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.progress import Progress

Kind = Literal["log-ratio", "log-prob", "value"]


class Scorer(NamedTuple):
    """A reward model and what its token scores are made of.

    kind: "log-ratio", log pi_phi(y_t|s_t) - log pi_ref(y_t|s_t), where there is a reference; "value", the output of the
    model's value head on (s_t, y_t); "log-prob", decay^(t-1) log pi_phi(y_t|s_t), t from the start of the answer.
    """

    tokenizer: object
    model: LanguageModel
    reference: LanguageModel | None = None
    decay: float = 1.0

    @property
    def kind(self) -> Kind:
        if self.reference is not None:
            return "log-ratio"
        return "value" if self.model.value_head is not None else "log-prob"


def load_scorer(
    model: str,
    reference: str | None = None,
    *,
    decay: float | None = None,
    dtype: str = "float32",
    device: str = "auto",
) -> Scorer:
    """Hugging Face names or folders; FOLDER/FILE.gguf for one GGUF file. All are held in memory.

    decay: of log-probs, None for that of the objective EndoRM. ValueError for a reference beside a value head or of
    another vocabulary, a decay of other scores, or a head that does more than a matrix product.
    """
    tokenizer, loaded = _load(model, dtype, device)
    scorer = Scorer(tokenizer, loaded)
    if reference and scorer.kind == "value":
        raise ValueError(f"{model} scores by its value head, which takes no reference; got {reference}")
    if decay is not None and (reference or scorer.kind == "value"):
        beside = f"the reference {reference}" if reference else "a value head"
        raise ValueError(f"a decay is of a model's own log-probs; got {decay} with {beside}")
    if scorer.kind == "value":
        return scorer
    models.check_head(loaded.model)
    if not reference:
        endorm = Endorm() if decay is None else Endorm(decay=decay)
        return scorer._replace(decay=endorm.decay)
    theirs, other = load_language_model(reference, dtype, device)
    check_vocabulary(tokenizer, theirs)
    return scorer._replace(reference=other)


def load_language_model(path: str, dtype: str = "float32", device: str = "auto") -> tuple[object, LanguageModel]:
    """(tokenizer, model in evaluation mode) of a Hugging Face name or folder, or of FOLDER/FILE.gguf.

    ValueError for a model with a value head: what reads log-probs would not see it.
    """
    tokenizer, model = _load(path, dtype, device)
    if Scorer(tokenizer, model).kind == "value":
        raise ValueError(f"{path} scores by a value head; expected a language model, for its log-probs")
    models.check_head(model.model)
    return tokenizer, model


def _load(path: str, dtype: str, device: str) -> tuple[object, LanguageModel]:
    settings = Model(path=path)
    if path.endswith(".gguf"):
        settings = Model(path=str(Path(path).parent), gguf_file=Path(path).name)
    tokenizer = models.load_tokenizer(settings, None)
    model = models.load_pretrained(settings.path, dtype, settings.gguf_file)
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    return tokenizer, LanguageModel(model.to(place)).eval()


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


def length_limit(*loaded: LanguageModel | None) -> int | None:
    """Tokens that all these models have positions for; None where none says."""
    return min((model.positions for model in loaded if model is not None and model.positions), default=None)


def token_scores(scorer: Scorer, answers: Sequence[Answer], max_tokens: int | None = None) -> list[Tensor]:
    """The score of every response token: per answer [N] float32 on CPU, in the order of `answers`."""
    found: list[Tensor] = [torch.empty(0)] * len(answers)
    with Progress("scores", len(answers), unit="answer") as shown:
        for indices, scores in scored_batches(scorer, answers, max_tokens):
            for i, score_N in zip(indices, scores, strict=True):
                found[i] = score_N
            shown.update(len(indices))
    return found


def scored_batches(
    scorer: Scorer, answers: Sequence[Answer], max_tokens: int | None = None, unseen: int | None = None
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Per micro-batch of at most `max_tokens` padded tokens: (which answers, the scores of each [N] float32 on CPU).

    Longest first, so that micro-batches hold little padding and memory runs out at once or never. The answers of what
    is not yielded yet give the very same micro-batches: one can stop and go on. ValueError for scores that are not
    finite, and when the first micro-batch has the score 0 throughout. max_tokens: None for the model's own budget.
    unseen: a token that log-probs do not attend to.
    """
    max_tokens = max_tokens or scorer.model.max_tokens
    order = sorted(range(len(answers)), key=lambda i: -len(answers[i].prompt_ids) - len(answers[i].response_ids))
    for part in scorer.model.parts([answers[i] for i in order], max_tokens):
        chosen = [answers[i] for i in order[part]]
        score_n = _scores(scorer, chosen, max_tokens=max_tokens, unseen=unseen).float().cpu()
        _check(scorer.kind, score_n, first=part.start == 0)
        yield order[part], [piece.clone() for piece in score_n.split([len(answer.response_ids) for answer in chosen])]


def _scores(scorer: Scorer, answers: Sequence[Answer], max_tokens: int, unseen: int | None) -> Tensor:
    """[n]"""
    if scorer.kind == "value":
        return scorer.model.values(answers, max_tokens=max_tokens)
    ours_n = scorer.model.logprobs(answers, max_tokens=max_tokens, unseen=unseen)
    if scorer.reference is not None:
        return ours_n - scorer.reference.logprobs(answers, max_tokens=max_tokens, unseen=unseen)
    cu_seqlens = cu_seqlens_from_lengths(torch.tensor([len(answer.response_ids) for answer in answers]))
    return Endorm(decay=scorer.decay).token_scores(ours_n.float().cpu(), cu_seqlens)


def _check(kind: Kind, score_n: Tensor, first: bool) -> None:
    infinite = int((~score_n.isfinite()).sum())
    if infinite:
        raise ValueError(f"token scores must be finite; {infinite} of {len(score_n)} are not: the model is broken")
    if first and not score_n.any():
        why = {
            "log-ratio": "model and reference have the same weights",
            "log-prob": "every token has probability 1",
            "value": "the value head was never trained",
        }[kind]
        raise ValueError(f"all {kind}s are 0: {why}, so nothing is scored")
