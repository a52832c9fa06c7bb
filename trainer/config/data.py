"""Where prompts, answers and chats come from."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ipvrm_core.trainer.config.base import Positive, Section
from ipvrm_core.trainer.data.files import SUFFIXES, compiled, data_suffix
from ipvrm_core.trainer.data.known_sets import KNOWN_SETS, preset_settings
from ipvrm_core.trainer.data.tasks import make_task


class Source(Section):
    """Prompts and answers: a built-in `task`, or a `path` (jsonl, json, parquet, or a Hugging Face data set)."""

    task: str | None = Field(None, description="chain | let_graph")
    task_args: dict[str, int] = Field({}, description="difficulty, e.g. {min_ops = 4, max_ops = 8}")
    path: str | None = Field(None, description="a file, or the name of a data set")
    config: str | None = Field(None, description="which configuration, for a data set by name")
    split: str | None = Field(None, description="which split, for a data set by name")
    preset: str | None = Field(
        None, description=f"columns and prompt of a known set ({', '.join(KNOWN_SETS)}); settings here go before it"
    )
    prompt_column: str | list[str] = Field("prompt", description="one column, or several to be joined")
    answer_column: str = Field("answer", description="the right answer, which the verifier compares with")
    solution_column: str | None = Field(None, description="a whole solution, to be learnt from")
    prompt_template: str = Field("{prompt}", description="text in which the prompt replaces {prompt}")
    answer_pattern: str | None = Field(None, description="regular expression; group 1 is the answer")
    group_column: str | None = Field(None, description="evaluate each value of this column apart (eval.benchmarks)")
    limit: Positive | None = Field(None, description="so many from the first, with group_column so many of each group")

    @model_validator(mode="before")
    @classmethod
    def _known_set(cls, values):
        if isinstance(values, dict) and values.get("preset") is not None:
            return {**preset_settings(values["preset"]), **values}
        return values

    @model_validator(mode="after")
    def _one_kind(self):
        if self.preset and self.task:
            raise ValueError(f"preset needs a path; got task={self.task!r}")
        if (self.task is None) == (self.path is None):
            raise ValueError(f"exactly one of task and path must be set; got task={self.task!r}, path={self.path!r}")
        if self.task:
            make_task(self.task, **self.task_args)  # raises for an unknown task or difficulty
        compiled(self.answer_pattern)
        return self


class Chats(Section):
    """Labelled or paired chats that a reward model trains on instead of the rollouts."""

    path: str = Field(description="jsonl, json, parquet, or a Hugging Face data set")
    kind: Literal["pointwise", "pairwise"] = Field(
        description="a row is one answer and its label, or a chosen and a rejected answer to one prompt"
    )
    config: str | None = Field(None, description="which configuration, for a data set by name")
    split: str | None = Field(None, description="which split, for a data set by name")
    conversation_column: str = Field("conversation", description="pointwise: messages, the answer last")
    label_column: str = Field("label", description="pointwise: 0 or 1")
    chosen_column: str = Field("chosen", description="pairwise: messages, the better answer last")
    rejected_column: str = Field("rejected", description="pairwise: the same messages, the worse answer last")
    limit: Positive | None = Field(None, description="read at most so many rows, from the first")
    max_tokens: Positive = Field(4096, description="of prompt and answer together")
    on_long: Literal["error", "drop", "truncate"] = Field(
        "error", description="what becomes of longer rows; those dropped or cut are counted in rm/<name>/data.json"
    )
    validation: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="share of the prompts whose answers are kept for validation, the same for every seed"
    )
    validation_path: str | None = Field(
        None, description="jsonl, json or parquet file of the same columns to validate on, instead of a share of `path`"
    )
    reference: str | None = Field(
        None, description="name or folder of another reference than the starting policy, of the same vocabulary"
    )
    cache: str | None = Field(None, description="folder for the reference's log-probs; None: RUN/cache")

    @model_validator(mode="after")
    def _one_validation(self):
        if self.validation_path is None:
            return self
        if self.validation and "validation" in self.model_fields_set:
            raise ValueError(
                "validation must be 0 or left out where validation_path is set, which is validated on whole; "
                f"got {self.validation}"
            )
        if data_suffix(self.validation_path) is None:
            raise ValueError(f"validation_path must be a {', '.join(SUFFIXES)} file; got {self.validation_path!r}")
        self.__dict__["validation"] = 0.0  # resolved: what config.json shows is what runs
        return self

    def of_validation(self) -> "Chats":
        """How `validation_path` is read: all of it, else as `path` is."""
        changes = {"path": self.validation_path, "validation_path": None, "config": None, "split": None, "limit": None}
        return self.model_copy(update=changes)

    @property
    def validates(self) -> bool:
        """Whether answers are held out or given for validation."""
        return bool(self.validation or self.validation_path)
