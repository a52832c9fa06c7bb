"""Batches one step ahead: sampled and judged in a thread while the policy learns from the batch before.

Step k learns from answers of the weights after step k - 2; the importance weights of `correction` are for that.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.rl.collect import Collected, collect

if TYPE_CHECKING:
    from ipvrm_core.trainer.rl.step import Learner
    from ipvrm_core.trainer.sampling.vllm import VllmSampler


class Ahead:
    """A context: no thread is left behind it.

    For a sampler with weights of its own, which belongs to the thread until `wait`. What goes wrong in the thread is
    raised by whoever waits for its batch. Torch's generator belongs to the training: the thread has one for each step.
    """

    def __init__(self, experiment: Experiment, learner: "Learner", sampler: "VllmSampler", kept: dict | None = None):
        """kept: `to_json` of a run that was cut off."""
        self.experiment, self.learner, self.sampler = experiment, learner, sampler
        self.thread = ThreadPoolExecutor(1, "ahead")
        self.next: Future[Collected] | None = None
        self.staleness = 0  # updates since the weights that `next` is sampled with
        if kept:
            self.next, self.staleness = self.thread.submit(Collected.from_json, kept), kept["staleness"]

    def take(self, step: int, cursor: int) -> Collected:
        """The batch of this step; that of the next one is begun, with the weights that the sampler has now."""
        if self.next is None:
            self.next = self.thread.submit(self._collect, step, cursor)
        batch = replace(self.next.result(), staleness=self.staleness)
        self.next, self.staleness = None, 0
        if step < self.learner.rl.steps:
            self.next = self.thread.submit(self._collect, step + 1, batch.cursor)
        return batch

    def wait(self) -> None:
        """After an update, for the sampler to take it."""
        if self.next:
            self.next.result()
        self.staleness += 1

    def to_json(self) -> dict | None:
        """The batch that a later process could not sample again: the weights it comes from are gone."""
        return replace(self.next.result(), staleness=self.staleness).to_json() if self.next else None

    def _collect(self, step: int, cursor: int) -> Collected:
        self.sampler.generator = self.experiment.generator(*self.learner.seed(step))
        batch, stream = self.learner.rl.batch, self.learner.stream
        return collect(self.experiment, self.sampler, batch, cursor, stream)

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_) -> None:
        self.sampler.stop()
        self.thread.shutdown(cancel_futures=True)
