"""Evaluation of every finished model of a run; one JSON file a model, so that it can stop and go on."""

import json
from pathlib import Path

from tqdm import tqdm

from ipvrm_core.trainer.evaluation.accuracy import benchmark_accuracy, policy_accuracy
from ipvrm_core.trainer.evaluation.candidate_credit import candidate_credit
from ipvrm_core.trainer.evaluation.localisation import best_f1, f1_at
from ipvrm_core.trainer.evaluation.log_ratios import Pair
from ipvrm_core.trainer.evaluation.rank_analysis import continued_prefixes, rank_auc
from ipvrm_core.trainer.evaluation.step_scores import PROTOCOLS, score_traces
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.files import write_json
from ipvrm_core.trainer.phases.rollout import generation_settings
from ipvrm_core.trainer.phases.training import phase_folder
from ipvrm_core.trainer.reward import needs_reference
from ipvrm_core.trainer.rollouts import generate

FORMATS = ("train", "terse")


def run(experiment: Experiment, resume: bool = False) -> None:
    """Writes eval/policy-<name>.json, eval/rm-<name>.json, eval/rank-<name>.json and eval/results.json."""
    folder = experiment.run / "eval"
    with phase_folder(folder, "results.json", resume) as todo:
        if not todo:
            return
        policies = {"start": None, **{name: experiment.run / "rl" / name / "model" for name in experiment.config.rl}}
        jobs = [(f"policy-{name}.json", _policy, path) for name, path in policies.items()]
        if experiment.task:
            jobs += [
                (f"rm-{name}.json", _reward_model, experiment.run / "rm" / name / "model")
                for name in experiment.config.rm
            ]
        if experiment.config.eval.rank_prompts:
            jobs += [
                (f"rank-{name}.json", _rank, experiment.run / "rm" / name / "model")
                for name, settings in experiment.config.rm.items()
                if needs_reference(settings.build())
            ]
        results = {}
        for name, job, path in tqdm(jobs, desc="eval", disable=None):
            target = folder / name
            if not target.exists():
                experiment.seed("eval", name)
                write_json(target, job(experiment, path))
            results[target.stem] = json.loads(target.read_text())
            tqdm.write(f"eval {target.stem}: {json.dumps(_short(results[target.stem]))}")
        write_json(folder / "results.json", results)


def _policy(experiment: Experiment, path: Path | None) -> dict:
    model = experiment.start_policy() if path is None else experiment.load(path)
    result = policy_accuracy(experiment, model.eval(), experiment.test_examples(experiment.config.eval.prompts))
    if experiment.config.eval.benchmarks:
        result["benchmarks"] = benchmark_accuracy(experiment, model)
    return result


def _reward_model(experiment: Experiment, path: Path) -> dict:
    """Step localisation in both formats and candidate credit on the starting policy's own answers."""
    reward_model, reference = experiment.load(path).eval(), experiment.start_policy().eval()
    objective = experiment.config.rm[path.parent.name].build()
    settings = experiment.config.eval
    result: dict = {"localisation": {}}
    scores, labels = {}, []
    for style in FORMATS:
        traces = experiment.task.labelled_traces(experiment.config.seed + 1, settings.traces, style)
        labels = [trace.label for trace in traces]  # the same in both styles: only the format differs
        scores[style] = score_traces(experiment, reward_model, reference, traces, objective)
    for protocol in PROTOCOLS:
        tuned = best_f1(scores["train"][protocol], labels)
        for style in FORMATS:
            oracle = best_f1(scores[style][protocol], labels)
            transferred = f1_at(scores[style][protocol], labels, tuned.threshold)
            result["localisation"][f"{style}/{protocol}"] = {
                "f1_oracle": oracle.f1,
                "f1_transferred": transferred.f1,
                "accuracy_erroneous": oracle.accuracy_erroneous,
                "accuracy_correct": oracle.accuracy_correct,
            }
    experiment.seed("eval", "candidate_credit")  # the same answers for every reward model
    examples = experiment.test_examples(settings.prompts)
    prompts = [experiment.encode_prompt(example) for example in examples]
    samples = generate(reference, experiment.tokenizer, prompts, **generation_settings(experiment))
    scored = {} if objective.head == "value" else {"reward_model": reward_model}  # no candidates' scores there
    result["candidate_credit"] = candidate_credit(
        experiment, reference, scored, examples, samples, reference=objective.reference
    )
    return result


def _rank(experiment: Experiment, path: Path) -> dict:
    """AUCs of the reward model's values and TD errors against how the starting policy's answers go on."""
    policy = experiment.start_policy().eval()
    pair = Pair(experiment.tokenizer, experiment.load(path).eval(), policy)
    experiment.seed("eval", "rank")  # the same answers for every reward model
    examples = experiment.test_examples(experiment.config.eval.rank_prompts)
    beta, samples = experiment.config.rm[path.parent.name].build().beta, experiment.config.eval.samples
    return rank_auc(continued_prefixes(experiment, policy, pair, examples, beta=beta, samples=samples))


def _short(result: dict) -> dict:
    if "localisation" in result:
        shown = {key: round(value["f1_oracle"], 3) for key, value in result["localisation"].items()}
        return {**shown, **{key: round(value, 3) for key, value in result["candidate_credit"].items()}}
    average = {f"mean {key}": value for key, value in result.get("benchmarks", {}).get("average", {}).items()}
    flat = {key: value for key, value in {**result, **average}.items() if key != "benchmarks" and value is not None}
    return {key: round(value, 3) for key, value in flat.items()}
