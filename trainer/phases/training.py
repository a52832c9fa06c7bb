"""The part that all training phases share: resume, steps, checkpoints, the finished model."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from ipvrm_core.trainer import checkpoint
from ipvrm_core.trainer.config import ConfigError
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.files import locked
from ipvrm_core.trainer.metrics import MetricsLog
from ipvrm_core.trainer.models import save_model
from ipvrm_core.trainer.optim import install, trained_weights


class AlreadyStartedError(RuntimeError):
    """The phase's folder holds work and --resume was not given."""


@contextmanager
def phase_folder(folder: Path, result: str, resume: bool) -> Iterator[bool]:
    """Hold the folder; yields False when `result` is there. AlreadyStartedError on old work without `resume`."""
    with locked(folder):
        done = (folder / result).exists()
        started = any(path.name != ".lock" for path in folder.iterdir())
        if started and not resume:
            state = "finished" if done else "started"
            raise AlreadyStartedError(
                f"{folder} is already {state}; pass --resume to go on, or take another --run folder"
            )
        yield not done


class Training:
    """`for step in training.steps(): ...; training.log(...)`, then `training.finish(...)`.

    After every `checkpoint_every` steps the models, optimisers and `state` are saved. `state` is a JSON dict of
    whatever else the phase must remember (a data cursor); setting state["stopped"] ends the steps early.
    """

    def __init__(
        self,
        experiment: Experiment,
        folder: Path,
        total: int,
        models: dict[str, nn.Module],
        optimizers: dict[str, torch.optim.Optimizer],
        *,
        show: tuple[str, ...],
        every: int = 1,
        state: dict | None = None,
    ):
        self.experiment, self.folder, self.total = experiment, folder, total
        self.models, self.optimizers = models, optimizers
        self.state = state or {}
        label = str(folder.relative_to(experiment.run))
        restored = checkpoint.load(folder, models, optimizers)
        self.done = restored.pop("step") if restored else 0
        self.state.update(restored or {})
        self.metrics = MetricsLog(folder, label, total, self.done, show=show, every=every, wandb_run=self._wandb(label))

    def _wandb(self, label: str):
        if not self.experiment.config.wandb:
            return None
        if find_spec("wandb") is None:
            raise ConfigError("wandb = true needs the package wandb, which is not installed")
        import wandb

        return wandb.init(project=self.experiment.config.name, name=label, dir=str(self.folder))

    def steps(self) -> Iterator[int]:
        for step in range(self.done + 1, self.total + 1):
            if self.state.get("stopped"):
                return
            yield step
            last = step == self.total or self.state.get("stopped")
            if step % self.experiment.config.checkpoint_every == 0 or last:
                checkpoint.save(self.folder, step, self.models, self.optimizers, self.state)

    def log(self, step: int, **numbers: float) -> None:
        self.metrics.log(step, **numbers)

    def save(self, model: nn.Module, name: str) -> None:
        """Save `model` as folder/name, in float32 where its optimiser kept such copies of its weights.

        Whatever has that name was saved after the last step of this very training, before it was interrupted.
        """
        if (self.folder / name).exists():
            return
        for key, trained in self.models.items():
            if trained is model and hasattr(self.optimizers.get(key), "pairs"):
                install(model, trained_weights(model, self.optimizers[key]))
        save_model(model, self.experiment.tokenizer, self.folder / name)

    def finish(self, model: nn.Module) -> None:
        """Save `model` as folder/model; its existence marks the phase as finished."""
        self.metrics.close()
        self.save(model, "model")
