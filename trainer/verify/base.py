"""What a verifier takes and gives back."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

Status = Literal["ok", "no_answer", "unfinished", "timeout", "error"]
UNDECIDED: tuple[Status, ...] = ("timeout", "error")


@dataclass(frozen=True)
class Verdict:
    """Whether a response is correct, and how that was found out.

    status     "ok": the answers were compared; "no_answer": the response states none; "unfinished": it was cut at the
               limit of tokens and not looked at; "timeout" and "error": the comparison did not come to an end.
               `correct` is False in all but the first. The last two are no wrong answers: nobody trains on them.
    extracted  the answer text that was compared, None where there is none.
    """

    correct: bool
    status: Status
    extracted: str | None = None

    def __post_init__(self) -> None:
        if self.correct and self.status != "ok":
            raise ValueError(f"a correct verdict must have status 'ok'; got {self.status!r}")

    @property
    def decided(self) -> bool:
        """Whether it says anything of the response."""
        return self.status not in UNDECIDED


def all_decided(verdicts: Iterable[Verdict]) -> bool:
    """Whether a prompt with these verdicts on its answers can be learnt from: mu and the spread need them all."""
    return all(verdict.decided for verdict in verdicts)


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
