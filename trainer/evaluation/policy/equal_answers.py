"""Which final answers to a problem are one answer in different words: 0.5, 1/2 and \\frac12 have one vote together."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fractions import Fraction

from ipvrm_core.trainer.evaluation.policy.stored_answers import Stored
from ipvrm_core.trainer.verify import Verifier

EQUAL = "ipvrm_core.trainer.verify.math:equal"

_DECIMAL = re.compile(r"[-+]?(?:\d{1,40}|\d{1,3}(?:,\d{3}){1,13})?(?:\.\d{1,40})?")
_FRACTION = re.compile(r"([-+]?)(?:\\[dt]?frac(?:\{(\d{1,40})\}\{(\d{1,40})\}|(\d)(\d))|(\d{1,40})/(\d{1,40}))")


def math_equality(**settings) -> Verifier:
    """Calls `verify.math.equal` in worker processes; a comparison that does not come to an end finds no equality."""
    from ipvrm_core.trainer.verify.pool import PooledVerifier

    return PooledVerifier(EQUAL, **settings, max_errors=1.0)


def merge_equal(stored: Mapping[str, Stored], equal: Verifier) -> dict[str, Stored]:
    """The same answers, each replaced by the first of its problem that it equals.

    Plain numbers are compared here and exactly; anything else by `equal(ones, others)`, in rounds over all problems: in
    each the first answer not yet placed with the others. A problem of D different answers costs at most D (D - 1) / 2.
    """
    placed: dict[str, dict] = {name: {} for name in stored}  # answer or number -> the first that it equals
    open_ = {name: list(dict.fromkeys(map(_key, _given(item)))) for name, item in stored.items()}
    while open_ := {name: keys for name, keys in open_.items() if keys}:
        pairs = []
        for name, (first, *others) in open_.items():
            placed[name][first] = first
            pairs += [(name, first, other) for other in others if isinstance(first, str) or isinstance(other, str)]
        verdicts = equal([str(first) for _, first, _ in pairs], [str(other) for _, _, other in pairs])
        for (name, first, other), verdict in zip(pairs, verdicts, strict=True):
            if verdict.correct:
                placed[name][other] = first
        open_ = {name: [key for key in keys if key not in placed[name]] for name, keys in open_.items()}
    return {name: _replaced(item, placed[name]) for name, item in stored.items()}


def _replaced(item: Stored, placed: Mapping) -> Stored:
    words: dict = {}  # of every number, how it is first written
    for answer in _given(item):
        words.setdefault(placed[_key(answer)], answer)
    return replace(item, answers=[a if a is None else words[placed[_key(a)]] for a in item.answers])


def _given(item: Stored) -> Iterable[str]:
    return (answer for answer in item.answers if answer is not None)


def _key(answer: str) -> Fraction | str:
    """The value of a plain number or fraction, "$\\frac12$" included; anything else is its own key."""
    plain = answer.replace("\\$", "").replace("\\!", "").strip("$ \n")
    if plain.strip("+-") and _DECIMAL.fullmatch(plain):
        return Fraction(plain.replace(",", ""))
    found = _FRACTION.fullmatch(plain)
    if not found:
        return answer
    sign, *parts = found.groups()
    above, below = (int(part) for part in parts if part)
    return Fraction(-above if sign == "-" else above, below) if below else answer
