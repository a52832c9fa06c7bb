"""The one record every data source yields and every phase of the trainer reads."""

from dataclasses import dataclass, field
from typing import Any

Message = dict[str, str]
"""One chat message: {"role": "user", "content": "..."}."""


@dataclass(frozen=True)
class Example:
    """A prompt with its gold answer and, where the data has one, a demonstration.

    id        unique within its data source.
    prompt    plain text, or a tuple of chat messages for the model's chat template.
    answer    the gold answer a verifier compares with; "" when the data has none.
    solution  the response to imitate in supervised fine-tuning; None when the data has none.
    meta      extra columns, never read by the training maths.
    """

    id: str
    prompt: str | tuple[Message, ...]
    answer: str
    solution: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
