"""The verifier that compares text: for the generated tasks and for answers after a "#"."""

import re
from collections.abc import Sequence
from typing import Self

from ipvrm_core.trainer.verify.base import Verdict, check_lengths

_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_DECIMAL_ZEROS = re.compile(r"([-+]?\d+)\.0+")


def extract(response: str) -> str | None:
    """The text after the last "#" if there is one, else the whole response; stripped, None when nothing is left."""
    return response.rpartition("#")[2].strip() or None


def normalise(answer: str) -> str:
    """One spelling for one answer: "1,000.0" -> "1000", " 7. " -> "7"; letter case and inner spaces are kept."""
    text = answer.strip().removesuffix(".")
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    whole = _DECIMAL_ZEROS.fullmatch(text)
    return whole[1] if whole else text


class ExactVerifier:
    """Correct when the normalised texts are equal. Runs in the calling thread; holds nothing."""

    def __call__(self, responses: Sequence[str], golds: Sequence[str]) -> list[Verdict]:
        check_lengths(responses, golds)
        return [self._judge(response, gold) for response, gold in zip(responses, golds, strict=True)]

    def close(self) -> None:
        """Nothing to release."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @staticmethod
    def _judge(response: str, gold: str) -> Verdict:
        if not gold.strip():
            return Verdict(False, "error")
        answer = extract(response)
        if answer is None:
            return Verdict(False, "no_answer")
        return Verdict(normalise(answer) == normalise(gold), "ok", answer)
