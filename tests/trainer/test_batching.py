"""Padding lives in one place: which hidden state predicts which token, by hand, and how a batch is split."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipvrm_core.trainer.batching import Answer, TokenBatch, micro_batches

ANSWERS = [Answer([5, 6, 7], [8, 1]), Answer([4], [3, 2, 9, 1]), Answer([5, 5], [1])]


def test_token_batch_by_hand():
    """The state at a token predicts the next one, so the first response token is predicted at the last prompt token."""
    batch = TokenBatch.make(ANSWERS)
    assert batch.ids_BL.tolist() == [[5, 6, 7, 8], [4, 3, 2, 9], [5, 5, 0, 0]]  # the last token predicts nothing
    assert batch.mask_BL.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.rows_N.tolist() == [2, 3, 4, 5, 6, 7, 9]
    assert batch.targets_N.tolist() == [8, 1, 3, 2, 9, 1, 1]
    assert batch.cu_seqlens.tolist() == [0, 2, 6, 7]
    at_rows = batch.ids_BL.flatten()[batch.rows_N].tolist()
    assert at_rows == [7, 8, 4, 3, 2, 9, 5]


def test_states_after_the_response_tokens_by_hand():
    """For a value head: the rows at the response tokens themselves, the last one included."""
    batch = TokenBatch.make(ANSWERS, after=True)
    assert batch.ids_BL.tolist() == [[5, 6, 7, 8, 1], [4, 3, 2, 9, 1], [5, 5, 1, 0, 0]]
    assert batch.mask_BL.tolist() == [[1] * 5, [1] * 5, [1, 1, 1, 0, 0]]
    assert batch.ids_BL.flatten()[batch.rows_N].tolist() == batch.targets_N.tolist() == [8, 1, 3, 2, 9, 1, 1]
    assert batch.cu_seqlens.tolist() == [0, 2, 6, 7]


def test_a_token_that_nobody_sees_is_masked_like_padding():
    batch = TokenBatch.make(ANSWERS, unseen=5)
    assert batch.mask_BL.tolist() == [[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]]
    assert batch.ids_BL.tolist() == TokenBatch.make(ANSWERS).ids_BL.tolist()


def test_shortest_answer():
    batch = TokenBatch.make([Answer([3], [1])])
    assert batch.ids_BL.tolist() == [[3]]
    assert batch.rows_N.tolist() == [0]
    assert batch.targets_N.tolist() == [1]


@pytest.mark.parametrize("answer", [Answer([], [1]), Answer([1], [])])
def test_empty_prompt_or_response(answer):
    with pytest.raises(ValueError, match="at least one token"):
        TokenBatch.make([ANSWERS[0], answer])


lengths = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=12)


@given(lengths, st.integers(1, 60))
def test_micro_batches_cover_everything_within_the_limit(sizes, limit):
    answers = [Answer([2] * prompt, [3] * response) for prompt, response in sizes]
    parts = list(micro_batches(answers, limit))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(len(answers)))
    for part in parts:
        assert part.stop > part.start
        assert part.stop == part.start + 1 or TokenBatch.make(answers[part]).ids_BL.numel() <= limit


@given(lengths, st.integers(1, 60))
def test_micro_batches_are_no_smaller_than_needed(sizes, limit):
    answers = [Answer([2] * prompt, [3] * response) for prompt, response in sizes]
    for part in micro_batches(answers, limit):
        if part.stop < len(answers):
            longer = answers[part.start : part.stop + 1]
            assert len(longer) * max(len(a.prompt_ids) + len(a.response_ids) for a in longer) > limit
