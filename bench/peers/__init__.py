"""Other people's implementations, one short file a project: PEERS is a list of `base.Peer`. New files are found."""

from importlib import import_module
from pkgutil import iter_modules

from ipvrm_core.bench.peers.base import Peer


def peers(level: str) -> list[Peer]:
    """All peers of a level ("linear" or "logits"). Their packages are imported when they run."""
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    return [peer for module in modules for peer in getattr(module, "PEERS", []) if peer.level == level]
