"""Pages of the start's first answers to a built-in task, token by token: something to look at early in a run."""

from pathlib import Path

from ipvrm_core.objectives.endorm import Endorm
from ipvrm_core.trainer.data.processbench import Problem
from ipvrm_core.trainer.evaluation.reward_model.inspection import inspect
from ipvrm_core.trainer.evaluation.reward_model.own_answers import OwnAnswers, as_traces
from ipvrm_core.trainer.evaluation.token_scores import Scorer
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.report.inspect_page import write_index, write_page
from ipvrm_core.trainer.text.steps import Format

SHOWN = 24


def show_answers(experiment: Experiment, own: OwnAnswers, folder: Path) -> Path:
    """folder/index.html: answers under the policy's own log-probs (there is no reward model yet), with its candidates
    and the first wrong step of each. Answers that break off before their last step are left out.
    """
    scorer = Scorer(experiment.text.tokenizer, own.policy, decay=Endorm().decay)
    rows = []
    for number, trace in enumerate(as_traces(experiment, own, SHOWN), 1):
        view = inspect(
            scorer,
            trace.prompt,
            trace.steps,
            Format(joiner="", plain_joiner=""),
            beta=1.0,
            label=trace.label,
            names=("the start's own log-probs", None),
        )
        name = f"{number:02}.html"
        write_page(folder / name, [view], trace.id, back="index.html")
        problem = Problem(
            "rollout", trace.id, "the start", trace.prompt, trace.steps, trace.label, trace.final_answer_correct
        )
        rows.append((name, problem, [view]))
    if rows:
        write_index(folder / "index.html", rows, f"{experiment.config.name}: answers of the start")
    return folder / "index.html"
