"""Reward-model objectives: one file each, found by name.

A module in this folder defines one frozen dataclass that derives from `Objective` and sets `name`; its fields are its
settings. Nothing else has to change: `find(name)` reads the folder. An objective that lives elsewhere is named by
`package.module:Class`.
"""

from importlib import import_module
from pkgutil import iter_modules

from ipvrm_core.objectives.base import Objective, RewardBatch

__all__ = ["Objective", "RewardBatch", "find", "names"]


def _classes() -> dict[str, type[Objective]]:
    found: dict[str, type[Objective]] = {}
    for info in iter_modules(__path__):
        module = import_module(f"{__name__}.{info.name}")
        for cls in vars(module).values():
            own = isinstance(cls, type) and issubclass(cls, Objective) and cls.__module__ == module.__name__
            if own and cls is not Objective:
                if cls.name in found:
                    raise ValueError(f"objective name {cls.name!r} is taken twice: {found[cls.name]} and {cls}")
                found[cls.name] = cls
    return found


def names() -> list[str]:
    """All objective names of this folder, sorted."""
    return sorted(_classes())


def find(name: str) -> type[Objective]:
    """The objective class called `name`, or `package.module:Class`; ValueError lists the known ones."""
    if ":" in name:
        return _elsewhere(name)
    classes = _classes()
    if name not in classes:
        raise ValueError(
            f"objective must be one of {', '.join(sorted(classes))}, or package.module:Class; got {name!r}"
        )
    return classes[name]


def _elsewhere(name: str) -> type[Objective]:
    path, _, attribute = name.partition(":")
    try:
        cls = getattr(import_module(path), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"objective {name!r} cannot be imported: {error}") from None
    if not (isinstance(cls, type) and issubclass(cls, Objective)):
        raise ValueError(f"objective {name!r} must be a class that derives from Objective; got {cls!r}")
    return cls
