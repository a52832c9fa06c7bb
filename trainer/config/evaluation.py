"""What is measured, who judges an answer, and what keeps training and evaluation apart."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ipvrm_core.trainer.config.base import Positive, PositiveFloat, Section
from ipvrm_core.trainer.config.data import Source


class Eval(Section):
    """What `ipvrm eval` measures."""

    prompts: Positive = Field(256, description="test problems that are answered, from the first")
    samples: Positive = Field(8, description="k of avg@k and pass@k")
    temperature: PositiveFloat = Field(0.6, description="of the k samples; one more answer is greedy")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(0.95, description="samples come from this much of the mass")
    benchmarks: dict[str, Source] = Field({}, description="further test data by name (paths), each evaluated whole")
    rank_prompts: Annotated[int, Field(ge=0)] = Field(
        0, description="answers that are cut and continued, to rank reward models by the outcomes; 0: none"
    )
    choice_prompts: Annotated[int, Field(ge=0)] = Field(
        0,
        description="answers of which every candidate of one position is continued, to see whose end right; 0: none",
    )
    best_of_n: list[Positive] = Field(
        [], description="N of best-of-N among the starting policy's answers, by every reward model; empty: none"
    )
    traces: Annotated[int, Field(ge=0)] = Field(1000, description="labelled traces per format, built-in tasks only")

    @model_validator(mode="after")
    def _benchmarks_are_files(self):
        tasks = [name for name, source in self.benchmarks.items() if source.task]
        if tasks:
            raise ValueError(f"benchmarks must have a path; got a task for {', '.join(tasks)}")
        return self


class Verifier(Section):
    """Who decides whether an answer is right."""

    kind: str = Field(
        "math",
        pattern=r"^(exact|math|boxed|[\w.]+:\w+)$",
        description="exact | math | boxed (math on the last \\boxed{} alone) | package.module:function (is imported)",
    )
    unfinished: Literal["judge", "wrong"] = Field(
        "judge", description="answers cut at max_new_tokens: judge them as they are, or count them wrong unseen"
    )
    max_errors: Annotated[float, Field(ge=0, le=1)] = Field(
        0.05, description="share of answers that may stay without a verdict (time-outs, errors) before a phase stops"
    )
    timeout_s: Annotated[PositiveFloat, Field(le=86400)] = Field(5.0, description="seconds for one answer")
    memory_gib: Annotated[PositiveFloat, Field(le=2**20)] = Field(
        2.0, description="what one worker may take besides its imports (Linux)"
    )
    workers: Annotated[Positive, Field(le=1024)] = Field(2, description="processes that judge")

    @property
    def limits(self) -> dict:
        """Of the worker processes."""
        return {name: getattr(self, name) for name in ("timeout_s", "memory_gib", "workers")}


class Leakage(Section):
    """What to do about evaluation problems in the training data; looked for before training starts."""

    action: Literal["refuse", "allow", "drop"] = Field(
        "refuse", description="allow: report them and go on; drop: leave them out of the training data"
    )
    benchmarks: list[Source] = Field([], description="evaluation data besides `test`; only its prompts are read")
