"""Answers with their verdicts."""

from collections.abc import Sequence
from dataclasses import dataclass

from ipvrm_core.trainer.data.example import Example
from ipvrm_core.trainer.sampling.base import Drawing, Sample, Sampler
from ipvrm_core.trainer.text import Text
from ipvrm_core.trainer.verify import Verdict, Verifier


@dataclass(frozen=True)
class Asker:
    """How a problem becomes a prompt and who judges the answer. unfinished: see the configuration of the verifier."""

    text: Text
    verifier: Verifier
    unfinished: str = "judge"

    def ask(
        self, sampler: Sampler, examples: Sequence[Example], drawing: Drawing
    ) -> tuple[list[Sample], list[Verdict]]:
        """`drawing.samples` answers per example and their verdicts, those to one example contiguous."""
        made = sampler.sample([self.text.prompt_ids(example) for example in examples], drawing)
        golds = [example.answer for example in examples for _ in range(drawing.samples)]
        return made, self.judge(made, [self.text.decode(sample.response_ids) for sample in made], golds)

    def judge(self, samples: Sequence[Sample], texts: list[str], golds: list[str]) -> list[Verdict]:
        """A verdict on every sample; one cut at the limit of tokens is not looked at where it is wrong in any case."""
        seen = [index for index, sample in enumerate(samples) if sample.finished or self.unfinished == "judge"]
        verdicts = [Verdict(False, "unfinished")] * len(samples)
        found = self.verifier([texts[i] for i in seen], [golds[i] for i in seen])
        for index, verdict in zip(seen, found, strict=True):
            verdicts[index] = verdict
        return verdicts


def right_share(verdicts: Sequence[Verdict]) -> float:
    """Of those that say anything; 0 where none does."""
    decided = [verdict.correct for verdict in verdicts if verdict.decided]
    return sum(decided) / max(1, len(decided))
