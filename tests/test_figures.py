"""The script that draws the pictures of docs/how-it-works.md: its small world by hand, and that it draws."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from ipvrm_core.fused.head import default_buffer_bytes, rows_per_chunk

pytest.importorskip("matplotlib")
DOCS = Path(__file__).resolve().parents[1] / "docs"
SPEC = spec_from_file_location("figures", DOCS / "figures.py")
figures = module_from_spec(SPEC)
SPEC.loader.exec_module(figures)


def ids(text: str) -> torch.Tensor:
    return torch.tensor([figures.TOKENS.index(token) for token in text])


def test_chains_are_right_answers():
    assert figures.outcomes(figures.chains(50)).tolist() == [1.0] * 50


@pytest.mark.parametrize(
    ("text", "outcome", "error"),
    [
        ("2-7=5-5=0-1=9+9=8+3=1", 1, None),
        ("2-7=5-5=0-1=1+9=0+3=3", 0, 2),  # 0-1 is 9; what follows is right for what was written
        ("2-7=5-5=0-1=1+9=2+3=5", 0, None),  # two wrong steps
        ("2-7=5-5=0-1=1+9=8+3=1", 1, None),  # two that cancel: the outcome does not see them
        ("2-7=5-5=0-1=9+9=8+3=2", 0, 4),
        ("2-7=5-5=0-1=9+9=8+3==", 0, None),  # malformed
    ],
)
def test_outcome_and_first_error(text, outcome, error):
    assert figures.outcomes(ids(text)[None]).item() == outcome
    assert figures.first_error(ids(text)) == error


def test_the_models_learn_and_the_log_probs_sum_to_one():
    torch.manual_seed(0)
    policy = figures.train_policy(2)
    reward_model = figures.train_reward_model(policy, 2)
    answers = figures.sample(policy, 3)
    assert answers.shape == (3, 1 + 4 * figures.STEPS)
    old_NV, new_NV = figures.log_probs(policy, answers), figures.log_probs(reward_model, answers)
    torch.testing.assert_close(old_NV.exp().sum(1), torch.ones(3 * 4 * figures.STEPS))
    assert not torch.equal(old_NV, new_NV)
    with pytest.raises(RuntimeError, match="none of 3 answers"):
        figures.example(policy, reward_model, 3)


def test_it_draws(tmp_path):
    values_T = torch.linspace(0, -1, 4 * figures.STEPS)
    old_V = torch.full((len(figures.TOKENS),), 0.01)
    old_V[[1, 9]] = torch.tensor([0.4, 0.5])
    shown = figures.Example("2-7=5-5=0-1=1+9=0+3=3", values_T, 11, old_V, old_V - 0.45, 9)
    for name, draw in (("credit", lambda path: figures.draw_credit(shown, path)), ("chunk", figures.draw_chunk)):
        path = tmp_path / f"{name}.svg"
        draw(path)
        assert path.stat().st_size > 10_000
        assert (DOCS / f"{name}.svg").is_file()


def test_the_chunk_of_the_picture_is_the_chunk_of_the_code():
    n = rows_per_chunk(16384, 151936, 6, default_buffer_bytes(torch.device("cuda")))
    assert f"n = {n} rows" in figures.sizes()
