"""Texts with more tokens than a model has positions for, or than was asked for."""

from collections.abc import Sequence
from typing import Literal

TooLong = Literal["refuse", "skip", "truncate"]
Status = Literal["ok", "truncated", "too_long"]


def length_status(
    texts: Sequence[tuple[str, int, int]], limit: int | None, too_long: TooLong, of: str = "texts"
) -> list[Status]:
    """What becomes of each text (name, where its answer starts, tokens): too_long ones are not scored at all.

    Under "truncate" one whose problem alone fills the limit is too_long. ValueError under "refuse", with the longest.
    """
    status: list[Status] = [_status(start, end, limit, too_long) for _, start, end in texts]
    long = [text for text, state in zip(texts, status, strict=True) if state != "ok"]
    if long and too_long == "refuse":
        name, _, end = max(long, key=lambda text: text[2])
        raise ValueError(
            f"{len(long)} of {len(texts)} {of} have more than {limit} tokens, the longest {end} ({name}): "
            "pass --too-long skip or truncate, or another --max-length"
        )
    return status


def _status(start: int, end: int, limit: int | None, too_long: TooLong) -> Status:
    if limit is None or end <= limit:
        return "ok"
    return "truncated" if too_long == "truncate" and start < limit else "too_long"


def refuse_long(name: str, tokens: int, limit: int | None) -> None:
    """ValueError for a text of more than `limit` tokens."""
    if limit is not None and tokens > limit:
        raise ValueError(f"{name}: {tokens} tokens, more than the {limit} that the model has positions for")
