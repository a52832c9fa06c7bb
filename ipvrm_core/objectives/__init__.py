"""Reward-model objectives: one file each, found by name.

A module in this folder defines one frozen dataclass that derives from `Objective` and sets `name`; its fields are its
settings. Nothing else has to change: `find(name)` reads the folder.
"""

from importlib import import_module
from pkgutil import iter_modules

from ipvrm_core.objectives.base import Objective, RewardBatch

__all__ = ["Objective", "RewardBatch", "find", "names"]


def _classes() -> dict[str, type[Objective]]:
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    return {cls.name: cls for cls in Objective.__subclasses__()}


def names() -> list[str]:
    """All objective names, sorted."""
    return sorted(_classes())


def find(name: str) -> type[Objective]:
    """The objective class called `name`; ValueError lists the known ones."""
    classes = _classes()
    if name not in classes:
        raise ValueError(f"objective must be one of {', '.join(sorted(classes))}; got {name!r}")
    return classes[name]
