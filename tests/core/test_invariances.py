"""What must not change the policy loss: splitting, order, padding, masked garbage, a constant added to the logits."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipvrm_core.packing import cu_seqlens_from_lengths
from ipvrm_core.reference.candidates import select_candidates_from_logits
from ipvrm_core.reference.policy_loss import distrl_loss
from ipvrm_core.sequences.aggregation import Normalizers, branch_weights, candidate_mass, normalizers
from ipvrm_core.types import PolicyBatch, PolicyLossConfig
from tests.slots import change, from_branches

F64 = torch.float64
PAPER = PolicyLossConfig(alpha=0.5, kl_coef=0.1, entropy_coef=0.05)
OFFICIAL = PolicyLossConfig(alpha=0.5, dual_clip=3.0, candidate_clip_high=0.2, candidate_dual_clip=3.0)
SETTINGS = {"sequence_mean": PAPER, "token_mean": OFFICIAL}
LENGTHS = st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(lambda lengths: sum(lengths) > 0)
SEEDS = st.integers(0, 2**31)
aggregations = pytest.mark.parametrize("aggregation", SETTINGS)


@dataclass
class World:
    """A global batch in pieces that can be put together again: hidden states, head, sequences, mask."""

    hidden: torch.Tensor
    weight: torch.Tensor
    batch: PolicyBatch  # its weights are placeholders until `weighted`
    mask: torch.Tensor
    lengths: list[int]

    def take(self, order: list[int]) -> "World":
        """The sequences of `order`, in that order."""
        starts = [0, *torch.tensor(self.lengths).cumsum(0).tolist()]
        rows = torch.tensor([i for b in order for i in range(starts[b], starts[b + 1])], dtype=torch.int64)
        lengths = [self.lengths[b] for b in order]
        return World(self.hidden[rows], self.weight, self.batch.rows(rows), self.mask[rows], lengths)

    def cu(self) -> torch.Tensor:
        return cu_seqlens_from_lengths(torch.tensor(self.lengths))

    def totals(self) -> Normalizers:
        mass = candidate_mass(self.batch.ids_NS, self.batch.old_logprobs_NS)
        return normalizers(self.cu(), self.mask, mass)

    def weighted(self, totals: Normalizers, aggregation: str) -> PolicyBatch:
        tokens, candidates = branch_weights(self.cu(), self.mask, totals, aggregation, dtype=F64)
        return replace(self.batch, token_weights_N=tokens, candidate_weights_N=candidates)


def make_world(seed: int, lengths: list[int], D=4, V=9, K=3) -> World:
    generator = torch.Generator().manual_seed(seed)
    N = sum(lengths)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    hidden, weight = randn(N, D), randn(V, D)
    old = (hidden @ weight.T + 0.4 * randn(N, V)).log_softmax(-1)
    sampled = torch.randint(V, (N,), generator=generator)
    ids = torch.rand(N, V, generator=generator).argsort(1)[:, :K]
    padded = torch.rand(N, K, generator=generator) < 0.3
    batch = from_branches(
        sampled_ids_N=sampled,
        old_logprobs_N=old.gather(1, sampled[:, None])[:, 0],
        advantages_N=randn(N),
        token_weights_N=torch.ones(N, dtype=F64),
        candidate_ids_NK=ids.masked_fill(padded, -1),
        candidate_old_logprobs_NK=old.gather(1, ids).masked_fill(padded, 0.0),
        candidate_advantages_NK=randn(N, K).masked_fill(padded, 0.0),
        candidate_weights_N=torch.ones(N, dtype=F64),
        ref_logprobs_N=old.gather(1, sampled[:, None])[:, 0] + 0.3 * randn(N),
    )
    return World(hidden, weight, batch, torch.rand(N, generator=generator) < 0.8, lengths)


def evaluate(hidden, weight, batch, config, bias=None):
    """Loss and metrics in one dict, and the gradients of hidden and weight."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = distrl_loss(hidden, weight, batch, config, bias_V=bias)
    out.loss.backward()
    return {"loss": out.loss.detach(), **out.metrics}, hidden.grad, weight.grad


