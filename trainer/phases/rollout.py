"""Answers sampled from the starting policy, verified, with their reference log-probs: data for reward models."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from tqdm import tqdm

from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.evaluation.reward_model.own_answers import OwnAnswers
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.files import write_json
from ipvrm_core.trainer.metrics import MetricsLog, read_metrics
from ipvrm_core.trainer.phases.answers import show_answers
from ipvrm_core.trainer.phases.training import phase_folder
from ipvrm_core.trainer.sampling.verified import right_share
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


def run(experiment: Experiment, resume: bool = False) -> None:
    """Sample shard by shard; writes rollout/shards/*.json and their manifest, a line for each in metrics.jsonl, and
    summary.json; for a built-in task also pages of the first answers."""
    rollout = experiment.config.rollout
    if rollout is None:
        raise ValueError("the configuration has no [rollout] section")
    folder = experiment.run / "rollout"
    with phase_folder(folder, "summary.json", resume) as todo:
        if not todo:
            return
        policy = experiment.start_policy().eval()
        sampler, drawing = experiment.sampler(policy), experiment.drawing(rollout.samples)
        todo.callback(sampler.close)
        shards = Shards(folder)
        starts = range(0, rollout.prompts, rollout.batch)
        done = shards.whole()
        with MetricsLog(folder, "rollout", len(starts), done, show=("accuracy", "tokens")) as metrics:
            for number, start in list(enumerate(starts))[done:]:
                experiment.seed("rollout", number)
                examples = experiment.examples("rollout", start, min(rollout.batch, rollout.prompts - start))
                samples, verdicts = experiment.asker.ask(sampler, examples, drawing)
                answers = [Answer(sample.prompt_ids, sample.response_ids) for sample in samples]
                logprobs_N = policy.logprobs(answers)
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
                # The shard goes last: without it line and pages are made again when the phase goes on.
                metrics.log(number + 1, accuracy=right_share(verdicts), answers=len(rows), tokens=sum(lengths))
                if number == 0 and experiment.task:
                    own = OwnAnswers(policy, examples, rollout.samples, samples, verdicts, logprobs_N)
                    tqdm.write(f"answers token by token: {show_answers(experiment, own, folder / 'answers')}")
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
