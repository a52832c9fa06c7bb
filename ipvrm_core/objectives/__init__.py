"""Reward-model objectives: one file each, found by name.

A module in this folder defines one frozen dataclass that derives from `Objective` and sets `name`; its fields are its
settings. Nothing else has to change: `find(name)` reads the folder. An objective that lives elsewhere is named by
`package.module:Class`.
"""

from ipvrm_core.objectives.base import Objective, RewardBatch
from ipvrm_core.registry import Registry

__all__ = ["Objective", "RewardBatch", "find", "names"]

_registry = Registry("objective", __name__, Objective)
find, names = _registry.find, _registry.names
