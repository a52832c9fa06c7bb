"""Evaluation of every finished model of a run; one JSON file a model, so that it can stop and go on."""

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from tqdm import tqdm

from ipvrm_core.trainer.evaluation.policy.accuracy import benchmark_accuracy, policy_accuracy
from ipvrm_core.trainer.evaluation.reward_model.choices import Choice, choice_credit, sample_choices, td_errors
from ipvrm_core.trainer.evaluation.reward_model.judge import judge
from ipvrm_core.trainer.evaluation.reward_model.own_answers import OwnAnswers, sample_own
from ipvrm_core.trainer.evaluation.reward_model.rank_analysis import continued_prefixes, rank_auc
from ipvrm_core.trainer.evaluation.token_scores import Scorer
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.files import read_json, write_json
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.metrics import MetricsLog
from ipvrm_core.trainer.phases.training import phase_folder
from ipvrm_core.trainer.reward import needs_reference

Answers = Callable[[], OwnAnswers]
Others = Callable[[], dict[str, OwnAnswers]]


def run(experiment: Experiment, resume: bool = False) -> None:
    """Writes eval/<kind>-<name>.json for every job of `_jobs`, eval/results.json with all, a line of metrics each."""
    folder, jobs = experiment.run / "eval", _jobs(experiment)
    whole = folder / "results.json"
    if resume and whole.exists() and not jobs.keys() <= read_json(whole).keys():
        whole.unlink()  # a measurement was asked for since
    with phase_folder(folder, whole.name, resume) as todo:
        if not todo:
            return
        results: dict[str, dict] = {}
        if not jobs:
            tqdm.write("eval: nothing to evaluate: the configuration has no [test]")
        files = {name: folder / f"{name}.json" for name in jobs}
        done = sum(file.exists() for file in files.values())  # not always the first ones
        with MetricsLog(folder, "eval", len(jobs), done) as metrics:
            for name, job in jobs.items():
                if not files[name].exists():
                    experiment.seed("eval", files[name].name)
                    result, done = job(), done + 1
                    metrics.log(done)  # its seconds; before the file, as after a kill both are made again
                    write_json(files[name], result)
                results[name] = read_json(files[name])
                tqdm.write(f"eval {name}: {json.dumps(_short(results[name]))}")
        write_json(whole, results)


def _jobs(experiment: Experiment) -> dict[str, Callable[[], dict]]:
    """policy-<name>; rm-<name> as trained offline; online-<policy run>, its reward model afterwards; rank-<name>;
    choices-rm-<name>, choices-online-<policy run>."""
    config, run = experiment.config, experiment.run
    jobs = {}
    if config.test:  # reward models on chats alone can do without
        jobs["policy-start"] = partial(_policy, experiment, None)
    jobs |= {f"policy-{name}": partial(_policy, experiment, run / "rl" / name / "model") for name in config.rl}
    updated = [name for name, rl in config.rl.items() if rl.reward_model and rl.reward_model.update != "none"]
    if experiment.task or config.eval.best_of_n:
        own = cache(lambda: sample_own(experiment, experiment.start_policy().eval()))  # made when first asked for
        others = cache(lambda: _without_reward_model(experiment))
        jobs |= {f"rm-{name}": partial(_offline, experiment, name, own, others) for name in config.rm}
        jobs |= {f"online-{name}": partial(_online, experiment, name, own, others) for name in updated}
    ratios = [name for name, settings in config.rm.items() if needs_reference(settings.build())]
    if config.eval.rank_prompts:
        jobs |= {f"rank-{name}": partial(_rank, experiment, run / "rm" / name / "model") for name in ratios}
    if config.eval.choice_prompts:
        first = cache(lambda: _choices(experiment, experiment.start_policy().eval()))
        jobs |= {f"choices-rm-{name}": partial(_offline_choices, experiment, name, first) for name in ratios}
        updated = [name for name in updated if config.rl[name].reward_model.name in ratios]
        jobs |= {f"choices-online-{name}": partial(_online_choices, experiment, name) for name in updated}
    return jobs


