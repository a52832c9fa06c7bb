"""`ipvrm inspect`: one answer, token by token, under a reward model and its reference, as one HTML page.

Shape letters: N tokens of the answer, K candidates.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ipvrm_core import Candidates, linear_logprobs, select_candidates
from ipvrm_core.trainer.batching import Answer, map_rows
from ipvrm_core.trainer.evaluation.log_ratios import Pair
from ipvrm_core.trainer.evaluation.rendering import Format, render
from ipvrm_core.trainer.evaluation.step_scores import step_sums, variants
from ipvrm_core.trainer.files import write_text
from ipvrm_core.trainer.models import head_of


def inspect(
    pair: Pair,
    problem: str,
    steps: Sequence[str],
    form: Format,
    *,
    beta: float = 10.0,
    p_min: float = 0.05,
    sigma: float | None = None,
    threshold: float | None = None,
    label: int | None = None,
) -> dict:
    """What the page shows, as a JSON-able dict: tokens with their candidates, values, and step scores.

    The candidates are those of the reference, which stands for the sampling policy: delta(v) = beta (log pi_phi(v) -
    log pi_ref(v)), advantage = delta / sigma. `sigma` is sigma_V of a training batch; None takes the spread of this
    answer's own values. `threshold` (nats, as `ipvrm processbench` reports it) marks the predicted first wrong step.
    """
    item = render(pair.tokenizer, problem, steps, form)
    answer = Answer(item.ids[: item.start], item.ids[item.start : item.end])
    candidates, ours_NK = _candidates(pair, answer, p_min)
    ours_N, theirs_N = ours_NK[:, 0].double().numpy(), candidates.sampled_logprobs_N.double().cpu().numpy()
    q_N = ours_N - theirs_N
    values_N = beta * q_N.cumsum()
    scale = float(values_N.std()) if sigma is None else sigma
    if not scale > 0:
        raise ValueError(f"sigma must be > 0; got {scale} (model and reference with the same weights give 0)")
    sums, counts = step_sums(q_N, item.step_of[item.start : item.end], len(steps))
    scores = variants(sums, counts)
    tokens, texts = [], token_texts(item.text, item.offsets[item.start : item.end])
    for n, token in enumerate(answer.response_ids):
        tokens.append(
            {
                "text": texts[n],
                "step": item.step_of[item.start + n],
                "id": token,
                "ours": float(ours_N[n]),
                "theirs": float(theirs_N[n]),
                "delta": float(beta * q_N[n]),
                "value": float(values_N[n]),
                "mean": float(values_N[n] / (n + 1)),
                "candidates": _rows(pair.tokenizer, candidates, ours_NK[n, 1:], n, beta),
            }
        )
    return {
        "problem": problem,
        "tokens": tokens,
        "steps": [
            {name: values[k] for name, values in scores.items()} | {"tokens": counts[k]} for k in range(len(steps))
        ],
        "beta": beta,
        "p_min": p_min,
        "sigma": scale,
        "own_sigma": sigma is None,
        "threshold": threshold,
        "label": label,
    }


def token_texts(text: str, offsets: Sequence[tuple[int, int]]) -> list[str]:
    """What each token adds to the text: of several tokens that are bytes of one character, the first shows it."""
    texts, shown = [], offsets[0][0]
    for first, end in offsets:
        texts.append(text[max(first, shown) : end])
        shown = max(shown, end)
    return texts


def _candidates(pair: Pair, answer: Answer, p_min: float):
    """(candidates of the reference, the reward model's log-probs of the sampled token and of them [N, 1 + K])."""
    limit = len(answer.prompt_ids) + len(answer.response_ids)
    reference, model = head_of(pair.reference), head_of(pair.model)

    def choose(hidden, batch, _):
        return select_candidates(hidden, reference.weight, batch.targets_N, p_min, **reference.options)

    candidates = Candidates(*map_rows(pair.reference, [answer], limit, choose))

    def score(hidden, batch, _):
        ids_NK = torch.cat([batch.targets_N[:, None], candidates.ids_NK], dim=1)
        return (linear_logprobs(hidden, model.weight, ids_NK, **model.options).logprobs_NK,)

    return candidates, map_rows(pair.model, [answer], limit, score)[0].cpu()


def _rows(tokenizer, candidates, ours_K: torch.Tensor, n: int, beta: float) -> list[dict]:
    """The candidates of one position, the most probable first."""
    theirs_K, ids_K = candidates.logprobs_NK[n].cpu(), candidates.ids_NK[n].tolist()
    used = [k for k, token in enumerate(ids_K) if token >= 0]
    return [
        {
            "id": ids_K[k],
            "text": tokenizer.decode([ids_K[k]]),
            "ours": float(ours_K[k]),
            "theirs": float(theirs_K[k]),
            "delta": float(beta * (ours_K[k] - theirs_K[k])),
        }
        for k in sorted(used, key=lambda k: -float(theirs_K[k]))
    ]


def write_page(path: Path, shown: dict, title: str) -> None:
    """One file that needs nothing else."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    finite = [token["delta"] for token in shown["tokens"]]
    if not np.isfinite(finite).all():
        raise ValueError("a token has probability 0 under one of the models: its log-ratio is infinite")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, environment.get_template("inspect.html").render(title=title, shown=shown))
