"""Padding lives in one place: which hidden state predicts which token, by hand, and nothing depends on the split."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ipvrm_core import linear_logprobs
from ipvrm_core.trainer.batching import Answer, TokenBatch, map_rows, micro_batches, response_hidden
from ipvrm_core.trainer.models import head_of, hidden_states

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


def test_shortest_answer():
    batch = TokenBatch.make([Answer([3], [1])])
    assert batch.ids_BL.tolist() == [[3]]
    assert batch.rows_N.tolist() == [0]
    assert batch.targets_N.tolist() == [1]


@pytest.mark.parametrize("answer", [Answer([], [1]), Answer([1], [])])
def test_empty_prompt_or_response(answer):
    with pytest.raises(ValueError, match="at least one token"):
        TokenBatch.make([ANSWERS[0], answer])


def _logprobs(model, answers: list[Answer]) -> torch.Tensor:
    weight, bias, _ = head_of(model)
    batch = TokenBatch.make(answers)
    return linear_logprobs(response_hidden(model, batch), weight, batch.targets_N[:, None], bias=bias).logprobs_NK[:, 0]


def test_log_probs_are_those_of_the_models_own_logits(tiny_model):
    model = tiny_model()
    with torch.no_grad():
        ours = _logprobs(model, ANSWERS)
        expected = []
        for answer in ANSWERS:
            ids = answer.prompt_ids + answer.response_ids
            logp = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            start = len(answer.prompt_ids)
            expected += [logp[t - 1, ids[t]] for t in range(start, len(ids))]
    torch.testing.assert_close(ours, torch.stack(expected), rtol=0, atol=1e-5)
    assert ours.std() > 0.5  # the tokens differ enough for a shift to show


def test_padding_changes_nothing(tiny_model):
    model = tiny_model()
    with torch.no_grad():
        alone = torch.cat([_logprobs(model, [answer]) for answer in ANSWERS])
        together = _logprobs(model, ANSWERS)
        padded_more = _logprobs(model, [*ANSWERS, Answer([2] * 30, [1] * 9)])[: len(together)]
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(padded_more, alone, rtol=0, atol=1e-5)


def test_hidden_states_and_head_make_the_logits(tiny_model):
    model = tiny_model()
    batch = TokenBatch.make(ANSWERS)
    weight, bias, _ = head_of(model)
    with torch.no_grad():
        logits = model(input_ids=batch.ids_BL, attention_mask=batch.mask_BL).logits
        ours = hidden_states(model, batch.ids_BL, batch.mask_BL) @ weight.T
    assert bias is None
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-4)


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


@pytest.mark.parametrize("max_tokens", [1, 7, 16, 10_000])
def test_map_rows_equals_one_big_batch(tiny_model, max_tokens):
    model = tiny_model()
    generator = torch.Generator().manual_seed(1)
    answers = [
        Answer(
            torch.randint(2, 19, (prompt,), generator=generator).tolist(),
            torch.randint(2, 19, (response,), generator=generator).tolist(),
        )
        for prompt, response in [(3, 4), (1, 1), (6, 2), (2, 8), (5, 5)]
    ]
    everything = TokenBatch.make(answers)
    seen = []

    def function(hidden, batch, rows):
        assert not torch.is_grad_enabled()
        seen.append(rows)
        return hidden, batch.targets_N, torch.arange(rows.start, rows.stop)

    hidden, targets, numbers = map_rows(model, answers, max_tokens, function)
    with torch.no_grad():
        expected = response_hidden(model, everything)
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)
    assert targets.tolist() == everything.targets_N.tolist()
    assert numbers.tolist() == list(range(20))
    assert len(seen) == {1: 5, 7: 5, 16: 4, 10_000: 1}[max_tokens]
