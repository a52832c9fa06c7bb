"""The registry of objectives, and what holds for every one of them: additive pieces, checked data, stated needs."""

import sys
from dataclasses import dataclass, fields, is_dataclass
from itertools import pairwise
from typing import ClassVar

import pytest
import torch

from ipvrm_core import objectives
from ipvrm_core.objectives import Objective, RewardBatch
from ipvrm_core.objectives.endorm import Endorm
from ipvrm_core.objectives.prime import Prime
from ipvrm_core.objectives.qrm import Qrm
from ipvrm_core.objectives.repirl import Repirl
from ipvrm_core.packing import cu_seqlens_from_lengths
from ipvrm_core.sequences.reward_losses import implicit_prm_loss, qrm_loss, repirl_loss, repirl_weights

TRAINED = [name for name in objectives.names() if objectives.find(name).trains]
LENGTHS, LABELS = [3, 1, 4, 2], torch.tensor([1.0, 0.0, 1.0, 0.0])
WEIGHTS = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)


def randn(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_batch(first: int, last: int) -> RewardBatch:
    """Answers first .. last of LENGTHS; pairs (0, 1), (2, 3)."""
    pairs = torch.arange(last - first).view(-1, 2)
    weights = WEIGHTS[first:last]
    return RewardBatch(
        cu_seqlens=cu_seqlens_from_lengths(torch.tensor(LENGTHS[first:last])),
        labels_B=LABELS[first:last],
        weights_B=weights,
        boundary_B=None,
        pairs_P2=pairs,
        pair_weights_P=weights[::2],
    )


def test_the_field_is_complete():
    assert objectives.names() == ["dpo", "endorm", "implicit_prm", "ipvrm", "prime", "qrm", "repirl"]


@pytest.mark.parametrize("name", objectives.names())
def test_an_objective_is_a_frozen_dataclass_with_usable_defaults(name):
    cls = objectives.find(name)
    assert cls.name == name
    assert is_dataclass(cls)
    assert cls.__dataclass_params__.frozen
    assert "beta" in {field.name for field in fields(cls)}
    assert cls() == cls(beta=cls().beta)
    assert cls.__doc__.strip()


@pytest.mark.parametrize("name", TRAINED)
def test_losses_of_pieces_add_up_and_so_do_their_gradients(name):
    objective, score = objectives.find(name)(), randn(10)
    results = []
    for cuts in ([0, 4], [0, 2, 4]):
        x, total = score.clone().requires_grad_(), 0.0
        for first, last in pairwise(cuts):
            rows = slice(sum(LENGTHS[:first]), sum(LENGTHS[:last]))
            total = total + objective.loss(x[rows], make_batch(first, last))
        results.append((total.detach(), torch.autograd.grad(total, x)[0]))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-12)
    assert results[0][1].abs().max() > 0


@pytest.mark.parametrize("name", TRAINED)
def test_gradients(name):
    objective = objectives.find(name)()
    assert torch.autograd.gradcheck(lambda x: objective.loss(x, make_batch(0, 4)), (randn(10).requires_grad_(),))


@pytest.mark.parametrize("name", TRAINED)
def test_a_step_down_the_gradient_ranks_right_above_wrong(name):
    """The sign of every loss: right answers' scores go up, wrong answers' down."""
    score = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(objectives.find(name)().loss(score, make_batch(0, 4)), score)
    for number, piece in enumerate(grad.split(LENGTHS)):
        assert (piece < 0).all() if LABELS[number] else (piece > 0).all()


@pytest.mark.parametrize("name", [name for name in TRAINED if not objectives.find(name).pairwise])
def test_bad_labels_are_refused(name):
    batch = make_batch(0, 4)
    for labels in (LABELS[:2], LABELS / 2):
        broken = RewardBatch(batch.cu_seqlens, labels, WEIGHTS)
        with pytest.raises(ValueError, match="labels must be"):
            objectives.find(name)().loss(randn(10), broken)


@pytest.mark.parametrize("name", [name for name in TRAINED if objectives.find(name).pairwise])
def test_missing_pairs_are_refused(name):
    batch = make_batch(0, 4)
    with pytest.raises(ValueError, match=f"objective '{name}' needs pairs_P2"):
        objectives.find(name)().loss(randn(10), RewardBatch(batch.cu_seqlens, LABELS, WEIGHTS))


def test_each_new_objective_is_its_formula():
    score, batch = randn(10), make_batch(0, 4)
    cu = batch.cu_seqlens
    assert torch.equal(
        Prime(beta=0.3).loss(score, batch), (WEIGHTS * implicit_prm_loss(score, cu, LABELS, beta=0.3)).sum()
    )
    qrm = qrm_loss(score, cu, batch.pairs_P2, beta=0.3, margin=1.5)
    assert torch.equal(Qrm(beta=0.3, margin=1.5).loss(score, batch), (WEIGHTS[::2] * qrm).sum())
    assert torch.equal(Repirl(beta=0.3).loss(score, batch), (WEIGHTS * repirl_loss(0.3 * score, cu, LABELS)).sum())


