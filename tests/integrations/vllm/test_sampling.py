"""What a sampler promises, by a real engine: the distribution, log-probs, ends, order, seeds."""

import pytest
import torch

from ipvrm_core.trainer.sampling.base import Drawing
from ipvrm_core.trainer.sampling.generate import Generate
from tests.integrations.vllm import cases

PROMPTS = cases.prompts()


@pytest.fixture(scope="module")
def policy():
    return cases.policy("tied", temperature=0.7)


@pytest.fixture(scope="module")
def sampler(policy):
    made = cases.sampler(policy)
    yield made
    made.close()


def test_greedy_answers_are_those_of_transformers_token_by_token(policy, sampler):
    theirs = Generate(policy, cases.TOKENIZER).sample(PROMPTS, cases.GREEDY)
    ours = sampler.sample(PROMPTS, cases.GREEDY)
    assert [sample.response_ids for sample in ours] == [sample.response_ids for sample in theirs]
    assert [sample.finished for sample in ours] == [sample.finished for sample in theirs]
    assert len({tuple(sample.response_ids) for sample in ours}) > 1
    for one, other in zip(ours, theirs, strict=True):  # of the raw distribution, as the protocol says
        torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=cases.EXACT)


def test_greedy_answers_of_several_samples_are_one_answer(sampler):
    once = sampler.sample(PROMPTS[:2], cases.GREEDY)
    twice = sampler.sample(PROMPTS[:2], Drawing(2, 0.0, max_new_tokens=24))
    assert twice == [once[0], once[0], once[1], once[1]]


def test_log_probs_are_the_trainers_at_its_temperature(policy, sampler):
    drawn = sampler.sample(PROMPTS, Drawing(4, policy.temperature, max_new_tokens=16))
    assert cases.furthest(policy, drawn) < cases.EXACT


def test_answers_come_in_the_order_of_the_prompts_and_end_with_eos(sampler):
    drawn = sampler.sample(PROMPTS, Drawing(8, 1.5, max_new_tokens=16))
    assert [sample.prompt_ids for sample in drawn] == [prompt for prompt in PROMPTS for _ in range(8)]
    eos = cases.TOKENIZER.eos_token_id
    finished = [sample for sample in drawn if sample.finished]
    assert 0 < len(finished) < len(drawn)
    assert all(sample.response_ids.index(eos) == len(sample.response_ids) - 1 for sample in finished)
    assert all(eos not in sample.response_ids for sample in drawn if not sample.finished)
    assert all(len(sample.response_ids) == 16 for sample in drawn if not sample.finished)
    assert all(len(sample.logprobs) == len(sample.response_ids) for sample in drawn)


def test_equal_seeds_give_equal_answers_and_others_do_not(sampler):
    def drawn(seed: int):
        torch.manual_seed(seed)
        made = sampler.sample(PROMPTS, cases.DRAWN)
        return made, torch.rand(1).item()

    first, after = drawn(3)
    sampler.sample(PROMPTS[::-1], cases.DRAWN)  # what came between has no part in it
    assert drawn(3) == (first, after)
    other, _ = drawn(4)
    assert [sample.response_ids for sample in other] != [sample.response_ids for sample in first]


def test_a_generator_of_its_own_draws_the_same_and_leaves_torchs_alone(sampler):
    torch.manual_seed(3)
    given = sampler.sample(PROMPTS, cases.DRAWN)
    before = torch.get_rng_state()
    sampler.generator = torch.Generator().manual_seed(3)
    try:
        assert sampler.sample(PROMPTS, cases.DRAWN) == given
    finally:
        sampler.generator = None
    assert torch.get_rng_state().equal(before)


def test_no_two_answers_share_their_random_numbers(sampler):
    """Equal prompts side by side: answers of equal seeds would be equal."""
    torch.manual_seed(0)
    drawn = sampler.sample([PROMPTS[0]] * 12, Drawing(4, 2.0, max_new_tokens=16))
    long = [tuple(sample.response_ids) for sample in drawn if len(sample.response_ids) > 6]
    assert len(set(long)) == len(long) > 12


def test_frequencies_are_those_of_the_distribution(policy, sampler):
    """First tokens of 4,000 answers: every frequency within 4.5 standard deviations of its probability."""
    drawn = sampler.sample(PROMPTS[:1], Drawing(4000, policy.temperature, max_new_tokens=1))
    with torch.no_grad():
        logits_V = policy.model(input_ids=torch.tensor(PROMPTS[:1])).logits[0, -1]
    p_V = (logits_V / policy.temperature).softmax(-1)
    counts_V = torch.bincount(torch.tensor([sample.response_ids[0] for sample in drawn]), minlength=len(p_V))
    sigma_V = (p_V * (1 - p_V) / len(drawn)).sqrt()
    assert ((counts_V / len(drawn) - p_V).abs() < 4.5 * sigma_V + 1 / len(drawn)).all()


def test_top_p_cuts_the_tail_and_log_probs_stay_those_of_the_full_distribution(sampler):
    plain = cases.policy("tied")  # the same weights at temperature 1
    drawn = sampler.sample(PROMPTS, Drawing(4, 0.7, 0.5, 16))
    assert cases.furthest(plain, drawn) < cases.EXACT
    # Always the likeliest token or one of the few behind it: no answer leaves the smallest set of half the mass.
    for sample in drawn[:8]:
        with torch.no_grad():
            logits = plain.model(input_ids=torch.tensor([sample.prompt_ids + sample.response_ids])).logits[0]
        p_TV = (logits[len(sample.prompt_ids) - 1 : -1] / 0.7).softmax(-1)
        for p_V, token in zip(p_TV, sample.response_ids, strict=True):
            assert p_V[p_V > p_V[token] + 1e-6].sum() < 0.5 + 1e-4


def test_what_is_not_known_is_no_number(sampler):
    """The log-prob of the last token that the model has a position for, where a tail was cut."""
    torch.manual_seed(1)
    filled = [one for one in sampler.sample([[5] * 92], Drawing(16, 1.0, 0.9, 16)) if len(one.response_ids) == 4]
    assert filled
    assert all([value != value for value in one.logprobs] == [False] * 3 + [True] for one in filled if not one.finished)
    assert not all(one.finished for one in filled)


def test_a_prompt_without_room_for_an_answer_is_refused(sampler):
    with pytest.raises(ValueError, match=r"the engine has 96 positions .* got a prompt of 96 tokens"):
        sampler.sample([[5] * 96], cases.GREEDY)
    assert len(sampler.sample([[5] * 95], cases.GREEDY)[0].response_ids) == 1  # the model has no more


def test_training_mode_and_the_process_are_left_as_they_were(policy, sampler):
    policy.train()
    sampler.sample(PROMPTS[:1], cases.GREEDY)
    sampler.sync(policy)
    assert policy.training
    assert policy.model.training
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)  # the engine's start takes this function away
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)
