"""What every generated task shares: reproducible examples, exact step labels, labelled traces.

A response is a sequence of steps, each closed by ";" except the last, "#" and the final digit. A step is right when it
applies the asked operation to the values STATED before it (right or wrong) and the arithmetic, modulo 10, holds.
Given what was stated, a right step can be written in one way only, so a task has only to say which (`Walk.due`);
everything else here follows from that.
"""

import hashlib
import random
import re
from abc import ABC, abstractmethod
from dataclasses import astuple, dataclass
from typing import ClassVar

from ipvrm_core.trainer.data.example import Example

DIGITS = "0123456789"
STYLES = ("train", "terse")
SPLITS = ("train", "test")
# One prompt in TEST_EVERY belongs to the test split.
TEST_EVERY = 5

_STEP = re.compile(r"[^;]*;|[^;]+")


@dataclass(frozen=True)
class StepCheck:
    """The steps of a response and where it goes wrong.

    steps        (start, end) character spans; they tile the response, a closing ";" belongs to its step.
    first_error  0-based index of the first step that is wrong or malformed; len(steps) when all written steps are
                 right but the trace stops before the final answer; -1 when it is right and complete.
    """

    steps: tuple[tuple[int, int], ...]
    first_error: int


@dataclass(frozen=True)
class LabelledTrace:
    """A trace whose first wrong step is known by construction, with the fields of a ProcessBench record.

    label is the 0-based index of the first wrong step, -1 for a trace without one. `"".join(steps)` is the response.
    """

    id: str
    prompt: str
    steps: tuple[str, ...]
    label: int
    final_answer_correct: bool


@dataclass(frozen=True)
class DueStep:
    """The one right way to write a step after what was stated before it.

    determined are the offsets in `text` of the characters that the prompt and the stated values determine (a task may
    leave some out, such as names that can come in any order); the last of them is the digit of the value that
    the step itself states.
    """

    text: str
    determined: tuple[int, ...]

    def stated_by(self, written: str) -> str | None:
        """The digit that `written` states in place of the due value; None if it differs anywhere else."""
        at = self.determined[-1]
        digit = written[at : at + 1]
        follows = digit != "" and digit in DIGITS and written == self.text[:at] + digit + self.text[at + 1 :]
        return digit if follows else None


class Walk(ABC):
    """Reads or writes one trace step by step, remembering the stated values."""

    finished: bool = False

    @abstractmethod
    def due(self, written: str) -> DueStep | None:
        """The right step that `written` sets out to be; None when no right step begins that way here."""

    @abstractmethod
    def next_due(self) -> DueStep:
        """The step that the reference solution writes here."""

    @abstractmethod
    def state(self, step: str) -> None:
        """Takes over the value stated by a well-formed step, right or wrong, and moves past it."""

    def corrupted(self, due: DueStep, rng: random.Random) -> str:
        """`due` with one error in it, still well-formed. Here: another digit as the stated value."""
        at = due.determined[-1]
        wrong = rng.choice([digit for digit in DIGITS if digit != due.text[at]])
        return due.text[:at] + wrong + due.text[at + 1 :]


