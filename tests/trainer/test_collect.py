"""The choice of prompts: the first that the batch's settings keep, and what happens when they are too few."""

import pytest

from ipvrm_core import outcome_advantages
from ipvrm_core.trainer.config import Batch
from ipvrm_core.trainer.rl.collect import Collected, collect
from ipvrm_core.trainer.sampling.base import Sample
from ipvrm_core.trainer.sampling.verified import Asker
from ipvrm_core.trainer.verify import Verdict


@pytest.fixture
def sampled(monkeypatch):
    """Replaces sampling: prompt number i has `right[i]` right answers, the right ones first.

    The last answer to the prompts of `timeouts` has no verdict.
    """

    def use(right: list[int], timeouts: tuple[int, ...] = ()) -> list[tuple[int, int]]:
        asked = []

        def ask(asker, sampler, examples, drawing):
            samples = drawing.samples
            numbers = [int(example.id.rsplit("-", 1)[1]) for example in examples]
            asked.append((numbers[0], len(numbers)))
            made = [
                Sample([number + 2], [s + 2, 1], [-1.0 - number, -0.5 * s], True)
                for number in numbers
                for s in range(samples)
            ]

            def verdict(number: int, s: int) -> Verdict:
                if number in timeouts and s == samples - 1:
                    return Verdict(False, "timeout")
                return Verdict(True, "ok") if s < right[number] else Verdict(False, ("ok", "no_answer")[s % 2])

            return made, [verdict(number, s) for number in numbers for s in range(samples)]

        monkeypatch.setattr(Asker, "ask", ask)
        return asked

    return use


def _settings(policy: str, keep: int = 3, rounds: int = 4, **more) -> Batch:
    chosen = {"prompts": 4, "keep_prompts": keep, "rollouts": 3, "too_few_mixed": policy, "max_rounds": rounds}
    return Batch(**{**chosen, **more})


def _kept(made: Collected, rollouts: int = 3) -> list[int]:
    """Numbers of the kept prompts, in order."""
    return [answer.prompt_ids[0] - 2 for answer in made.answers[::rollouts]]


def test_the_samplers_log_probs_stay_with_their_answers(tiny_experiment, sampled):
    sampled([0, 3, 2, 1])
    made = collect(tiny_experiment(), None, _settings("sample_on", keep=2), 0)
    assert _kept(made) == [2, 3]
    assert made.sampler_logprobs_N.tolist() == [-3, 0, -3, -0.5, -3, -1, -4, 0, -4, -0.5, -4, -1]


@pytest.mark.parametrize("policy", ["sample_on", "fill"])
def test_the_first_mixed_prompts_are_kept(tiny_experiment, sampled, policy):
    asked = sampled([1, 3, 2, 1, 0, 0, 0, 0])
    made = collect(tiny_experiment(), None, _settings(policy, keep=2), 0)
    assert _kept(made) == [0, 2]
    assert asked == [(0, 4)]
    assert made.cursor == 4
    assert made.rewards_B.tolist() == [1, 0, 0, 1, 1, 0]
    assert made.groups_B.tolist() == [0, 0, 0, 1, 1, 1]
    assert made.group_mean_B.tolist() == pytest.approx([1 / 3] * 3 + [2 / 3] * 3)
    assert [answer.response_ids[0] for answer in made.answers] == [2, 3, 4] * 2
    assert made.numbers["mixed_prompts"] == 0.75
    assert made.numbers["accuracy"] == 7 / 12
    assert made.numbers["kept_prompts"] == 2


def _in_range(low: float, high: float, rounds: int = 4) -> Batch:
    return _settings("sample_on", rounds=rounds, rollouts=10, accuracy_range=(low, high))


def test_prompts_outside_the_accuracy_range_are_left_out(tiny_experiment, sampled):
    """Ten answers a prompt, both ends of the range belong to it; the mixed prompts of the log are all mixed ones."""
    asked = sampled([0, 1, 2, 8, 9, 10, 5, 1])
    made = collect(tiny_experiment(), None, _in_range(0.2, 0.8), 0)
    assert _kept(made, 10) == [2, 3, 6]
    assert asked == [(0, 4), (4, 4)]
    assert made.group_mean_B[::10].tolist() == pytest.approx([0.2, 0.8, 0.5])
    assert made.numbers["mixed_prompts"] == 0.75
    assert made.numbers["kept_prompts"] == 3


@pytest.mark.parametrize(("low", "high", "kept"), [(0.0, 1.0, [1, 2, 3]), (0.0, 0.1, [1]), (0.9, 1.0, [2])])
def test_a_range_up_to_the_end_still_keeps_mixed_prompts_only(tiny_experiment, sampled, low, high, kept):
    sampled([0, 1, 9, 5, 10, 0, 0, 10])
    assert _kept(collect(tiny_experiment(), None, _in_range(low, high, 2), 0), 10) == kept