def test_defaults_are_the_published_ones():
    assert Prime().beta == 0.05
    assert (Qrm().beta, Qrm().margin) == (0.2, 2.0)
    assert Endorm().decay == 0.95


@pytest.mark.parametrize("options", [{}, {"length": "sum"}, {"expert_share": "experts"}])
def test_repirl_reweighs_with_its_settings(options):
    score, policy, batch = randn(10), -randn(10, 1).abs(), make_batch(0, 4)
    ours = Repirl(beta=0.3, **options).reweigh(score, policy, batch.cu_seqlens, LABELS, WEIGHTS)
    assert torch.equal(ours, repirl_weights(0.3 * score, policy, batch.cu_seqlens, LABELS, WEIGHTS, **options))
    failed = ours[LABELS == 0]
    assert failed.sum() == pytest.approx(1.0)
    plain = Repirl(beta=0.3).reweigh(score, policy, batch.cu_seqlens, LABELS, WEIGHTS)
    assert torch.equal(ours, plain) == (not options)


def test_endorm_discounts_from_the_start_of_the_answer():
    cu = torch.tensor([0, 3, 4])
    scored = Endorm(decay=0.5).token_scores(torch.tensor([-1.0, -2.0, -4.0, -3.0]), cu)
    assert scored.tolist() == [-1.0, -1.0, -1.0, -3.0]
    assert torch.equal(Endorm(decay=1.0).token_scores(scored, cu), scored)
    with pytest.raises(ValueError, match=r"decay must be in \(0, 1\]; got 0"):
        Endorm(decay=0.0)


@pytest.mark.parametrize("name", [name for name in objectives.names() if name != "endorm"])
def test_the_others_score_tokens_as_they_are(name):
    assert objectives.find(name)().token_scores(LABELS, torch.tensor([0, 4])) is LABELS


def test_what_the_objectives_state():
    """Declarations that the trainer acts on; each row is one objective."""
    stated = {
        name: (c.pairwise, c.trains, c.head, c.reference, c.boundary, c.dynamic_weights, c.reweighs)
        for name in objectives.names()
        for c in [objectives.find(name)]
    }
    assert stated == {
        "ipvrm": (False, True, "vocabulary", True, True, True, False),
        "implicit_prm": (False, True, "vocabulary", True, False, True, False),
        "dpo": (True, True, "vocabulary", True, False, True, False),
        "qrm": (True, True, "value", False, False, True, False),
        "endorm": (False, False, "vocabulary", False, False, True, False),
        "prime": (False, True, "vocabulary", True, False, False, False),
        "repirl": (False, True, "vocabulary", True, False, False, True),
    }


# ---- the registry


FILE = """
from dataclasses import dataclass
from typing import ClassVar
from ipvrm_core.objectives.base import Objective

@dataclass(frozen=True)
class Mine(Objective):
    name: ClassVar[str] = "{name}"
    beta: float = 2.0
"""


@pytest.fixture
def drop(tmp_path, monkeypatch):
    """drop(module, text): one more file in the folder of the objectives, gone after the test."""
    monkeypatch.setattr(objectives, "__path__", [*objectives.__path__, str(tmp_path)])
    made = []

    def write(module: str, text: str) -> None:
        (tmp_path / f"{module}.py").write_text(text)
        made.append(f"ipvrm_core.objectives.{module}")

    yield write
    for name in made:
        sys.modules.pop(name, None)
        vars(objectives).pop(name.rpartition(".")[2], None)


def test_one_more_file_is_one_more_objective(drop):
    drop("mine", FILE.format(name="mine"))
    assert "mine" in objectives.names()
    assert objectives.find("mine")().beta == 2.0


def test_the_file_of_the_last_test_is_gone():
    assert "mine" not in objectives.names()


def test_a_name_that_is_taken_twice(drop):
    drop("second", FILE.format(name="ipvrm"))
    with pytest.raises(ValueError, match="objective name 'ipvrm' is taken twice"):
        objectives.names()


@dataclass(frozen=True)
class Elsewhere(Objective):
    name: ClassVar[str] = "elsewhere"

    beta: float = 1.0


def test_an_objective_of_another_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "somebodys_package", sys.modules[__name__])
    assert objectives.find("somebodys_package:Elsewhere") is Elsewhere
    assert "elsewhere" not in objectives.names()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", "objective must be one of dpo, .*got 'nonsense'"),
        ("no_such_package:Thing", "'no_such_package:Thing' cannot be imported: No module"),
        ("torch:NoSuchName", "'torch:NoSuchName' cannot be imported"),
        ("torch:Tensor", "'torch:Tensor' must be a class that derives from Objective"),
        (":Thing", "cannot be imported"),
    ],
)
def test_what_is_no_objective(name, message):
    with pytest.raises(ValueError, match=message):
        objectives.find(name)
