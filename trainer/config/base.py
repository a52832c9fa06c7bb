"""What every section shares: strict types, no unknown keys, errors that name the key."""

from dataclasses import fields
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

Positive = Annotated[int, Field(gt=0, le=10**9)]  # nothing is counted here of which any machine does more
PositiveFloat = Annotated[float, Field(gt=0)]


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the key, what came and what was expected."""


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )


def checked(cls: type, values: dict, table: str):
    """An instance of a plain dataclass with checked keys and types; `table` is the key that holds `values`."""
    known = [field.name for field in fields(cls)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{table} has no setting {', '.join(unknown)}; expected some of {', '.join(known)}")
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        located = [
            {"type": item["type"], "loc": (table, *item["loc"]), "input": item["input"], "ctx": item.get("ctx", {})}
            for item in error.errors()
        ]
        raise ValidationError.from_exception_data(cls.__name__, located) from None
