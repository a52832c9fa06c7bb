"""The examples of a Source of the configuration, and its groups."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ipvrm_core.trainer.data.example import Example
from ipvrm_core.trainer.data.files import load_examples

if TYPE_CHECKING:  # the configuration is made of what stands here
    from ipvrm_core.trainer.config import Source


def read_source(source: "Source") -> list[Example]:
    """All examples of a file or data set, at most `limit`, with a group column so many of each group."""
    column = source.group_column
    examples = load_examples(
        source.path,
        source.split,
        {
            "prompt": source.prompt_column,
            "answer": source.answer_column,
            **({"solution": source.solution_column} if source.solution_column else {}),
        },
        config=source.config,
        prompt_template=None if source.prompt_template == "{prompt}" else source.prompt_template,
        answer_pattern=source.answer_pattern,
        limit=None if column else source.limit,
        meta=[column] if column else [],
    )
    if column and source.limit:
        groups = by_group(source, "", examples).values()
        return [example for group in groups for example in group[: source.limit]]
    return examples


def by_group(source: "Source", name: str, examples: Sequence[Example]) -> dict[str, list[Example]]:
    """{"name": examples}, or with a group column {"name/group": its examples}, in the order of first appearance."""
    if not source.group_column:
        return {name: list(examples)}
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(f"{name}/{example.meta[source.group_column]}", []).append(example)
    return groups
