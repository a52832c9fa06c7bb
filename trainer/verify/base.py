"""What a verifier takes and gives back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

Status = Literal["ok", "no_answer", "timeout", "error"]


@dataclass(frozen=True)
class Verdict:
    """Whether a response is correct, and how that was found out.

    status     "ok": the answers were compared; "no_answer": the response states none; "timeout" and "error": the
               comparison did not come to an end. `correct` is False in these last three, and whoever trains on it
               should count them apart: a timeout is not a wrong answer.
    extracted  the answer text that was compared, None where there is none.
    """

    correct: bool
    status: Status
    extracted: str | None = None

    def __post_init__(self) -> None:
        if self.correct and self.status != "ok":
            raise ValueError(f"a correct verdict must have status 'ok'; got {self.status!r}")


class Verifier(Protocol):
    """Compares responses with gold answers, one verdict an item, in the order given."""

    def __call__(self, responses: Sequence[str], golds: Sequence[str]) -> list[Verdict]: ...

    def close(self) -> None:
        """Releases what the verifier holds. It cannot be called afterwards; closing twice is allowed."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


def check_lengths(responses: Sequence[str], golds: Sequence[str]) -> None:
    """ValueError unless there is one gold answer a response."""
    if len(responses) != len(golds):
        raise ValueError(f"expected one gold answer a response; got {len(responses)} responses and {len(golds)} golds")
