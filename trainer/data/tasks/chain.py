"""Task "chain": operations modulo 10 applied from left to right, without precedence.

prompt   5*5-6-3?
train    5*5=5;5-6=9;9-3=6;#6
terse    5*5=5;-6=9;-3=6;#6      (the left operand is not restated)
"""

import random
import re
from dataclasses import dataclass
from typing import ClassVar

from ipvrm_core.trainer.data.tasks.base import DIGITS, DueStep, Task, Walk, check_range, check_style

OPERATORS = {
    "+": lambda a, b: (a + b) % 10,
    "-": lambda a, b: (a - b) % 10,
    "*": lambda a, b: (a * b) % 10,
}

_PROMPT = re.compile(r"[0-9](?:[-+*][0-9])+\?")


class ChainWalk(Walk):
    """State: the value stated last, and how many operations were applied."""

    def __init__(self, prompt: str, style: str) -> None:
        check_style(style)
        if not isinstance(prompt, str) or not _PROMPT.fullmatch(prompt):
            raise ValueError(f"expected a chain prompt such as '5*5-6-3?'; got {prompt!r}")
        self.value = int(prompt[0])
        self.operations = [(prompt[at], int(prompt[at + 1])) for at in range(1, len(prompt) - 1, 2)]
        self.done = 0
        self.terse = style == "terse"

    def due(self, written: str) -> DueStep | None:
        return None if self.finished else self.next_due()

    def next_due(self) -> DueStep:
        if self.done == len(self.operations):
            return DueStep(f"#{self.value}", (0, 1))
        return self._step(*self.operations[self.done])

    def state(self, step: str) -> None:
        if step[0] == "#":
            self.finished = True
        else:
            self.value = int(step[-2])
            self.done += 1

    def corrupted(self, due: DueStep, rng: random.Random) -> str:
        """One of: a wrong result, another operator, another right operand; the last two with their own right result."""
        kind = rng.choice(["result", "operator", "operand"])
        if kind == "result" or due.text[0] == "#":
            return super().corrupted(due, rng)
        operator, operand = self.operations[self.done]
        if kind == "operator":
            operator = rng.choice([other for other in OPERATORS if other != operator])
        else:
            operand = rng.choice([int(other) for other in DIGITS if int(other) != operand])
        return self._step(operator, operand).text

    def _step(self, operator: str, operand: int) -> DueStep:
        left = "" if self.terse and self.done > 0 else str(self.value)
        text = f"{left}{operator}{operand}={OPERATORS[operator](self.value, operand)};"
        return DueStep(text, tuple(range(len(text) - 1)))  # up to the result; the ";" adds nothing


@dataclass(frozen=True)
class ChainTask(Task):
    """Chains of min_ops to max_ops operations, their number drawn uniformly."""

    name: ClassVar[str] = "chain"
    alphabet: ClassVar[str] = DIGITS + "+-*=;#?"

    min_ops: int = 4
    max_ops: int = 8

    def __post_init__(self) -> None:
        check_range("min_ops", self.min_ops, "max_ops", self.max_ops, least=1)

    def draw_prompt(self, rng: random.Random) -> str:
        operations = rng.randint(self.min_ops, self.max_ops)
        body = "".join(rng.choice("+-*") + rng.choice(DIGITS) for _ in range(operations))
        return f"{rng.choice(DIGITS)}{body}?"

    def walk(self, prompt: str, style: str = "train") -> ChainWalk:
        return ChainWalk(prompt, style)
