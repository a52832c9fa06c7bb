"""Whose continuations end right, by hand: a scripted sampler, and reward models that prefer one digit."""

from dataclasses import replace
from math import exp, log

import pytest
import torch

from ipvrm_core.trainer.batching import Answer
from ipvrm_core.trainer.evaluation.reward_model.choices import Choice, choice_credit, sample_choices, td_errors
from ipvrm_core.trainer.sampling.base import Sample
from ipvrm_core.trainer.sampling.verified import Asker
from ipvrm_core.trainer.verify import Verdict
from tests.tiny_models import table

YES, NO = True, False


def choice(probabilities, right):
    return Choice(Answer([1], [2]), list(range(len(right))), [log(p) for p in probabilities], right)


def test_credit_by_hand():
    """Two positions; at the first the second candidate is better and less likely, at the second the other way round."""
    choices = [
        choice([0.6, 0.2], [[NO, NO, NO, YES], [YES, YES, NO, YES]]),
        choice([0.5, 0.3, 0.1], [[YES, YES], [YES, NO], [NO, NO]]),
    ]
    found = choice_credit(choices, [[-1.0, 1.0], [0.0, 2.0, 1.0]])
    assert (found["positions"], found["candidates"], found["continuations"]) == (2, 2.5, 14)
    assert found["drawn"] == pytest.approx(((0.6 * 0.25 + 0.2 * 0.75) / 0.8 + (0.5 + 0.3 * 0.5) / 0.9) / 2)
    assert found["policy"] == (0.25 + 1) / 2
    assert found["td"] == (0.75 + 0.5) / 2
    assert found["gain"] == 0.0
    assert found["gain_half_width"] == pytest.approx(1.96 * 0.5)  # gains of 0.5 and -0.5: stdev 0.707, over sqrt 2
    # Even-numbered continuations: 0, 1/2 and 1, 1, 0; odd ones: 1/2, 1 and 1, 0, 0. One half chooses, the other counts.
    assert found["best"] == pytest.approx(((1 + 0.5) / 2 + (1 / 2 + 1) / 2) / 2)
    # Pairs (right, wrong) of two candidates: 1 * 1, 3 * 3; then 2 * 1, 2 * 2, 1 * 0, 1 * 2.
    assert found["auc_td"] == pytest.approx((0 + 9 + 0 + 0 + 2) / (1 + 9 + 2 + 4 + 2))
    assert found["auc_policy"] == pytest.approx((1 + 0 + 2 + 4 + 2) / 18)


def test_ties_and_nothing():
    """A tie is half of a win and the mean of what it chooses from; without pairs there is no area."""
    found = choice_credit([choice([0.5, 0.5], [[YES, YES], [NO, NO]])], [[1.0, 1.0]])
    assert (found["td"], found["policy"], found["auc_td"], found["best"]) == (0.5, 0.5, 0.5, 1.0)
    assert found["gain_half_width"] is None
    alike = choice_credit([choice([0.5, 0.5], [[YES], [YES]])], [[1.0, 0.0]])
    assert (alike["auc_td"], alike["best"]) == (None, 1.0)
    assert choice_credit([], []) == {"positions": 0}


def everywhere(experiment, logits: dict[str, float]):
    """A model with these logits at every position, and -9 for other tokens."""
    row_V = torch.full((len(experiment.text.tokenizer),), -9.0)
    for token, logit in logits.items():
        row_V[experiment.text.tokenizer.convert_tokens_to_ids(token)] = logit
    return table(experiment, lambda ids: row_V.expand(len(ids), -1))


@pytest.fixture
def scripted(tiny_experiment, monkeypatch):
    """(experiment, policy, what was continued). Answers are "44"; continuations are "5", "7" and nothing.

    The policy has the candidates "4", "5" and the end of the answer wherever it stands. Right is what ends in "45", and
    "4" alone; of what has a 7 there is no verdict.
    """
    experiment = tiny_experiment()
    tokenizer, continued = experiment.text.tokenizer, []
    four, five, seven = (tokenizer.convert_tokens_to_ids(digit) for digit in "457")

    class Scripted:
        def sample(self, given, drawing):
            if drawing.samples == 1:
                return [Sample(prompt, [four, four], [0.0] * 2, True) for prompt in given]
            continued.extend(given)
            tails = [[five], [seven], []]
            return [Sample(prompt, tail, [0.0] * len(tail), True) for prompt in given for tail in tails]

        def close(self):
            continued.append("closed")

    class EndsIn45:
        def __call__(self, texts, golds):
            assert set(golds) == {"gold"}
            return [Verdict(text.endswith("45") or text == "4", "timeout" if "7" in text else "ok") for text in texts]

    monkeypatch.setattr(experiment, "sampler", lambda policy: Scripted())
    monkeypatch.setattr(experiment, "asker", Asker(experiment.text, EndsIn45()))
    return experiment, everywhere(experiment, {"4": 3.0, "5": 3.0, tokenizer.eos_token: 2.0}), continued


def test_every_candidate_is_continued_from_its_own_prefix(scripted):
    experiment, policy, continued = scripted
    ids = experiment.text.tokenizer.convert_tokens_to_ids
    four, five, eos = ids("4"), ids("5"), experiment.text.tokenizer.eos_token_id
    example = replace(experiment.test_examples(1)[0], answer="gold")
    prompt = experiment.text.prompt_ids(example)
    torch.manual_seed(0)
    (found,) = sample_choices(experiment, policy, [example], samples=3)
    t = len(found.begun.response_ids)
    assert found.begun == Answer(prompt, [four] * t)
    assert found.ids == sorted([four, five, eos])
    assert sum(map(exp, found.logprobs)) == pytest.approx(1, abs=1e-3)
    assert continued == [prompt + [four] * t + [token] for token in found.ids if token != eos] + ["closed"]
    judged = dict(zip(found.ids, found.right, strict=True))
    assert judged[four] == [True, t == 0]
    assert judged[five] == [False, t == 1]
    assert judged[eos] == [t == 1] * 3


def test_positions_are_drawn_evenly(scripted):
    experiment, policy, _ = scripted
    examples = [replace(experiment.test_examples(1)[0], answer="gold")] * 40
    torch.manual_seed(0)
    found = [len(one.begun.response_ids) for one in sample_choices(experiment, policy, examples, samples=3)]
    assert len(found) == 40
    assert 8 < sum(found) < 32


def test_td_errors_of_the_candidates(tiny_experiment):
    """The reward model prefers "4" by 2 nats, the policy "5" by 1: TD errors 3 nats apart, times beta."""
    experiment = tiny_experiment()
    four, five = (experiment.text.tokenizer.convert_tokens_to_ids(digit) for digit in "45")
    model, policy = (everywhere(experiment, {"4": a, "5": b}) for a, b in ((3.0, 1.0), (1.0, 2.0)))
    begun = Answer(experiment.text.prompt_ids(experiment.test_examples(1)[0]), [five])
    choices = [Choice(begun, [four, five], [0.0, 0.0], []), Choice(begun, [five], [0.0], [])]
    (of_four, of_five), (alone,) = td_errors(choices, model, policy, beta=2.0)
    assert of_four - of_five == pytest.approx(2 * 3, abs=1e-4)
    assert alone == pytest.approx(of_five)
    ((one, other), _) = td_errors(choices, model, None, beta=1.0)
    assert one - other == pytest.approx(2, abs=1e-4)