def test_nothing_in_the_range_leaves_an_empty_batch(tiny_experiment, sampled):
    sampled([1, 9, 1, 9])
    made = collect(tiny_experiment(), None, _in_range(0.2, 0.8, 1), 0)
    assert (made.answers, made.numbers["kept_prompts"], made.numbers["mixed_prompts"]) == ([], 0, 1.0)


def test_sample_on_goes_on_until_there_are_enough(tiny_experiment, sampled):
    asked = sampled([0, 1, 3, 0, 0, 0, 2, 0, 1, 1, 1, 1])
    made = collect(tiny_experiment(), None, _settings("sample_on"), 0)
    assert asked == [(0, 4), (4, 4), (8, 4)]
    assert _kept(made) == [1, 6, 8]
    assert made.cursor == 12
    assert made.numbers["mixed_prompts"] == 0.25  # of the first round


def test_sample_on_stops_after_max_rounds_with_what_is_there(tiny_experiment, sampled):
    asked = sampled([0, 1, 3, 0, 0, 0, 0, 0, 1, 1, 1, 1])
    made = collect(tiny_experiment(), None, _settings("sample_on", rounds=2), 0)
    assert asked == [(0, 4), (4, 4)]
    assert _kept(made) == [1]
    assert made.numbers["kept_prompts"] == 1


def test_fill_completes_with_unmixed_prompts(tiny_experiment, sampled):
    asked = sampled([0, 3, 2, 0] + [1] * 8)
    made = collect(tiny_experiment(), None, _settings("fill"), 0)
    assert asked == [(0, 4)]
    assert _kept(made) == [2, 0, 1]
    assert made.group_mean_B.tolist() == pytest.approx([2 / 3] * 3 + [0.0] * 3 + [1.0] * 3)
    assert outcome_advantages(made.rewards_B, made.groups_B)[3:].tolist() == [0.0] * 6


@pytest.mark.parametrize("policy", ["sample_on", "fill"])
def test_nothing_mixed_leaves_an_empty_batch_after_all_rounds(tiny_experiment, sampled, policy):
    asked = sampled([0, 3] * 20)
    made = collect(tiny_experiment(), None, _settings(policy, rounds=3), 0)
    assert asked == [(0, 4), (4, 4), (8, 4)]
    assert (made.answers, made.cursor) == ([], 12)
    assert made.rewards_B.shape == made.groups_B.shape == made.group_mean_B.shape == (0,)
    assert {"accuracy": 0.5, "sampled_prompts": 12, "kept_prompts": 0}.items() <= made.numbers.items()


def test_fill_samples_on_until_one_prompt_is_mixed(tiny_experiment, sampled):
    asked = sampled([0, 3, 3, 0, 3, 1, 0, 2] + [1] * 4)
    made = collect(tiny_experiment(), None, _settings("fill", rounds=3), 0)
    assert asked == [(0, 4), (4, 4)]
    assert _kept(made) == [5, 7, 0]


def test_the_cursor_is_where_the_last_batch_ended(tiny_experiment, sampled):
    asked = sampled([1] * 12)
    made = collect(tiny_experiment(), None, _settings("fill", rounds=3), 4)
    assert asked == [(4, 4)]
    assert made.cursor == 8


@pytest.mark.parametrize("policy", ["sample_on", "fill"])
def test_a_prompt_with_an_answer_without_a_verdict_is_left_out_whole(tiny_experiment, sampled, policy):
    """Prompt 1 would be mixed, 2 all wrong: neither is kept or filled in, and no mean counts a time-out as wrong."""
    sampled([1, 1, 0, 3, 1, 2, 1, 1], timeouts=(1, 2))
    made = collect(tiny_experiment(), None, _settings(policy, rounds=3), 0)
    assert _kept(made) == ([0, 4, 5] if policy == "sample_on" else [0, 3])
    assert made.numbers["unjudged_prompts"] == made.numbers["verdict_timeout"] == 2
    assert made.numbers["verdict_error"] == 0
    assert made.numbers["accuracy"] == 5 / 10  # of the first round's twelve answers ten have a verdict
    assert made.numbers["mixed_prompts"] == 1 / 2


def test_a_round_without_any_verdict_is_an_empty_batch(tiny_experiment, sampled):
    sampled([1] * 4, timeouts=(0, 1, 2, 3))
    made = collect(tiny_experiment(), None, _settings("fill", rounds=1, rollouts=2), 0)
    assert (made.answers, made.numbers["unjudged_prompts"], made.numbers["mixed_prompts"]) == ([], 4, 0)
