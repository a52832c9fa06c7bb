"""A TOML file and its overrides, read and checked as a whole."""

import tomllib
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from ipvrm_core.trainer.config.base import ConfigError, Section
from ipvrm_core.trainer.config.experiment import Config

SHIPPED = Path(__file__).parents[1] / "configs"
Kind = TypeVar("Kind", bound=Section)


def load(path: str | Path, overrides: list[str] = ()) -> Config:
    """Read a TOML file, apply `key.path=value` overrides (TOML syntax, bare words are strings), check it all.

    A bare name such as "demo" is a configuration that ships with the package.
    """
    shipped = {file.stem: file for file in SHIPPED.glob("*.toml")}
    path = shipped.get(str(path), Path(path))
    if not path.is_file():
        raise ConfigError(f"configuration must be a TOML file or one of {', '.join(sorted(shipped))}; got {path}")
    try:
        raw = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    for override in overrides:
        apply_override(raw, override)
    return check(raw, str(path))


def check(raw: dict, origin: str = "configuration", section: type[Kind] = Config) -> Kind:
    """Validate a plain dict, a whole configuration or one section; ConfigError lists every offending key."""
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, item['loc'])) or 'whole file'}: {item['msg']}"
            + ("" if isinstance(item["input"], dict | BaseModel) else f"; got {item['input']!r}")
            for item in error.errors()
        ]
        raise ConfigError(f"{origin} is refused:\n" + "\n".join(lines)) from None


def apply_override(raw: dict, override: str) -> None:
    """Set one key of a plain dict, whose tables are made where they are missing. ConfigError for one that cannot be."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"an override must look like key.path=value; got {override!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.split(".")
    for parent in parents:
        raw = raw.setdefault(parent, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"override {override!r}: {parent} is a value, not a table")
    raw[last] = value
