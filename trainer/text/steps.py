"""Problem and steps as one text, tokenised once, and which token belongs to which step.

With a chat template the problem is the user's message and the joined steps are the assistant's. Without one the text is
    problem + plain_joiner + step + joiner + step ...
tokenised with the special tokens that the tokenizer itself adds in front.

A token belongs to the step of its last character, where the text between two steps closes the step before it. So a
token that reaches over a boundary counts for the later step, and no score of a step knows anything of the next one.
A token that reaches from the template into the first step counts for the first step. Lengths of separately tokenised
pieces, as in the authors' script, would not do: its boundaries lie inside the next step.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from ipvrm_core.trainer.text.template import render_chat


@dataclass(frozen=True)
class Format:
    """How problem and steps become text. `step` may use {number}, counted from 1."""

    step: str = "{step}"
    joiner: str = "\n\n"
    plain_joiner: str = "\n\n"
    system_prompt: str | None = None

    def __post_init__(self) -> None:
        if "{step}" not in self.step:
            raise ValueError(f"the step format must contain '{{step}}'; got {self.step!r}")

    def pieces(self, steps: Sequence[str]) -> list[str]:
        return [
            self.step.replace("{number}", str(number)).replace("{step}", step) for number, step in enumerate(steps, 1)
        ]


class Rendered(NamedTuple):
    """One tokenisation. step_of: of every token, -1 for problem and template."""

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]
    step_of: list[int]

    @property
    def start(self) -> int:
        """The first token of the answer."""
        return next(index for index, step in enumerate(self.step_of) if step >= 0)

    @property
    def end(self) -> int:
        """Behind the last token of the answer."""
        return len(self.step_of) - next(index for index, step in enumerate(reversed(self.step_of)) if step >= 0)


def render(tokenizer, problem: str, steps: Sequence[str], form: Format = Format(), where: str = "problem") -> Rendered:
    """ValueError, which names `where`, for an answer that the chat template alters or a step that leaves no text."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"step boundaries need a fast tokenizer (offsets); got {type(tokenizer).__name__}")
    pieces = form.pieces(steps)
    content = form.joiner.join(pieces)
    if tokenizer.chat_template:
        text = chat_text(tokenizer, problem, content, form.system_prompt, where)
        start, low, high = _locate(text, problem, content, where)
    else:
        if form.system_prompt:
            raise ValueError("a system prompt needs a tokenizer with a chat template")
        text = problem + form.plain_joiner + content
        start = low = len(text) - len(content)
        high = len(text)
    ends = list(accumulate(len(piece) + len(form.joiner) for piece in pieces))
    for number, (piece, end) in enumerate(zip(pieces, ends, strict=True)):
        first = start + end - len(form.joiner) - len(piece)
        if not text[max(first, low) : min(first + len(piece), high)].strip():
            raise ValueError(f"{where}: step {number} leaves no text in the rendered answer; got {piece!r}")
    encoded = tokenizer(text, add_special_tokens=not tokenizer.chat_template, return_offsets_mapping=True)
    offsets = [tuple(pair) for pair in encoded["offset_mapping"]]
    return Rendered(text, encoded["input_ids"], offsets, token_steps(offsets, [start + end for end in ends], low, high))


def token_steps(offsets: Sequence[tuple[int, int]], ends: Sequence[int], low: int, high: int) -> list[int]:
    """The step of every token by its last character, -1 outside [low, high). ends: where each step ends in the text."""
    found = []
    for first, end in offsets:
        last = min(max(end - 1, first), high - 1) if first < high else first  # a token may reach into the template
        found.append(min(bisect_right(ends, last), len(ends) - 1) if low <= last < high else -1)
    return found


def chat_text(tokenizer, problem: str, content: str, system_prompt: str | None, where: str) -> str:
    messages = [{"role": "user", "content": problem}, {"role": "assistant", "content": content}]
    if system_prompt:
        messages.insert(0, {"role": "system", "content": system_prompt})
    return render_chat(tokenizer, messages, where)


def _locate(text: str, problem: str, content: str, where: str) -> tuple[int, int, int]:
    """(where the unstripped content would start, where it is, where it ends); templates may strip both its ends."""
    stripped = content.strip()
    found, kept = text.rfind(content), content
    if found < 0:
        found, kept = text.rfind(stripped), stripped
    asked = text.find(problem.strip())
    if found < (asked + len(problem.strip()) if asked >= 0 else 0):
        raise ValueError(f"{where}: the chat template does not show the answer as it is: {stripped[:80]!r} ...")
    lead = 0 if kept is content else len(content) - len(content.lstrip())
    return found - lead, found, found + len(kept)
