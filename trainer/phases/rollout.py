"""Answers sampled from the starting policy, verified, with their reference log-probs: data for reward models."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from ipvrm_core import linear_logprobs
from ipvrm_core.trainer.batching import Answer, map_rows
from ipvrm_core.trainer.data.example import Example
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.files import write_json
from ipvrm_core.trainer.metrics import MetricsLog, read_metrics
from ipvrm_core.trainer.models import head_of
from ipvrm_core.trainer.phases.training import phase_folder
from ipvrm_core.trainer.rollouts import Sample, generate
from ipvrm_core.trainer.shards import Shards
from ipvrm_core.trainer.verify import Verdict
from ipvrm_core.trainer.verify.base import UNDECIDED, Status, all_decided


@dataclass(frozen=True)
class Rollouts:
    """All samples of one prompt, each with a verdict."""

    prompt: int
    answers: list[Answer]
    correct: list[bool]
    ref_logprobs: list[list[float]]  # of the sampled tokens under the starting policy, at the sampling temperature


def sample_and_verify(
    experiment: Experiment, model, examples: Sequence[Example], samples: int, **settings
) -> tuple[list[Sample], list[Verdict]]:
    """`samples` answers per example and their verdicts, in the order of `generate`."""
    prompts = [experiment.encode_prompt(example) for example in examples]
    made = generate(model, experiment.tokenizer, prompts, samples=samples, **settings)
    golds = [example.answer for example in examples for _ in range(samples)]
    return made, judged(experiment, made, [experiment.decode(sample.response_ids) for sample in made], golds)


def judged(experiment: Experiment, samples: Sequence[Sample], texts: list[str], golds: list[str]) -> list[Verdict]:
    """A verdict on every sample; one cut at the limit of tokens is not looked at where that is wrong in any case."""
    seen = [index for index, sample in enumerate(samples) if sample.finished or experiment.unfinished == "judge"]
    verdicts = [Verdict(False, "unfinished")] * len(samples)
    found = experiment.verifier([texts[i] for i in seen], [golds[i] for i in seen])
    for index, verdict in zip(seen, found, strict=True):
        verdicts[index] = verdict
    return verdicts


def right_share(verdicts: Sequence[Verdict]) -> float:
    """Of those that say anything; 0 where none does."""
    decided = [verdict.correct for verdict in verdicts if verdict.decided]
    return sum(decided) / max(1, len(decided))


def generation_settings(experiment: Experiment) -> dict:
    generation = experiment.config.generation
    return {
        "temperature": generation.temperature,
        "max_new_tokens": generation.max_new_tokens,
        "batch": generation.batch,
    }


def run(experiment: Experiment, resume: bool = False) -> None:
    """Sample shard by shard; writes rollout/shards/*.json and their manifest, a line for each in metrics.jsonl, and
    summary.json."""
    config, rollout = experiment.config, experiment.config.rollout
    if rollout is None:
        raise ValueError("the configuration has no [rollout] section")
    folder = experiment.run / "rollout"
    with phase_folder(folder, "summary.json", resume) as todo:
        if not todo:
            return
        model = experiment.start_policy().eval()
        head = head_of(model)
        temperature = config.generation.temperature
        shards = Shards(folder)

        def reference(hidden, batch, _):
            ids = batch.targets_N[:, None]
            found = linear_logprobs(hidden, head.weight, ids, temperature=temperature, **head.options)
            return (found.logprobs_NK[:, 0],)

        starts = range(0, rollout.prompts, rollout.batch)
        done = shards.whole()
        with MetricsLog(folder, "rollout", len(starts), done, show=("accuracy", "tokens")) as metrics:
            for number, start in list(enumerate(starts))[done:]:
                experiment.seed("rollout", number)
                examples = experiment.examples("rollout", start, min(rollout.batch, rollout.prompts - start))
                samples, verdicts = sample_and_verify(
                    experiment, model, examples, rollout.samples, **generation_settings(experiment)
                )
                answers = [Answer(sample.prompt_ids, sample.response_ids) for sample in samples]
                logprobs_N = map_rows(model, answers, config.micro_batch_tokens, reference)[0]
                lengths = [len(answer.response_ids) for answer in answers]
                rows = [
                    {
                        "prompt": start + index // rollout.samples,
                        "prompt_ids": answer.prompt_ids,
                        "response_ids": answer.response_ids,
                        "ref_logprobs": values.tolist(),
                        "correct": verdict.correct,
                        "status": verdict.status,
                        "finished": sample.finished,
                    }
                    for index, (answer, values, verdict, sample) in enumerate(
                        zip(answers, logprobs_N.split(lengths), verdicts, samples, strict=True)
                    )
                ]
                # The line goes first: without its shard it is dropped when the phase goes on, and both are made again.
                metrics.log(number + 1, accuracy=right_share(verdicts), answers=len(rows), tokens=sum(lengths))
                shards.add(number, rows)
        write_json(folder / "summary.json", {**summarize(shards.rows()), **cost(read_metrics(metrics.path))})


def summarize(rows: Iterable[dict]) -> dict:
    rows = list(rows)
    verdicts = [Verdict(row["correct"], row["status"]) for row in rows]
    groups: dict[int, list[Verdict]] = {}
    for row, verdict in zip(rows, verdicts, strict=True):
        groups.setdefault(row["prompt"], []).append(verdict)
    kept = [[verdict.correct for verdict in group] for group in groups.values() if all_decided(group)]
    return {
        "prompts": len(groups),
        "unjudged_prompts": len(groups) - len(kept),
        "answers": len(rows),
        "accuracy": right_share(verdicts),
        "mixed_prompts": sum(0 < sum(group) < len(group) for group in kept) / max(1, len(kept)),
        "finished": sum(row["finished"] for row in rows) / len(rows),
        **{f"verdict_{name}": sum(row["status"] == name for row in rows) for name in get_args(Status)},
    }


def cost(lines: list[dict]) -> dict[str, float]:
    """Of sampling, verifying and reference log-probs together, over all shards."""
    seconds, tokens = (sum(line[name] for line in lines) for name in ("seconds", "tokens"))
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_memory_mb": max(line["peak_memory_mb"] for line in lines),
    }


def read(folder: Path) -> list[Rollouts]:
    """The rollouts in prompt order; a prompt with an answer that has no verdict is left out.

    FileNotFoundError when the phase has not finished; ValueError for damaged ones.
    """
    if not (folder / "summary.json").exists():
        raise FileNotFoundError(f"{folder} has no finished rollouts: run `ipvrm rollout` first")
    groups: dict[int, Rollouts] = {}
    unjudged = set()
    try:
        rows = list(Shards(folder).rows())
    except (OSError, ValueError) as error:
        advice = f"delete {folder / 'summary.json'}, and `ipvrm rollout --resume` samples it again"
        raise ValueError(f"{error}; put it back, or {advice}") from None
    for row in rows:
        group = groups.setdefault(row["prompt"], Rollouts(row["prompt"], [], [], []))
        group.answers.append(Answer(row["prompt_ids"], row["response_ids"]))
        group.correct.append(row["correct"])
        group.ref_logprobs.append(row["ref_logprobs"])
        if row["status"] in UNDECIDED:
            unjudged.add(row["prompt"])
    return [groups[prompt] for prompt in sorted(groups.keys() - unjudged)]
