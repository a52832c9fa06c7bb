"""Every key with its type, default and meaning, for `ipvrm config`."""

from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from ipvrm_core.trainer.config.base import Section
from ipvrm_core.trainer.config.experiment import Config


def describe(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """One line per key: name, type, default, meaning. For `ipvrm config`."""
    lines = []
    for name, field in section.model_fields.items():
        nested = _section_in(field)
        key = f"{prefix}{name}"
        if nested:
            key += ".<name>" if get_origin(field.annotation) is dict else ""
            lines += ["", f"[{key}]  {nested.__doc__.splitlines()[0]}", *describe(nested, f"{key}.")]
            continue
        default = "required" if field.is_required() else f"default {field.default!r}"
        meaning = f" - {field.description}" if field.description else ""
        lines.append(f"{key}: {_type_name(field.annotation)}, {default}{meaning}")
    return lines


def _section_in(field) -> type[Section] | None:
    """The Section that a field holds, alone, as an option, or by name in a dict."""
    kinds = [field.annotation, *get_args(field.annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def _type_name(kind) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type_name(inner[0])
    if origin is Literal:
        return " | ".join(map(repr, inner))
    if origin in (Union, UnionType):
        return " | ".join(map(_type_name, inner))
    if origin:
        return f"{origin.__name__}[{', '.join(map(_type_name, inner))}]"
    return "None" if kind is type(None) else getattr(kind, "__name__", str(kind))
