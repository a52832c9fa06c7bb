"""The generated tasks by name."""

from dataclasses import fields

from ipvrm_core.trainer.data.tasks.base import DueStep, LabelledTrace, StepCheck, Task, Walk
from ipvrm_core.trainer.data.tasks.chain import ChainTask
from ipvrm_core.trainer.data.tasks.let_graph import LetGraphTask

__all__ = ["TASKS", "ChainTask", "DueStep", "LabelledTrace", "LetGraphTask", "StepCheck", "Task", "Walk", "make_task"]

TASKS: dict[str, type[Task]] = {task.name: task for task in (ChainTask, LetGraphTask)}


def make_task(name: str, **difficulty: int) -> Task:
    """The task called `name`; difficulty parameters not given keep the task's defaults."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; expected one of {sorted(TASKS)}")
    known = [f.name for f in fields(TASKS[name])]
    unknown = sorted(set(difficulty) - set(known))
    if unknown:
        raise ValueError(f"task {name!r} has no parameter {unknown}; expected some of {known}")
    return TASKS[name](**difficulty)
