"""Answers of any policy to any problems, sampled and judged part by part, so that a killed command can go on.

PARTS/origin.json says how they are made; PARTS/00000.json ... hold one part each: {"seconds", "peak_memory_mb",
"rows"}, one row an answer: group, problem, prompt, text, answer (as the verifier read it, None: not found), correct,
status, finished, tokens, greedy.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ipvrm_core.trainer.data.example import Example
from ipvrm_core.trainer.evaluation.policy.accuracy import Judged, accuracy, average
from ipvrm_core.trainer.files import locked, write_json
from ipvrm_core.trainer.metrics import peak_memory_mb
from ipvrm_core.trainer.progress import progress
from ipvrm_core.trainer.sampling.base import Drawing, Sampler
from ipvrm_core.trainer.sampling.verified import Asker
from ipvrm_core.trainer.seeds import stable_seed


@dataclass(frozen=True)
class Sampling:
    """One greedy answer a problem and `samples` drawn ones; `batch` sequences at once, `batch` problems a part."""

    samples: int = 8
    temperature: float = 0.6
    top_p: float = 0.95
    max_new_tokens: int = 1024
    batch: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1; got {getattr(self, name)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0 (the greedy answer comes by itself); got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1]; got {self.top_p}")

    @property
    def greedy(self) -> Drawing:
        return Drawing(1, 0.0, max_new_tokens=self.max_new_tokens)

    @property
    def drawing(self) -> Drawing:
        return Drawing(self.samples, self.temperature, self.top_p, self.max_new_tokens)


def sample_parts(
    parts: Path,
    asker: Asker,
    sampler: Sampler,
    groups: Mapping[str, Sequence[Example]],
    sampling: Sampling,
    origin: dict,
    positions: int | None = None,
) -> list[dict]:
    """All parts, those of an earlier call as they are. ValueError when that call had another `origin`.

    A part's answers depend on the seed and its number alone, so that a stopped run ends as an uninterrupted one.
    """
    asked = [(group, example) for group, examples in groups.items() for example in examples]
    _check_length(asker, positions, [example for _, example in asked], sampling.max_new_tokens)
    with locked(parts):
        kept = parts / "origin.json"
        if kept.exists() and json.loads(kept.read_text()) != json.loads(json.dumps(origin)):
            raise ValueError(f"{parts} holds answers made in another way; remove it, or take another --out")
        write_json(kept, origin)
        for number, start in enumerate(progress(range(0, len(asked), sampling.batch), "accuracy", "part")):
            path = parts / f"{number:05d}.json"
            if not path.exists():
                torch.manual_seed(stable_seed(sampling.seed, "accuracy", number))
                write_json(path, _part(asker, sampler, asked[start : start + sampling.batch], sampling))
        return [json.loads(path.read_text()) for path in sorted(parts.glob("[0-9]*.json"))]


def _check_length(asker: Asker, limit: int | None, examples: Sequence[Example], new_tokens: int) -> None:
    tokens, longest = max((len(asker.text.prompt_ids(example)), example.id) for example in examples)
    if limit and tokens + new_tokens > limit:
        raise ValueError(
            f"the prompt of {longest} has {tokens} tokens; with max_new_tokens = {new_tokens} that is more than the "
            f"{limit} that the model has positions for"
        )


def _part(asker: Asker, sampler: Sampler, asked: Sequence[tuple[str, Example]], sampling: Sampling) -> dict:
    began = time.perf_counter()
    examples = [example for _, example in asked]
    rows = []
    for greedy, drawing in ((True, sampling.greedy), (False, sampling.drawing)):
        samples, verdicts = asker.ask(sampler, examples, drawing)
        repeated = [pair for pair in asked for _ in range(drawing.samples)]
        rows += [
            {
                "group": group,
                "problem": example.id,
                "prompt": prompt_text(example),
                "text": asker.text.decode(sample.response_ids),
                "answer": verdict.extracted,
                "correct": verdict.correct,
                "status": verdict.status,
                "finished": sample.finished,
                "tokens": len(sample.response_ids),
                "greedy": greedy,
            }
            for (group, example), sample, verdict in zip(repeated, samples, verdicts, strict=True)
        ]
    return {"seconds": time.perf_counter() - began, "peak_memory_mb": peak_memory_mb(), "rows": rows}


def prompt_text(example: Example) -> str | list[dict]:
    """The user's one message, or all messages of a longer chat."""
    if isinstance(example.prompt, str):
        return example.prompt
    alone = len(example.prompt) == 1 and example.prompt[0]["role"] == "user"
    return example.prompt[0]["content"] if alone else list(example.prompt)


def summarise(parts: Sequence[dict], samples: int) -> dict:
    """{"benchmarks": {group: shares}, "average" over several groups, "seconds", "tokens_per_second", "peak_memory_mb"}.

    pass@n for the powers of two up to `samples`.
    """
    rows = [row for part in parts for row in part["rows"]]
    sizes = [2**power for power in range(1, samples.bit_length()) if 2**power < samples]
    found = {}
    for group in dict.fromkeys(row["group"] for row in rows):
        greedy, drawn = (
            [_judged(row) for row in rows if row["group"] == group and row["greedy"] == kind] for kind in (True, False)
        )
        found[group] = accuracy(greedy, drawn, samples, sizes)
    seconds = sum(part["seconds"] for part in parts)
    return {
        "benchmarks": found,
        **({"average": average(found)} if len(found) > 1 else {}),
        "seconds": seconds,
        "tokens_per_second": sum(row["tokens"] for row in rows) / seconds,
        "peak_memory_mb": max(part["peak_memory_mb"] for part in parts),
    }


def _judged(row: dict) -> Judged:
    return Judged(row["correct"], row["status"] not in ("timeout", "error"), row["tokens"], row["finished"])


def stored_rows(parts: Sequence[dict]) -> list[dict]:
    """The drawn answers as `ipvrm best-of-n` reads them: one a row, columns problem, answer, correct, prompt, text."""
    drawn = (row for part in parts for row in part["rows"] if not row["greedy"])
    return [{key: value for key, value in row.items() if key != "greedy"} for row in drawn]


def markdown(result: dict) -> str:
    names = list(next(iter(result["benchmarks"].values())))
    shares = [name for name in names if name.startswith(("greedy", "avg@", "pass@"))]
    lines = ["| set | problems | " + " | ".join(shares) + " | tokens | finished |"]
    lines.append("| --- |" + " --- |" * (len(shares) + 3))
    for group, row in result["benchmarks"].items():
        values = " | ".join(f"{100 * row[name]:.1f}" for name in shares)
        lines.append(
            f"| {group} | {row['prompts']} | {values} | {row['response_length']:.0f} | {100 * row['finished']:.0f} |"
        )
    if "average" in result:
        lines.append(
            "| average | | " + " | ".join(f"{100 * result['average'][name]:.1f}" for name in shares) + " | | |"
        )
    undecided = sum(row["undecided"] for row in result["benchmarks"].values())
    return "\n".join(
        [
            *lines,
            "",
            "Share of right answers in %; finished: answers that ended before the limit of tokens, in %. "
            f"Verdicts that did not come to an end: {undecided}.",
            f"{result['seconds']:.0f} s, {result['tokens_per_second']:.0f} tokens/s, "
            f"peak memory {result['peak_memory_mb']:.0f} MB",
        ]
    )
