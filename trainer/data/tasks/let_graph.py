"""Task "let_graph": definitions in shuffled order, modulo 10; find what the queried variable needs and evaluate it.

prompt   j=f+l;k=3;b=l+f;l=1;f=l-k;b?
train    k=3;l=1;f=l-k=1-3=8;b=l+f=1+8=9;#9
terse    k=3;l=1;f=1-3=8;b=1+8=9;#9         (the symbolic part is not restated)
"""

import random
import re
import string
from dataclasses import dataclass
from typing import ClassVar

from ipvrm_core.trainer.data.tasks.base import DIGITS, DueStep, Task, Walk, check_range, check_style

CONSTANTS = 2
"""How many variables of a problem are given as digits; the others combine two variables defined before them."""

_PROMPT = re.compile(r"((?:[a-z]=(?:[0-9]|[a-z][-+][a-z]);)+)([a-z])\?")


class LetGraphWalk(Walk):
    """State: the value stated for each variable so far.

    Any order is right in which operands come before their use, and variables the query does not need may be evaluated;
    to state a variable twice is an error.
    """

    def __init__(self, prompt: str, style: str) -> None:
        check_style(style)
        match = _PROMPT.fullmatch(prompt) if isinstance(prompt, str) else None
        if match is None:
            raise ValueError(f"expected a let_graph prompt such as 'b=l+k;k=3;l=1;b?'; got {prompt!r}")
        self.query = match[2]
        lines = [line.split("=") for line in match[1].rstrip(";").split(";")]
        self.definitions = dict(lines)
        if len(self.definitions) < len(lines):
            raise ValueError(f"let_graph prompt defines a variable twice: {prompt!r}")
        self.needed = _needed(self.definitions, self.query)
        self.values: dict[str, int] = {}
        self.terse = style == "terse"

    def due(self, written: str) -> DueStep | None:
        name = written[:1]
        if self.finished:
            return None
        if name == "#":
            return DueStep(f"#{self.values[self.query]}", (1,)) if self.query in self.values else None
        return self._step(name) if self._ready(name) else None

    def next_due(self) -> DueStep:
        """The first definition in prompt order that is needed and can be evaluated now; else the final answer."""
        if self.query in self.values:
            return DueStep(f"#{self.values[self.query]}", (1,))
        return self._step(next(name for name in self.definitions if name in self.needed and self._ready(name)))

    def state(self, step: str) -> None:
        if step[0] == "#":
            self.finished = True
        else:
            self.values[step[0]] = int(step[-2])

    def _ready(self, name: str) -> bool:
        if name not in self.definitions or name in self.values:
            return False
        return all(operand in self.values for operand in _operands(self.definitions[name]))

    def _step(self, name: str) -> DueStep:
        definition = self.definitions[name]
        if definition in DIGITS:
            return DueStep(f"{name}={definition};", (2,))
        left, operator, right = definition
        a, b = self.values[left], self.values[right]
        result = (a + b if operator == "+" else a - b) % 10
        head = f"{name}=" if self.terse else f"{name}={definition}="
        return DueStep(f"{head}{a}{operator}{b}={result};", tuple(len(head) + at for at in (0, 2, 4)))


@dataclass(frozen=True)
class LetGraphTask(Task):
    """Problems of min_vars to max_vars variables, their number drawn uniformly."""

    name: ClassVar[str] = "let_graph"
    alphabet: ClassVar[str] = DIGITS + string.ascii_lowercase + "+-=;#?"

    min_vars: int = 4
    max_vars: int = 6

    def __post_init__(self) -> None:
        check_range(
            "min_vars", self.min_vars, "max_vars", self.max_vars, CONSTANTS + 1, most=len(string.ascii_lowercase)
        )

    def draw_prompt(self, rng: random.Random) -> str:
        names = rng.sample(string.ascii_lowercase, rng.randint(self.min_vars, self.max_vars))
        lines = [f"{name}={rng.choice(DIGITS)};" for name in names[:CONSTANTS]]
        for at in range(CONSTANTS, len(names)):
            left, right = rng.sample(names[:at], 2)
            lines.append(f"{names[at]}={left}{rng.choice('+-')}{right};")
        rng.shuffle(lines)
        # The variable defined last is used by no other, so the query is never a step on the way to another.
        return "".join(lines) + names[-1] + "?"

    def walk(self, prompt: str, style: str = "train") -> LetGraphWalk:
        return LetGraphWalk(prompt, style)


def _operands(definition: str) -> list[str]:
    return [character for character in definition if character.isalpha()]


def _needed(definitions: dict[str, str], query: str) -> set[str]:
    """The query and everything it is made of. ValueError for a variable that is undefined or defined by itself."""
    needed: set[str] = set()

    def visit(name: str, path: str) -> None:
        if name not in definitions:
            raise ValueError(f"let_graph prompt uses variable {name!r} without a definition")
        if name in path:
            raise ValueError(f"let_graph prompt defines variable {name!r} by itself")
        if name not in needed:
            for operand in _operands(definitions[name]):
                visit(operand, path + name)
            needed.add(name)

    visit(query, "")
    return needed
