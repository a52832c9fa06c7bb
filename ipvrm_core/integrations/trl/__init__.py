"""DistRL inside TRL: `DistRLTrainer` is a GRPOTrainer with token advantages and a loss on the candidates.

    from ipvrm_core.integrations.trl import DistRL, DistRLTrainer

TRL's own loss is left alone, so that every loss_type, importance-sampling correction, KL and entropy option stays what
it is. Added are advantages [B, T] in place of [B], and alpha times the candidates' loss, made from the hidden states of
TRL's own forward. `fused=True` replaces TRL's loss where the fused one is exactly equal.
"""

from typing import TYPE_CHECKING

from ipvrm_core.integrations.trl.settings import DistRL
from ipvrm_core.integrations.trl.trainer import DistRLMixin

__all__ = ["DistRL", "DistRLMixin", "DistRLTrainer"]

if TYPE_CHECKING:

    class DistRLTrainer(DistRLMixin): ...


def __getattr__(name: str):
    if name != "DistRLTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trl import GRPOTrainer

    trainer = type(name, (DistRLMixin, GRPOTrainer), {"__module__": __name__, "__doc__": DistRLMixin.__doc__})
    globals()[name] = trainer
    return trainer