def assert_same(got, expected):
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def near(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@aggregations
@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, lengths=LENGTHS, data=st.data())
def test_any_split_into_micro_batches_and_ranks_gives_the_same_step(aggregation, seed, lengths, data):
    world, config = make_world(seed, lengths), SETTINGS[aggregation]
    expected, _, expected_weight_grad = evaluate(
        world.hidden, world.weight, world.weighted(world.totals(), aggregation), config
    )
    owner = data.draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
    pieces = [world.take([b for b, o in enumerate(owner) if o == piece]) for piece in sorted(set(owner))]
    # the normalisers of the pieces add up, as an all-reduce would add them
    totals = sum((piece.totals() for piece in pieces), Normalizers(0.0, 0.0, 0.0))
    near(torch.tensor(totals, dtype=F64), torch.tensor(world.totals(), dtype=F64))
    summed, summed_grad = {name: torch.zeros((), dtype=F64) for name in expected}, torch.zeros_like(world.weight)
    for piece in pieces:
        metrics, _, weight_grad = evaluate(piece.hidden, world.weight, piece.weighted(totals, aggregation), config)
        summed = {name: value + metrics[name] for name, value in summed.items()}
        summed_grad += weight_grad
    assert_same(summed, expected)
    near(summed_grad, expected_weight_grad)


@aggregations
def test_rows_of_one_weighted_batch_add_up_even_inside_a_sequence(aggregation):
    world, config = make_world(0, [4, 3, 5]), SETTINGS[aggregation]
    batch = world.weighted(world.totals(), aggregation)
    whole, _, whole_grad = evaluate(world.hidden, world.weight, batch, config)
    a, _, a_grad = evaluate(world.hidden[:2], world.weight, batch.rows(slice(0, 2)), config)
    b, _, b_grad = evaluate(world.hidden[2:], world.weight, batch.rows(torch.arange(2, 12)), config)
    assert_same({name: a[name] + b[name] for name in whole}, whole)
    near(a_grad + b_grad, whole_grad)


@aggregations
@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, lengths=LENGTHS, data=st.data())
def test_the_order_of_the_sequences_does_not_matter(aggregation, seed, lengths, data):
    world, config = make_world(seed, lengths), SETTINGS[aggregation]
    moved = world.take(data.draw(st.permutations(range(len(lengths)))))
    results = [evaluate(w.hidden, w.weight, w.weighted(w.totals(), aggregation), config) for w in (world, moved)]
    assert_same(results[1][0], results[0][0])
    near(results[1][2], results[0][2])


@aggregations
@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, lengths=LENGTHS, huge=st.sampled_from([1.0, 1e4, -1e4, 1e9, -1e9, 1e30, -1e30]))
def test_masked_rows_and_padded_slots_may_hold_garbage(aggregation, seed, lengths, huge):
    world, config = make_world(seed, lengths), SETTINGS[aggregation]
    batch = world.weighted(world.totals(), aggregation)
    dead_N, live_NK = ~world.mask, (batch.ids_NS[:, 1:] >= 0) & world.mask[:, None]
    dirty = change(
        batch,
        sampled_ids_N=batch.ids_NS[:, 0].masked_fill(dead_N, 8),
        old_logprobs_N=batch.old_logprobs_NS[:, 0].masked_fill(dead_N, huge),
        advantages_N=batch.advantages_NS[:, 0].masked_fill(dead_N, huge),
        ref_logprobs_N=batch.ref_logprobs_N.masked_fill(dead_N, huge),
        candidate_old_logprobs_NK=batch.old_logprobs_NS[:, 1:].masked_fill(~live_NK, huge),
        candidate_advantages_NK=batch.advantages_NS[:, 1:].masked_fill(~live_NK, -huge),
    )
    clean = evaluate(world.hidden, world.weight, batch, config)
    got = evaluate(world.hidden, world.weight, dirty, config)
    assert_same(got[0], clean[0])
    near(got[1], clean[1])
    near(got[2], clean[2])
    assert not got[1][dead_N].any()
    mass = candidate_mass(dirty.ids_NS, dirty.old_logprobs_NS)
    near(mass[world.mask], candidate_mass(batch.ids_NS, batch.old_logprobs_NS)[world.mask])


