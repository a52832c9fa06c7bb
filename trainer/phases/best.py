"""Early stopping: the weights that were best in a validation metric, and when to give up on better ones."""

from pathlib import Path

from safetensors.torch import save_file
from torch import nn
from torch.optim import Optimizer

from ipvrm_core.trainer.files import read_tensors, write_file
from ipvrm_core.trainer.identity import file_digest
from ipvrm_core.trainer.optim import set_weights, trained_weights


class Best:
    """Does nothing without a metric. `state` is the phase's own, which is in its checkpoints.

    After a kill the steps since the checkpoint are made again and give the same numbers, so a file that is newer than
    the checkpoint is written again at the same step.
    """

    def __init__(self, folder: Path, metric: str | None, patience: int, state: dict):
        self.path, self.metric, self.patience, self.state = folder / "best.safetensors", metric, patience, state

    def see(self, step: int, numbers: dict[str, float], model: nn.Module, optimizer: Optimizer) -> bool:
        """Keep the weights of a new best; set state["stopped"] after `patience` validations without one.

        Whether the present weights are those to be kept, which without a metric the newest always are.

        ValueError where the metric cannot be had: the held-out answers do not change from one validation to the next.
        """
        if self.metric is None:
            return True
        if self.metric not in numbers:
            raise ValueError(
                f"stop_metric = {self.metric!r} needs right and wrong held-out answers"
                + (" to one prompt" if self.metric == "held_out_pair_accuracy" and numbers else "")
                + "; there are none"
            )
        value = -numbers[self.metric] if self.metric.startswith("held_out_ece") else numbers[self.metric]
        if value > self.state.get("best", float("-inf")):
            weights = {name: tensor.contiguous() for name, tensor in trained_weights(model, optimizer).items()}
            write_file(self.path, lambda target: save_file(weights, target))
            self.state.update(best=value, best_step=step, without_best=0, best_sha256=file_digest(self.path))
            return True
        self.state["without_best"] += 1
        if self.state["without_best"] >= self.patience:
            self.state["stopped"] = True
        return False

    def restore(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Put the best weights back. They are gone once the finished model is there. ValueError for damaged ones."""
        if self.metric is None:
            return
        if file_digest(self.path) != self.state["best_sha256"]:
            raise ValueError(f"{self.path} is not what was written (SHA-256): the best weights are lost")
        set_weights(model, optimizer, read_tensors(self.path))

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)