@dataclass(frozen=True)
class Task(ABC):
    """A family of problems with exact step labels; the dataclass fields of a subclass are its difficulty."""

    name: ClassVar[str]
    alphabet: ClassVar[str]
    """All characters of prompts and of traces in any style; each is meant to be one token."""

    @abstractmethod
    def draw_prompt(self, rng: random.Random) -> str:
        """One problem, from either split."""

    @abstractmethod
    def walk(self, prompt: str, style: str = "train") -> Walk:
        """A walk at the start of a trace for `prompt`. ValueError if the prompt is not one of this task."""

    def example(self, seed: int, split: str, index: int) -> Example:
        """The problem at `index`, a function of the task's fields and the arguments alone.

        The split is a property of the prompt (`split_of`), so no test prompt occurs in train under any seed or index.
        """
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}; got {split!r}")
        rng = self._rng("example", seed, split, index)
        prompt = self.draw_prompt(rng)
        while self.split_of(prompt) != split:
            prompt = self.draw_prompt(rng)
        solution = "".join(self.solve(prompt))
        return Example(
            id=f"{self.name}-{split}-{seed}-{index}",
            prompt=prompt,
            answer=solution[-1],
            solution=solution,
            meta={"task": self.name, "split": split},
        )

    def examples(self, seed: int, split: str, start: int, count: int) -> list[Example]:
        """The problems at start, start + 1, ..., start + count - 1."""
        return [self.example(seed, split, index) for index in range(start, start + count)]

    def split_of(self, prompt: str) -> str:
        """The split a prompt belongs to, decided by a hash of its text."""
        return "test" if _stable_hash(self.name, prompt) % TEST_EVERY == 0 else "train"

    def solve(self, prompt: str, style: str = "train") -> list[str]:
        """The reference trace, step by step."""
        walk, steps = self.walk(prompt, style), []
        while not walk.finished:
            steps.append(walk.next_due().text)
            walk.state(steps[-1])
        return steps

    def answer_of(self, response: str) -> str | None:
        """The digit after the final "#"; None if there is no "#" or anything but one digit follows it."""
        _, mark, tail = response.rpartition("#")
        return tail if mark and len(tail) == 1 and tail in DIGITS else None

    def step_labels(self, example: Example, response: str, style: str = "train") -> StepCheck:
        """Which steps a response has and which is the first wrong one. Any string is accepted."""
        steps = tuple(match.span() for match in _STEP.finditer(response))
        walk = self.walk(example.prompt, style)
        for index, (start, end) in enumerate(steps):
            due = walk.due(response[start:end])
            if due is None or response[start:end] != due.text:
                return StepCheck(steps, index)
            walk.state(due.text)
        return StepCheck(steps, -1 if walk.finished else len(steps))

    def due_positions(self, example: Example, response: str, style: str = "train") -> list[tuple[int, str]]:
        """(index, character) for every place in the response where prompt and stated values determine the character.

        A wrong digit does not end the reading: what follows is judged by the value it states. The first step that is
        malformed or asks another operation does, since nothing is determined after it.
        """
        positions: list[tuple[int, str]] = []
        walk = self.walk(example.prompt, style)
        for match in _STEP.finditer(response):
            written, start = match.group(), match.start()
            due = walk.due(written)
            if due is None:
                break
            positions += [
                (start + at, due.text[at])
                for at in due.determined
                if at < len(written) and written[:at] == due.text[:at]
            ]
            if due.stated_by(written) is None:
                break
            walk.state(written)
        return positions

    def labelled_traces(
        self, seed: int, count: int, style: str, error_fraction: float = 0.5, split: str = "test"
    ) -> list[LabelledTrace]:
        """`count` traces, of which a share of about `error_fraction` has one error at a uniformly drawn step.

        After its error a trace carries on consistently from the wrong value; one that reaches the right answer all the
        same is kept. Problems and errors depend on the seed and not on the style, so two styles differ in format only.
        """
        if not 0 <= error_fraction <= 1:
            raise ValueError(f"error_fraction must be within [0, 1]; got {error_fraction}")
        return [self._labelled_trace(seed, split, index, style, error_fraction) for index in range(count)]

    def _labelled_trace(self, seed: int, split: str, index: int, style: str, error_fraction: float) -> LabelledTrace:
        example = self.example(seed, split, index)
        rng = self._rng("trace", seed, split, index)
        label = -1
        if rng.random() < error_fraction:
            label = rng.randrange(len(self.solve(example.prompt)))
        walk, steps = self.walk(example.prompt, style), []
        while not walk.finished:
            due = walk.next_due()
            steps.append(walk.corrupted(due, rng) if len(steps) == label else due.text)
            walk.state(steps[-1])
        return LabelledTrace(
            id=example.id,
            prompt=example.prompt,
            steps=tuple(steps),
            label=label,
            final_answer_correct=self.answer_of(steps[-1]) == example.answer,
        )

    def _rng(self, *key: object) -> random.Random:
        return random.Random(_stable_hash(self.name, *astuple(self), *key))


def check_style(style: str) -> None:
    """ValueError unless `style` is a known trace format."""
    if style not in STYLES:
        raise ValueError(f"style must be one of {STYLES}; got {style!r}")


def check_range(low_name: str, low: int, high_name: str, high: int, least: int, most: int | None = None) -> None:
    """ValueError unless least <= low <= high (<= most)."""
    if not least <= low <= high or (most is not None and high > most):
        bounds = f"{least} <= {low_name} <= {high_name}" + (f" <= {most}" if most is not None else "")
        raise ValueError(f"expected {bounds}; got {low_name}={low}, {high_name}={high}")


def _stable_hash(*key: object) -> int:
    # Python's own hash of a string changes from process to process.
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big")