@aggregations
@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, lengths=LENGTHS, extra=st.integers(1, 3))
def test_more_masked_tokens_and_more_padded_slots_change_nothing(aggregation, seed, lengths, extra):
    world, config = make_world(seed, lengths), SETTINGS[aggregation]
    expected = evaluate(world.hidden, world.weight, world.weighted(world.totals(), aggregation), config)
    other = make_world(seed + 1, [extra])
    other.mask[:] = False
    given = [name for name, value in vars(world.batch).items() if value is not None]
    batch = {name: torch.cat([getattr(world.batch, name), getattr(other.batch, name)]) for name in given}
    for name, fill in (("ids_NS", -1), ("old_logprobs_NS", 0.0), ("advantages_NS", 3.0)):
        batch[name] = torch.cat([batch[name], batch[name].new_full((len(batch[name]), extra), fill)], dim=1)
    longer = World(
        torch.cat([world.hidden, other.hidden]),
        world.weight,
        PolicyBatch(**batch),
        torch.cat([world.mask, other.mask]),
        [*lengths, extra],
    )
    near(torch.stack(longer.totals()), torch.stack(world.totals()))
    got = evaluate(longer.hidden, longer.weight, longer.weighted(longer.totals(), aggregation), config)
    assert_same(got[0], expected[0])
    near(got[2], expected[2])


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, lengths=LENGTHS, shift=st.floats(-30, 30))
def test_a_constant_added_to_every_logit_changes_nothing(seed, lengths, shift):
    world = make_world(seed, lengths)
    batch = world.weighted(world.totals(), "sequence_mean")
    expected = evaluate(world.hidden, world.weight, batch, PAPER)
    got = evaluate(world.hidden, world.weight, batch, PAPER, bias=torch.full((9,), shift, dtype=F64))
    assert_same(got[0], expected[0])
    near(got[2], expected[2])


def loops(world: World, alpha: float, aggregation: str, dual: float | None, candidate_high: float) -> torch.Tensor:
    """Sections 4 and 5 of the method again, token by token, sharing nothing with the library."""

    def term(rho, A, high):
        surrogate = min(rho * A, max(0.8, min(1 + high, rho)) * A)
        return -max(surrogate, dual * A) if dual and A < 0 else -surrogate

    p = torch.softmax(world.hidden @ world.weight.T, dim=1)
    row, sampled, dist, mass = 0, [], [], 0.0
    for length in world.lengths:
        sampled.append([])
        dist.append([])
        for _ in range(length):
            if world.mask[row]:
                rho = p[row, world.batch.ids_NS[:, 0][row]] / world.batch.old_logprobs_NS[:, 0][row].exp()
                sampled[-1].append(term(rho, world.batch.advantages_NS[:, 0][row], 0.28))
                dist[-1].append(torch.zeros((), dtype=F64))
                for k, v in enumerate(world.batch.ids_NS[:, 1:][row].tolist()):
                    if v >= 0:
                        old = world.batch.old_logprobs_NS[:, 1:][row, k].exp()
                        A = world.batch.advantages_NS[:, 1:][row, k]
                        dist[-1][-1] = dist[-1][-1] + old * term(p[row, v] / old, A, candidate_high)
                        mass += old
            row += 1
    if aggregation == "sequence_mean":
        branches = [[sum(s) / len(s) for s in branch if s] for branch in (sampled, dist)]
        tok, cand = (sum(b) / len(b) for b in branches)
    else:
        tok = sum(sum(s) for s in sampled) / sum(len(s) for s in sampled)
        cand = sum(sum(d) for d in dist) / mass if mass else 0.0
    return tok + alpha * cand + 0 * p.sum()  # clipped everywhere: the gradient is zero, not missing


SMALL = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, lengths=SMALL, alpha=st.sampled_from([0.0, 0.1, 1.0]))
@pytest.mark.parametrize(("aggregation", "dual", "high"), [("sequence_mean", None, 0.28), ("token_mean", 3.0, 0.2)])
def test_the_loss_is_the_formula_written_in_loops(aggregation, dual, high, seed, lengths, alpha):
    """alpha = 0: GRPO, with its gradient."""
    world = make_world(seed, lengths)
    world.mask[0] = True
    config = PolicyLossConfig(alpha=alpha, dual_clip=dual, candidate_dual_clip=dual, candidate_clip_high=high)
    got = evaluate(world.hidden, world.weight, world.weighted(world.totals(), aggregation), config)
    world.weight.requires_grad_()
    expected = loops(world, alpha, aggregation, dual, high)
    expected.backward()
    near(got[0]["loss"], expected.detach())
    near(got[2], world.weight.grad)


def test_p_min_one_is_grpo():
    world = make_world(3, [4, 3])
    world.mask[0] = True
    logits = world.hidden @ world.weight.T
    got = select_candidates_from_logits(logits, world.batch.ids_NS[:, 0], p_min=1.0)
    world.batch = change(
        world.batch,
        candidate_ids_NK=got.ids_NS[:, 1:],
        candidate_old_logprobs_NK=got.logprobs_NS[:, 1:],
        candidate_advantages_NK=torch.ones_like(got.logprobs_NS[:, 1:]),
    )
    out = evaluate(world.hidden, world.weight, world.weighted(world.totals(), "sequence_mean"), PolicyLossConfig())
    near(out[0]["loss"], loops(world, 0.0, "sequence_mean", None, 0.28))
    assert out[0]["loss_candidates"] == 0.0
