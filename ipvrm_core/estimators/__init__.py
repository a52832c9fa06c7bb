"""How token rewards become the advantage of the sampled token: one file each, found by name.

A module in this folder defines one class that derives from `Estimator` and sets `name`. Nothing else has to change. An
estimator that lives elsewhere is named by `package.module:Class`.
"""

from ipvrm_core.estimators.base import Estimator, TokenRewards
from ipvrm_core.registry import Registry

__all__ = ["Estimator", "TokenRewards", "find", "names"]

_registry = Registry("estimator", __name__, Estimator)
find, names = _registry.find, _registry.names
