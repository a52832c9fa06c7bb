"""The part that all training phases share: resume, steps, checkpoints, the finished model, and what is not one."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from ipvrm_core.trainer import checkpoint, ending
from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.config import ConfigError
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.files import locked, sweep, write_json
from ipvrm_core.trainer.metrics import MetricsLog
from ipvrm_core.trainer.models import has_adapter, save_adapter, save_model
from ipvrm_core.trainer.optim import install, trained_weights

LOSS_LIMIT = 1e4  # of a mean loss, which is below 100 wherever something is learnt
GROWTH_LIMIT = 1e3  # of the root mean square of a weight tensor since the start, counted from at least SMALL on
SMALL = 1e-2


class AlreadyStartedError(RuntimeError):
    """The phase's folder holds work and --resume was not given."""


@contextmanager
def phase_folder(folder: Path, result: str, resume: bool) -> Iterator[ExitStack | None]:
    """Hold the folder; yields a stack for what ends with the phase, None when `result` is there.

    AlreadyStartedError on old work without `resume`.
    """
    with locked(folder), ExitStack() as stack:
        sweep(folder)
        done = (folder / result).exists()
        started = any(path.name != ".lock" for path in folder.iterdir())
        if started and not resume:
            state = "finished" if done else "started"
            raise AlreadyStartedError(
                f"{folder} is already {state}; pass --resume to go on, or take another --run folder"
            )
        yield None if done else stack


class Training:
    """`for step in training.steps(): training.uses(...); ...; training.log(...)`, then `training.finish(...)`.

    After every `checkpoint_every` steps the models, optimisers and `state` are saved. `state` is a JSON dict of
    whatever else the phase must remember (a data cursor), whose values are replaced and never changed in place; setting
    state["stopped"] ends the steps early.

    It is a context. Asked to end, it saves what the last whole step left, unless the weights have moved on from there:
    then the step is finished first (`ending`). A loss that is no number or beyond LOSS_LIMIT, and weights that have
    lost all measure, become a FloatingPointError with the step and its batch, which is kept; they are never saved.
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
        self.label = label = str(folder.relative_to(experiment.run))
        self.sizes = {name: _sizes(model) for name, model in models.items()}  # before any step was made
        restored = checkpoint.load(folder, models, optimizers)
        self.saved = self.done = self.step = restored.pop("step") if restored else 0
        self.state.update(restored or {})
        self.whole = dict(self.state)  # after step `done`
        self.moved = False  # the weights are no longer those after step `done`
        for optimizer in optimizers.values():
            optimizer.register_step_pre_hook(self._moves)
        self.batch: tuple[int, Sequence[Answer], dict] = (0, (), {})
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
            self.step = step
            yield step
            self.done, self.whole = step, dict(self.state)
            last = step == self.total or self.state.get("stopped")
            if step % self.experiment.config.checkpoint_every == 0 or last:
                self._save()
            self.moved = False
            ending.may_end()

    def uses(self, answers: Sequence[Answer], **more: list) -> None:
        """What the step in hand learns from; `more` in JSON's types."""
        self.batch = (self.step, answers, more)

    def log(self, step: int, **numbers: float) -> None:
        for name, value in numbers.items():
            if (name == "nll" or "loss" in name) and abs(value) > LOSS_LIMIT:
                raise FloatingPointError(f"{name} is {value:.3g}, beyond {LOSS_LIMIT:g}")
        self.metrics.log(step, **numbers)

    def _moves(self, *_) -> None:
        self.moved = True

    def _save(self) -> None:
        if self.saved == self.done:
            return
        destroyed = self._destroyed()
        if destroyed:
            raise FloatingPointError(destroyed)
        keep = self.experiment.config.keep_checkpoints
        checkpoint.save(self.folder, self.done, self.models, self.optimizers, self.whole, keep=keep)
        self.saved = self.done

    def _destroyed(self) -> str | None:
        """Which weights have lost all measure."""
        for name, before in self.sizes.items():
            for key, size in _sizes(self.models[name]).items():
                if not size <= GROWTH_LIMIT * max(before[key], SMALL):
                    return f"the weights {name}.{key} went from {before[key]:.3g} to {size:.3g} (root mean square)"
        return None

    def __enter__(self) -> "Training":
        ending.wait_while(lambda: self.moved)
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        ending.wait_while(bool)
        self.metrics.close()
        if isinstance(error, ending.Ended):
            if not self.moved:
                self._save()
            tqdm.write(f"{self.label} ends with the checkpoint {checkpoint.newest(self.folder)}")
        elif isinstance(error, Exception):
            found = str(error) if isinstance(error, FloatingPointError) else self._destroyed()
            if found:
                raise FloatingPointError(self._failed(found)) from error

    def _failed(self, found: str) -> str:
        """Keep the batch for a replay."""
        step, answers, more = self.batch
        path = self.folder / f"failed-step-{self.step:07d}.json"
        content = {"phase": self.label, "step": self.step, "found": found, "batch_of_step": step, **more}
        write_json(path, content | {"answers": [answer._asdict() for answer in answers]})
        return (
            f"{self.label} step {self.step}: {found}. The batch of step {step} ({len(answers)} answers) is kept in "
            f"{path}, the newest checkpoint is {checkpoint.newest(self.folder)}"
        )

    def save(self, model: nn.Module, name: str) -> None:
        """Save `model` as folder/name, in float32 where its optimiser kept such copies of its weights; an adapter alone
        as folder/name_adapter too.

        Whatever has that name was saved after the last step of this very training, before it was interrupted.
        """
        if (self.folder / name).exists():
            return
        for key, trained in self.models.items():
            if trained is model and hasattr(self.optimizers.get(key), "pairs"):
                install(model, trained_weights(model, self.optimizers[key]))
        adapter = self.folder / f"{name}_adapter"
        if has_adapter(model) and not adapter.exists():
            save_adapter(model, adapter)
            self.experiment.saved(adapter)
        save_model(model, self.experiment.text.tokenizer, self.folder / name)
        self.experiment.saved(self.folder / name)

    def finish(self, model: nn.Module) -> None:
        """Save `model` as folder/model; its existence marks the phase as finished."""
        self.metrics.close()
        self.save(model, "model")


def _sizes(model: nn.Module) -> dict[str, float]:
    """Root mean square of each trainable tensor; infinity where a weight is no number."""
    with torch.no_grad():
        found = {key: value.float().square().mean().sqrt() for key, value in checkpoint.trainable(model).items()}
    return {key: value if math.isfinite(value := size.item()) else math.inf for key, size in found.items()}
