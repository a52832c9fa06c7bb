"""Judges a mathematical answer with math-verify. Runs in a worker process (pool.py): sympy can take for ever.

math-verify's own timeouts are alarm signals, which work in main threads only and cancel an outer alarm, so they are
off here and the pool's wall clock is the only one.
"""

import logging
import re
from fractions import Fraction
from functools import lru_cache

import math_verify

from ipvrm_core.trainer.verify.base import Verdict

MAX_CHARS = 4000
"""How many characters of a response are parsed, since the time for it grows with their number."""

# math-verify warns once a process that its timeouts are off, which is what we want.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_NUMBER = re.compile(r"[-+]?(?:\d{1,40}|\d{1,3}(?:,\d{3}){1,13})(?:\.\d{1,40})?")
_EQUALS = re.compile(r"(?<![\\<>!:])=|\\equiv")
# Commands that may stand in an expression of numbers alone.
_NUMERIC_COMMAND = re.compile(r"\\(?:(?:[dt]?frac|sqrt|pi|cdot|times|div|pm|left|right|q?quad)(?![A-Za-z])|[^A-Za-z])")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm)\{([^{}]*)\}")
_LETTER_OR_COMMAND = re.compile(r"[^\W\d_]|\\")


def judge(response: str, gold: str) -> Verdict:
    """The verdict on the last answer that the response states; a number equal to a numeric gold is right at once."""
    text = answer_window(response)
    boxed = last_boxed(text)
    if boxed is not None:
        if is_numeric_equation(boxed):
            return Verdict(False, "ok", boxed)
        value = number(boxed)
        if value is not None and value == number(gold):
            return Verdict(True, "ok", boxed)
    candidates = math_verify.parse(text, parsing_timeout=None, raise_on_error=True)
    if not candidates:
        return Verdict(False, "no_answer")
    # parse() puts the text that it matched last, after the expressions made of it.
    extracted = candidates[-1] if isinstance(candidates[-1], str) else boxed
    if extracted is not None and is_numeric_equation(extracted):
        return Verdict(False, "ok", extracted)
    return Verdict(_any_equal(parse_gold(gold), candidates), "ok", extracted)


def judge_boxed(response: str, gold: str) -> Verdict:
    r"""The verdict on the last \boxed{} alone: numbers on the way to an answer are none."""
    boxed = last_boxed(answer_window(response))
    return judge(f"\\boxed{{{boxed}}}", gold) if boxed else Verdict(False, "no_answer")


def equal(first: str, second: str) -> bool:
    """Whether two final answers are the same, in either order; an equation of numbers is like its own text alone."""
    if first == second or is_numeric_equation(first) or is_numeric_equation(second):
        return first == second
    if _words(first) or _words(second):  # for math-verify letters are factors in any order: "east" would be "seat"
        return _words(first) == _words(second)
    one, other = parse_gold(first), parse_gold(second)
    return _any_equal(one, list(other)) or _any_equal(other, list(one))


def _words(text: str) -> str | None:
    """An answer of letters alone, three or more, without its markup."""
    plain = _TEXT.sub(r"\1", text).strip("$ ").casefold()
    return plain if len(plain) > 2 and plain.replace(" ", "").isalpha() else None


def answer_window(response: str) -> str:
    r"""The last MAX_CHARS characters, or those from the last \boxed on where it lies before them.

    Responses that reach their answer and then ramble to the length limit are common early in training.
    """
    tail = max(0, len(response) - MAX_CHARS)
    boxed = response.rfind("\\boxed{")
    start = min(boxed, tail) if boxed >= 0 else tail
    return response[start : start + MAX_CHARS]


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} whose braces are balanced."""
    start = text.rfind("\\boxed{")
    while start >= 0:
        depth, body = 1, start + len("\\boxed{")
        for at in range(body, len(text)):
            depth += (text[at] == "{") - (text[at] == "}")
            if depth == 0:
                return text[body:at].strip()
        start = text.rfind("\\boxed{", 0, start)
    return None


def number(text: str) -> Fraction | None:
    """The value of a plain decimal number, "$1,000.50$" included; None for anything else."""
    plain = text.replace("\\$", "").replace("\\!", "").strip("$ \n")
    return Fraction(plain.replace(",", "")) if _NUMBER.fullmatch(plain) else None


def is_numeric_equation(text: str) -> bool:
    """Whether the text equates a number with a number, as "4=5" and "x=4=5" do; math-verify takes either for right."""
    sides = _EQUALS.split(text)
    return sum(not _LETTER_OR_COMMAND.search(_NUMERIC_COMMAND.sub(" ", side)) for side in sides) > 1


@lru_cache(maxsize=4096)
def parse_gold(gold: str) -> tuple:
    """The expressions of a gold answer, kept since a prompt's rollouts share one. ValueError if there is none."""
    expressions = math_verify.parse(f"\\boxed{{{gold}}}", parsing_timeout=None, raise_on_error=True)
    if not gold.strip() or not expressions:
        raise ValueError(f"gold answer {gold!r} cannot be parsed")
    return tuple(expressions)


def _any_equal(golds: tuple, candidates: list) -> bool:
    """Whether some pair is equal. A pair that cannot be compared counts as unequal only if another one is equal."""
    failure: Exception | None = None
    for gold in golds:
        for candidate in candidates:
            try:
                if math_verify.verify(gold, candidate, timeout_seconds=None, raise_on_error=True):
                    return True
            except Exception as error:
                failure = error
    if failure is not None:
        raise failure
    return False