def _policy(experiment: Experiment, path: Path | None) -> dict:
    model = experiment.start_policy() if path is None else experiment.load(path)
    result = policy_accuracy(experiment, model.eval(), experiment.test_examples(experiment.config.eval.prompts))
    if experiment.config.eval.benchmarks:
        result["benchmarks"] = benchmark_accuracy(experiment, model)
    return result


def _without_reward_model(experiment: Experiment) -> dict[str, OwnAnswers]:
    """Answers of the first policy run that learns from outcomes alone (GRPO), whose positions owe nothing to credit."""
    names = experiment.config.outcomes_alone
    if not names or not experiment.task:
        return {}
    policy = experiment.load(experiment.run / "rl" / names[0] / "model").eval()
    return {names[0]: sample_own(experiment, policy)}


def _offline(experiment: Experiment, name: str, own: Answers, others: Others) -> dict:
    reward_model = experiment.load(experiment.run / "rm" / name / "model").eval()
    objective = experiment.config.rm[name].build()
    return judge(experiment, reward_model, own().policy, objective, own(), others())


def _online(experiment: Experiment, name: str, own: Answers, others: Others) -> dict:
    """Against what its last updates compared it with: the start, or the policy, of which the final one is at hand."""
    rl, folder = experiment.config.rl[name], experiment.run / "rl" / name
    fixed = rl.resolved().online_reference == "sft"
    reference = own().policy if fixed else experiment.load(folder / "model").eval()
    reward_model = experiment.load(folder / "reward_model").eval()
    objective = experiment.config.rm[rl.reward_model.name].build()
    return judge(experiment, reward_model, reference, objective, own(), others())


def _rank(experiment: Experiment, path: Path) -> dict:
    """AUCs of the reward model's values and TD errors against how the starting policy's answers go on."""
    policy = experiment.start_policy().eval()
    scorer = Scorer(experiment.text.tokenizer, experiment.load(path).eval(), policy)
    experiment.seed("eval", "rank")  # the same answers for every reward model
    examples = experiment.test_examples(experiment.config.eval.rank_prompts)
    beta, samples = experiment.config.rm[path.parent.name].build().beta, experiment.config.eval.samples
    return rank_auc(continued_prefixes(experiment, policy, scorer, examples, beta=beta, samples=samples))


def _choices(experiment: Experiment, policy: LanguageModel) -> tuple[LanguageModel, list[Choice]]:
    """The policy and what became of its choices."""
    settings = experiment.config.eval
    experiment.seed("eval", "choices")
    return policy, sample_choices(
        experiment, policy, experiment.test_examples(settings.choice_prompts), settings.samples
    )


def _offline_choices(
    experiment: Experiment, name: str, first: Callable[[], tuple[LanguageModel, list[Choice]]]
) -> dict:
    policy, choices = first()
    return _credit(experiment, experiment.run / "rm" / name / "model", name, policy, choices)


def _online_choices(experiment: Experiment, name: str) -> dict:
    """Of the trained policy, by its updated reward model against what its TD errors were differences to."""
    rl, folder = experiment.config.rl[name], experiment.run / "rl" / name
    policy, choices = _choices(experiment, experiment.load(folder / "model").eval())
    reference = experiment.start_policy().eval() if rl.resolved().td_reference == "sft" else policy
    return _credit(experiment, folder / "reward_model", rl.reward_model.name, reference, choices)


def _credit(experiment: Experiment, path: Path, name: str, reference: LanguageModel, choices: list[Choice]) -> dict:
    reward_model = experiment.load(path).eval()
    beta = experiment.config.rm[name].build().beta
    return choice_credit(choices, td_errors(choices, reward_model, reference, beta) if choices else [])


def _short(result: dict) -> dict:
    """The numbers of one line of the log."""
    shown: dict[str, float] = {key: cell["f1_oracle"] for key, cell in result.get("localisation", {}).items()}
    shown |= result.get("candidate_credit", {})
    shown |= {f"best of {n}": row["best:vbar"] for n, row in result.get("best_of_n", {}).items()}
    shown |= {f"mean {key}": value for key, value in result.get("benchmarks", {}).get("average", {}).items()}
    shown |= {key: value for key, value in result.items() if isinstance(value, int | float)}
    return {key: round(value, 3) for key, value in shown.items()}
