"""What a LanguageModel computes at its head is what plain logits say, however it is batched, wrapped and cast.

The reference functions of the library see whole logits, made one answer at a time, without padding.
"""

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import log_softmax

from ipvrm_core import PolicyBatch, PolicyLossConfig
from ipvrm_core.reference.candidates import select_candidates_from_logits
from ipvrm_core.reference.policy_loss import distrl_loss_from_logits
from ipvrm_core.trainer.batching import Answer, TokenBatch
from ipvrm_core.trainer.config import Lora
from ipvrm_core.trainer.language_model import LanguageModel
from ipvrm_core.trainer.models import add_lora
from tests.batches import full_logits, with_value_head

T = 0.7
LENGTHS = [(3, 4), (1, 1), (6, 2), (2, 8), (5, 5)]  # of prompts and responses
N = sum(response for _, response in LENGTHS)
LIMITS = pytest.mark.parametrize("limit", [1, 7, 16, 10_000])  # padded tokens: 1 to 5 micro-batches


def _answers() -> list[Answer]:
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return torch.randint(2, 19, (count,), generator=generator).tolist()

    return [Answer(ids(prompt), ids(response)) for prompt, response in LENGTHS]


ANSWERS = _answers()
TARGETS = torch.tensor([token for answer in ANSWERS for token in answer.response_ids])


@pytest.fixture
def slots() -> torch.Tensor:
    """Ids [N, 3], a third of the candidates padding."""
    generator = torch.Generator().manual_seed(2)
    ids_NK = torch.randint(0, 19, (N, 2), generator=generator)
    return torch.cat([TARGETS[:, None], ids_NK.where(torch.rand(N, 2, generator=generator) > 1 / 3, -1)], dim=1)


@torch.no_grad()
def _gathered(model, ids_NS: torch.Tensor) -> torch.Tensor:
    logp_NV = log_softmax(full_logits(LanguageModel(model), ANSWERS) / T, dim=-1)
    return logp_NV.gather(1, ids_NS.clamp(min=0)).where(ids_NS >= 0, 0.0)


def _close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


# ---- without a gradient


@LIMITS
def test_log_probs_are_those_of_the_models_own_logits(tiny_model, slots, limit):
    model = tiny_model()
    made = LanguageModel(model, temperature=T, max_tokens=limit)
    expected = _gathered(model, slots)
    _close(made.logprobs(ANSWERS), expected[:, 0])
    _close(made.slot_logprobs(ANSWERS, slots), expected)
    assert (slots < 0).any()
    assert expected[:, 0].std() > 0.5  # the tokens differ enough for a shift to show


def test_padding_changes_nothing(tiny_model):
    made = LanguageModel(tiny_model())
    together = made.logprobs(ANSWERS)
    _close(together, torch.cat([made.logprobs([answer]) for answer in ANSWERS]))
    _close(made.logprobs([*ANSWERS, Answer([2] * 30, [1] * 9)])[:N], together)


@LIMITS
@pytest.mark.parametrize("rule", [{}, {"top_k": 1, "keep_sampled": True, "strict": True}], ids=["plain", "official"])
def test_candidates(tiny_model, limit, rule):
    model = tiny_model(scale=4.0)
    exclude_N = torch.arange(N) % 5 == 0
    made = LanguageModel(model, temperature=T, max_tokens=limit)
    ours = made.candidates(ANSWERS, 0.15, exclude_N, **rule)
    with torch.no_grad():
        given = full_logits(made, ANSWERS), TARGETS, 0.15
    expected = select_candidates_from_logits(*given, exclude_N=exclude_N, temperature=T, **rule)
    for own, other in zip(ours, expected, strict=True):
        _close(own, other)
    assert expected.counts_N[~exclude_N].max() > 1
    assert not expected.counts_N[exclude_N].any()


@LIMITS
def test_td_errors(tiny_model, slots, limit):
    model, old_NS = tiny_model(), _gathered(tiny_model(1), slots)
    ours = LanguageModel(model, temperature=T, max_tokens=limit).td_errors(ANSWERS, slots, old_NS, 0.3)
    _close(ours, (0.3 * (_gathered(model, slots) - old_NS)).where(slots >= 0, 0.0))


@LIMITS
def test_values_are_of_the_state_after_each_token(tiny_model, limit):
    model = with_value_head(tiny_model())
    made = LanguageModel(model, temperature=T, max_tokens=limit)
    expected = []
    with torch.no_grad():
        for answer in ANSWERS:
            ids = torch.tensor([answer.prompt_ids + answer.response_ids])
            hidden = model.get_decoder()(input_ids=ids).last_hidden_state[0, len(answer.prompt_ids) :]
            expected.append(model.value_head(hidden)[:, 0])
    _close(made.values(ANSWERS), torch.cat(expected))
    assert made.value_head is model.value_head


