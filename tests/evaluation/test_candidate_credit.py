"""Whether the reward model prefers the token that is due, on positions worked out by hand."""

import pytest
import torch

from ipvrm_core.trainer.data.example import Example
from ipvrm_core.trainer.evaluation.reward_model.candidate_credit import candidate_credit
from ipvrm_core.trainer.sampling.base import Sample
from ipvrm_core.trainer.truth import due_tokens
from tests.tiny_models import table


def _digits(experiment, prefer: str | None):
    """Two digits have probability nearly 1/2 each everywhere: "4" and "5"; `prefer` is the likelier one by far."""

    def logits_of(row):
        logits = torch.full((len(row), len(experiment.text.tokenizer)), -9.0)
        for digit in "45":
            logits[:, experiment.text.tokenizer.convert_tokens_to_ids(digit)] = 3.0 if digit == prefer else 0.0
        return logits

    return logits_of


def test_due_tokens_by_hand(tiny_experiment):
    """2+3? asks for 2+3=5;#5 (";" just ends a step). Steps after a wrong digit go by what it states."""
    experiment = tiny_experiment()
    example = Example("x", "2+3?", "5")
    ids = experiment.text.answer_ids("2+3=5;#5")
    pad = experiment.text.tokenizer.pad_token_id

    def due(response: list[int]) -> list[int]:
        return due_tokens(experiment.task, experiment.text, [example], [response]).tolist()

    due_digits = due(ids)
    assert [due_digits[t] for t in (2, 4, 7)] == [ids[2], ids[4], ids[7]]
    assert due_digits[8] == -1  # EOS
    stated = experiment.text.answer_ids("2+3=4;#5")
    wrong = due(stated)
    assert wrong[:5] == due_digits[:5]  # "5" was due where "4" stands
    assert wrong[7] == stated[4]  # and then "4" where "5" stands
    assert due([*ids[:2], pad, *ids[2:]]) == [*due_digits[:2], -1, *due_digits[2:]]  # specials shift nothing
    assert due(experiment.text.answer_ids("")) == [-1]


def test_candidate_credit_by_hand(tiny_experiment):
    """Of the candidates "4" and "5" the latter is due: a reward model that prefers it scores 1, else 0."""
    experiment = tiny_experiment()
    examples = [Example("a", "2+3?", "5"), Example("b", "8-3?", "5")]
    texts = ["2+3=5;#5", "8-3=5;#4"]
    samples = [
        Sample(experiment.text.prompt_ids(example), experiment.text.answer_ids(text), [], True)
        for example, text in zip(examples, texts, strict=True)
    ]
    policy = table(experiment, _digits(experiment, None))
    models = {prefer: table(experiment, _digits(experiment, prefer)) for prefer in "54"}
    result = candidate_credit(experiment, policy, models, examples, samples)
    assert result["positions"] == 4
    assert result["chance"] == pytest.approx(0.5)
    assert result["5"] == 1.0
    assert result["4"] == 0.0
    assert result["policy"] in (0.0, 1.0)  # a tie at every position


def test_candidate_credit_measures_the_advantage_not_the_probability(tiny_experiment):
    """The policy prefers "4" by 2.2 nats; a reward model that prefers it by less favours "5" relative to the policy."""
    experiment = tiny_experiment()
    examples = [Example("a", "2+3?", "5")]
    samples = [Sample(experiment.text.prompt_ids(examples[0]), experiment.text.answer_ids("2+3=5;#5"), [], True)]

    def leaning(nats: float):
        def logits_of(row):
            logits = _digits(experiment, None)(row)
            logits[:, experiment.text.tokenizer.convert_tokens_to_ids("4")] += nats
            return logits

        return table(experiment, logits_of)

    models = {"less": leaning(1.0), "more": leaning(4.0)}
    result = candidate_credit(experiment, leaning(2.0), models, examples, samples)
    assert result == {"positions": 2, "chance": 0.5, "policy": 0.0, "less": 1.0, "more": 0.0}


def test_fixed_positions_with_another_reference(tiny_experiment):
    """Positions are where the policy has candidates, a later one has none; TD errors are against the later one."""
    experiment = tiny_experiment()
    examples = [Example("a", "2+3?", "5")]
    samples = [Sample(experiment.text.prompt_ids(examples[0]), experiment.text.answer_ids("2+3=5;#5"), [], True)]
    policy, sure, model = (table(experiment, _digits(experiment, prefer)) for prefer in (None, "4", "4"))
    given = experiment, policy, {"model": model}, examples, samples
    assert candidate_credit(experiment, sure, {}, examples, samples) == {"positions": 0}
    fixed = candidate_credit(*given)
    assert (fixed["positions"], fixed["model"]) == (2, 0.0)  # beside the policy it prefers "4"
    later = table(experiment, lambda row: 2 * _digits(experiment, "4")(row))
    assert candidate_credit(*given, reference=later)["model"] == 1.0  # beside one that prefers "4" twice as much, "5"


def test_candidate_credit_without_positions(tiny_experiment):
    experiment = tiny_experiment()
    example = Example("a", "2+3?", "5")
    samples = [Sample(experiment.text.prompt_ids(example), experiment.text.answer_ids(";"), [], True)]
    policy = table(experiment, _digits(experiment, None))
    assert candidate_credit(experiment, policy, {}, [example], samples) == {"positions": 0}
