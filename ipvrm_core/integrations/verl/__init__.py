"""DistRL inside verl: an FSDP engine with the candidates' loss, and a trainer with a reward model beside the actor.

The entry point `verl.plugins` imports `plugin`, which registers both; `trainer.v1.trainer_mode=distrl_sync` and the
section `distrl` of the configuration do the rest. The engine without `distrl` in a batch is verl's own.
"""

from ipvrm_core.integrations.verl.settings import DistRL

__all__ = ["DistRL"]