@pytest.mark.parametrize(("limit", "parts"), [(1, 5), (7, 5), (16, 4), (10_000, 1)])
def test_micro_batches_come_in_order_with_their_rows(tiny_model, limit, parts):
    made, seen = LanguageModel(tiny_model(), max_tokens=limit), []

    def function(batch: TokenBatch, rows: slice):
        assert not torch.is_grad_enabled()
        seen.append(rows)
        return batch.targets_N, torch.arange(rows.start, rows.stop)

    targets_N, rows_N = made._map(ANSWERS, function)
    assert targets_N.tolist() == TARGETS.tolist()
    assert rows_N.tolist() == list(range(N))
    assert len(seen) == parts
    made._map(ANSWERS, function, max_tokens=10_000)  # another budget
    assert len(seen) == parts + 1


def test_what_it_knows_of_its_model(tiny_model):
    made = LanguageModel(tiny_model())
    assert made.positions == 256
    assert made.device == torch.device("cpu")
    assert made.value_head is None


# ---- with one


def _policy_batch(slots: torch.Tensor, model) -> PolicyBatch:
    generator = torch.Generator().manual_seed(3)
    return PolicyBatch.of(
        slots,
        _gathered(model, slots),
        torch.randn(slots.shape, generator=generator),
        TokenBatch.make(ANSWERS).cu_seqlens,
        ref_logprobs_N=_gathered(model, slots)[:, 0] - 0.1,
    )


def _gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


CONFIG = PolicyLossConfig(alpha=0.5, kl_coef=0.2, entropy_coef=0.1)  # its temperature is the model's


@pytest.mark.parametrize("lora", [None, Lora(rank=2, alpha=4.0)], ids=["full", "lora"])
def test_the_policy_loss_and_its_gradient(tiny_model, slots, lora):
    """Of every trained weight, against autograd through the model's own logits; in micro-batches too."""
    model, rows = tiny_model(), _policy_batch(slots, tiny_model(1))
    if lora:
        model = add_lora(model, lora)
    made = LanguageModel(model, temperature=T)
    expected = distrl_loss_from_logits(full_logits(made, ANSWERS) / T, rows, CONFIG)
    expected.loss.backward()
    gradients = _gradients(model)
    assert len(gradients) > 5
    for cuts in ([0, 5], [0, 2, 3, 5]):
        total, row, metrics = 0.0, 0, dict.fromkeys(expected.metrics, 0.0)
        for start, stop in pairwise(cuts):
            batch = made.batch(ANSWERS[start:stop])
            part = slice(row, row + len(batch.targets_N))
            row = part.stop
            loss, own = made.policy_loss(batch, rows.rows(part), CONFIG)
            loss.backward()
            total += loss.detach()
            metrics = {name: value + own[name] for name, value in metrics.items()}
        torch.testing.assert_close(total, expected.loss.detach(), rtol=1e-5, atol=1e-5)
        for name, value in expected.metrics.items():
            torch.testing.assert_close(metrics[name], value, rtol=1e-4, atol=1e-5)
        ours = _gradients(model)
        assert ours.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


def test_log_probs_have_a_gradient(tiny_model):
    model = tiny_model()
    made = LanguageModel(model, temperature=T)
    made.batch_logprobs(made.batch(ANSWERS[:1])).sum().backward()
    ours = _gradients(model)
    logits, response = full_logits(made, ANSWERS[:1]), ANSWERS[0].response_ids
    log_softmax(logits / T, dim=-1).gather(1, torch.tensor(response)[:, None]).sum().backward()
    for name, gradient in _gradients(model).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-4)


# ---- precision and wrappers


def test_autocast_reaches_the_layers_and_not_the_head(tiny_model):
    model, seen = tiny_model(), []
    made = LanguageModel(model, temperature=T, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    model.model.layers[0].mlp.register_forward_hook(lambda *call: seen.append(call[-1].dtype))

    def at_head(hidden_nD, head):
        return hidden_nD @ head.weight.T, torch.is_autocast_enabled("cpu")

    with torch.no_grad():
        logits, inside = made(made.batch(ANSWERS), at_head)
    assert seen == [torch.bfloat16]
    assert (inside, logits.dtype) == (False, torch.float32)
    ours = made.logprobs(ANSWERS)
    assert ours.dtype == torch.float32
    _close(ours, log_softmax(logits / T, dim=-1).gather(1, TARGETS[:, None])[:, 0])
    assert not torch.is_autocast_enabled("cpu")


@pytest.fixture
def one_process():
    """A process group of this process alone: hooks and shards are those of many."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _ddp(model):
    return LanguageModel(torch.nn.parallel.DistributedDataParallel(model), temperature=T)


def _fsdp2(model):
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.model.layers[0])
    return fully_shard(LanguageModel(model, temperature=T))


@pytest.mark.parametrize("wrap", [_ddp, _fsdp2])
def test_a_wrapped_model_computes_the_same(tiny_model, slots, one_process, wrap):
    rows, found = _policy_batch(slots, tiny_model(1)), []
    for made in (LanguageModel(tiny_model(), temperature=T), wrap(tiny_model())):
        loss, _ = made.policy_loss(made.batch(ANSWERS), rows, CONFIG)
        loss.backward()
        grads = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in made.parameters()]
        found.append((loss.detach(), made.slot_logprobs(ANSWERS, slots), *grads))
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(other, own, rtol=1e-5, atol=1e-5)
