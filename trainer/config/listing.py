"""Every key with its type, default and meaning, for `ipvrm config`."""

from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel

from ipvrm_core.method import METHODS, Method
from ipvrm_core.trainer.config.base import Section
from ipvrm_core.trainer.config.experiment import Config


def describe(section: type[BaseModel] = Config, prefix: str = "", given: Section | None = None) -> list[str]:
    """One line per key: name, type, default, meaning. given: the section as it is where nothing is set in it."""
    lines = []
    for name, field in section.model_fields.items():
        nested = _section_in(field)
        key = f"{prefix}{name}"
        default = getattr(given, name) if given else field.default
        if nested:
            key += ".<name>" if get_origin(field.annotation) is dict else ""
            unset = default if isinstance(default, nested) else None
            lines += ["", f"[{key}]  {nested.__doc__.splitlines()[0]}", *describe(nested, f"{key}.", unset)]
            continue
        if Method in field.metadata:
            lines += ["", f"[{key}]  {field.description}", *_settings(f"{key}.")]
            continue
        shown = "required" if field.is_required() else f"default {default!r}"
        meaning = f" - {field.description}" if field.description else ""
        lines.append(f"{key}: {_type_name(field.annotation)}, {shown}{meaning}")
    return lines


def _settings(prefix: str) -> Iterator[str]:
    """The settings of the method, whose defaults are those of the preset."""
    for name, hint in get_type_hints(Method, include_extras=True).items():
        kind, meaning = get_args(hint)
        defaults = {preset: getattr(method, name) for preset, method in METHODS.items()}
        shown = ", ".join(f"{preset} {value!r}" for preset, value in defaults.items())
        if len(set(defaults.values())) == 1:
            shown = repr(defaults["paper"])
        yield f"{prefix}{name}: {_type_name(kind)}, default {shown} - {meaning}"


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
