"""An answer token by token under a reward model: what a view of the page of `ipvrm inspect` shows.

Shape letters: N tokens of the answer, K candidates.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ipvrm_core import Candidates
from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.evaluation.lengths import refuse_long
from ipvrm_core.trainer.evaluation.reward_model.localisation import predict
from ipvrm_core.trainer.evaluation.reward_model.step_scores import step_sums, variants
from ipvrm_core.trainer.evaluation.token_scores import Scorer, length_limit, token_scores
from ipvrm_core.trainer.text.steps import Format, render


class Scored(NamedTuple):
    """Scores [N], and what the vocabulary's head adds: log-probs of the answer's tokens and rows of the candidates.

    theirs_N: None without a reference; entropy_N: of the distribution that the candidates are of; candidates: none, and
    the rest None, with a value head.
    """

    score_N: np.ndarray
    candidates: list[list[dict]]
    ours_N: np.ndarray | None = None
    theirs_N: np.ndarray | None = None
    entropy_N: np.ndarray | None = None


def inspect(
    scorer: Scorer,
    problem: str,
    steps: Sequence[str],
    form: Format,
    *,
    beta: float = 10.0,
    p_min: float = 0.05,
    sigma: float | None = None,
    threshold: float | None = None,
    label: int | None = None,
    names: tuple[str, str | None] = ("model", None),
) -> dict:
    """What a view of the page shows, as a JSON-able dict: tokens with their candidates, values, and step scores.

    The candidates are those of the reference, which stands for the sampling policy: delta(v) = beta (log pi_phi(v) -
    log pi_ref(v)), advantage = delta / sigma. Without a reference they are the model's own, and delta(v) = beta
    decay^(t-1) log pi_phi(v). `sigma` is sigma_V of a training batch; None takes the spread of this answer's own
    values. With a value head, delta is beta times its output, which is the value itself: no candidates, no sigma.
    `threshold` (as `ipvrm processbench` reports it) gives `predicted`, the first step called wrong: from 0, -1 for
    none, None without a threshold. names: model, reference.
    """
    if sigma is not None and scorer.kind == "value":
        raise ValueError(f"sigma scales TD errors, and a value head gives values; got {sigma}")
    item = render(scorer.tokenizer, problem, steps, form)
    refuse_long("the text", item.end, length_limit(scorer.model, scorer.reference))
    answer = Answer(item.ids[: item.start], item.ids[item.start : item.end])
    scored = (_value if scorer.kind == "value" else _vocabulary)(scorer, answer, p_min, beta)
    delta_N = beta * scored.score_N
    sums_N = delta_N.cumsum()
    values_N = delta_N if scorer.kind == "value" else sums_N
    sums, counts = step_sums(scored.score_N, item.step_of[item.start : item.end], len(steps))
    scores = variants(sums, counts)
    tokens, texts = [], token_texts(item.text, item.offsets[item.start : item.end])
    for n, token in enumerate(answer.response_ids):
        tokens.append(
            {
                "text": texts[n],
                "step": item.step_of[item.start + n],
                "id": token,
                "ours": None if scored.ours_N is None else float(scored.ours_N[n]),
                "theirs": None if scored.theirs_N is None else float(scored.theirs_N[n]),
                "entropy": None if scored.entropy_N is None else float(scored.entropy_N[n]),
                "delta": float(delta_N[n]),
                "value": float(values_N[n]),
                "mean": float(sums_N[n] / (n + 1)),
                "candidates": scored.candidates[n],
            }
        )
    return {
        "model": names[0],
        "reference": names[1],
        "kind": scorer.kind,
        "decay": scorer.decay,
        "problem": problem,
        "tokens": tokens,
        "steps": [
            {name: values[k] for name, values in scores.items()} | {"tokens": counts[k]} for k in range(len(steps))
        ],
        "beta": beta,
        "p_min": p_min,
        "sigma": None if scorer.kind == "value" else _scale(values_N, sigma),
        "own_sigma": sigma is None,
        "threshold": threshold,
        "predicted": None if threshold is None else predict(scores["process"], threshold),
        "label": label,
    }


def _scale(values_N: np.ndarray, sigma: float | None) -> float:
    scale = float(values_N.std()) if sigma is None else sigma
    if not scale > 0:
        raise ValueError(
            f"sigma must be > 0; got {scale} (model and reference with the same weights give 0, and so does one token)"
        )
    return scale


def token_texts(text: str, offsets: Sequence[tuple[int, int]]) -> list[str]:
    """What each token adds to the text: of several tokens that are bytes of one character, the first shows it."""
    texts, shown = [], offsets[0][0]
    for first, end in offsets:
        texts.append(text[max(first, shown) : end])
        shown = max(shown, end)
    return texts


def _value(scorer: Scorer, answer: Answer, p_min: float, beta: float) -> Scored:
    score_N = token_scores(scorer, [answer], 1)[0].double().numpy()
    return Scored(score_N, [[] for _ in score_N])


def _vocabulary(scorer: Scorer, answer: Answer, p_min: float, beta: float) -> Scored:
    candidates, ours_NK = _candidates(scorer, answer, p_min)
    theirs_NK = candidates.logprobs_NS.cpu()
    scale_N1 = (scorer.decay ** torch.arange(len(ours_NK), dtype=torch.float64))[:, None]
    score_NK = scale_N1 * (ours_NK.double() - (0 if scorer.reference is None else theirs_NK.double()))
    rows = [
        _rows(scorer, candidates.ids_NS[n, 1:].tolist(), ours_NK[n, 1:], theirs_NK[n, 1:], beta * score_NK[n, 1:])
        for n in range(len(ours_NK))
    ]
    theirs_N = None if scorer.reference is None else theirs_NK[:, 0].double().numpy()
    entropy_N = candidates.entropy_N.double().cpu().numpy()
    return Scored(score_NK[:, 0].numpy(), rows, ours_NK[:, 0].double().numpy(), theirs_N, entropy_N)


def _candidates(scorer: Scorer, answer: Answer, p_min: float) -> tuple[Candidates, Tensor]:
    """(candidates of the reference or else of the model, the model's log-probs of the sampled token and of them)."""
    policy = scorer.model if scorer.reference is None else scorer.reference
    candidates = policy.candidates([answer], p_min)
    return candidates, scorer.model.slot_logprobs([answer], candidates.ids_NS).cpu()


def _rows(scorer: Scorer, ids: list[int], ours_K: Tensor, theirs_K: Tensor, delta_K: Tensor) -> list[dict]:
    """The candidates of one position, the most probable first."""
    used = [k for k, token in enumerate(ids) if token >= 0]
    return [
        {
            "id": ids[k],
            "text": scorer.tokenizer.decode([ids[k]]),
            "ours": float(ours_K[k]),
            "theirs": None if scorer.reference is None else float(theirs_K[k]),
            "delta": float(delta_K[k]),
        }
        for k in sorted(used, key=lambda k: -float(theirs_K[k]))
    ]
