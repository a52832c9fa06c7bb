"""How good a reward model of a run is: steps located, candidates credited, answers chosen."""

from collections.abc import Mapping

from ipvrm_core.objectives import Objective
from ipvrm_core.trainer.evaluation.reward_model.candidate_credit import candidate_credit
from ipvrm_core.trainer.evaluation.reward_model.localisation import best_f1, f1_at
from ipvrm_core.trainer.evaluation.reward_model.own_answers import OwnAnswers, as_traces, best_of_n
from ipvrm_core.trainer.evaluation.reward_model.step_scores import PROTOCOLS, score_traces
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.language_model import LanguageModel

STYLES = ("train", "terse", "sampled")


def judge(
    experiment: Experiment,
    reward_model: LanguageModel,
    reference: LanguageModel,
    objective: Objective,
    own: OwnAnswers,
    others: Mapping[str, OwnAnswers],
) -> dict:
    """{localisation, candidate_credit} where the task labels steps, {best_of_n} where eval.best_of_n asks for it.

    candidate_credit: on the start's answers, where the reference has several candidates. candidate_credit_start: where
    the start has, which stays as the policy learns. candidate_credit_<name>: on the answers of another policy, where
    that one has.
    """
    result: dict = {}
    if experiment.task:
        result["localisation"] = _localisation(experiment, reward_model, reference, objective, own)
        scored = {} if objective.head == "value" else {"reward_model": reward_model}  # no candidates' scores there
        against = objective.reference and reference
        places = {"": (reference, own), "_start": (own.policy, own)}
        places |= {f"_{name}": (answers.policy, answers) for name, answers in others.items()}
        for place, (policy, answers) in places.items():
            result[f"candidate_credit{place}"] = candidate_credit(
                experiment, policy, scored, answers.examples, answers.first, reference=against
            )
    if experiment.config.eval.best_of_n:
        result["best_of_n"] = best_of_n(experiment, reward_model, reference, objective, own)
    return result


def _localisation(experiment, reward_model, reference, objective, own) -> dict[str, dict[str, float]]:
    """{style/protocol: F1 and its accuracies}; the transferred threshold is the one tuned on the style "train".

    Styles: made errors in the format of the demonstrations (train) and in another (terse), and the starting policy's
    own answers (sampled), left out where none or all of them are wrong. Every cell says how many it had of both kinds.
    """
    count, seed = experiment.config.eval.traces, experiment.config.seed + 1
    traces = {style: experiment.task.labelled_traces(seed, count, style) for style in STYLES[:2]}
    traces["sampled"] = as_traces(experiment, own, count)
    labels = {style: [trace.label for trace in found] for style, found in traces.items()}
    if len({label >= 0 for label in labels["sampled"]}) < 2:
        del traces["sampled"]
    scores = {s: score_traces(experiment, reward_model, reference, found, objective) for s, found in traces.items()}
    result = {}
    for protocol in PROTOCOLS:
        tuned = best_f1(scores["train"][protocol], labels["train"])
        for style in traces:
            oracle = best_f1(scores[style][protocol], labels[style])
            transferred = f1_at(scores[style][protocol], labels[style], tuned.threshold)
            result[f"{style}/{protocol}"] = {
                "f1_oracle": oracle.f1,
                "f1_transferred": transferred.f1,
                "accuracy_erroneous": oracle.accuracy_erroneous,
                "accuracy_correct": oracle.accuracy_correct,
                "erroneous": sum(label >= 0 for label in labels[style]),
                "correct": sum(label < 0 for label in labels[style]),
            }
    return result
