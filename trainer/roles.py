"""The models of a policy run: each its own, or all of them adapters on one frozen base."""

from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.models import OneBase, Role


class Separate:
    """Policy, reward model and reference hold their weights apart; one that is trained gets new adapters with LoRA."""

    def __init__(self, experiment: Experiment, name: str):
        self.experiment, self.name = experiment, name

    def policy(self) -> LanguageModel:
        return self.experiment.trainable(self.experiment.start_policy(), "rl", self.name)

    def reward_model(self, rm: str, trained: bool) -> LanguageModel:
        """The reward model `rm` as it was trained offline."""
        model = self.experiment.load(self.experiment.run / "rm" / rm / "model")
        return self.experiment.trainable(model, "rl", self.name, "rm") if trained else model

    def reference(self) -> LanguageModel:
        return self.experiment.start_policy().eval()


class Shared:
    """All on the starting policy, which is the reference; the reward model goes on with its own adapter."""

    def __init__(self, experiment: Experiment, name: str):
        self.experiment = experiment
        start = experiment.start_policy()
        experiment.seed("lora", "rl", name)
        self.one = OneBase(start.model, experiment.config.model.lora, "policy")

    def policy(self) -> LanguageModel:
        return self.experiment.sparing(self.experiment.language_model(Role(self.one, "policy")))

    def reward_model(self, rm: str, trained: bool) -> LanguageModel:
        """The adapter of the reward model `rm`; of an objective that trains nothing, the base alone."""
        if not self.experiment.config.rm[rm].build().trains:
            return self.reference()
        folder = self.experiment.run / "rm" / rm / "model_adapter"
        role = self.experiment.load_adapter(self.one, folder, "reward_model", trained)
        return self.experiment.sparing(self.experiment.language_model(role))

    def reference(self) -> LanguageModel:
        return self.experiment.language_model(Role(self.one, None)).eval()


def roles(experiment: Experiment, name: str) -> Separate | Shared:
    """As model.lora.one_base says."""
    lora = experiment.config.model.lora
    return (Shared if lora and lora.one_base else Separate)(experiment, name)
