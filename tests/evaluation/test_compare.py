"""`ipvrm compare`: means over runs, runs in pairs, and the picture."""

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("pydantic")

from ipvrm_core.trainer.report import paired
from ipvrm_core.trainer.report.compare import compare, read_results
from ipvrm_core.trainer.report.compare_plot import draw


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def test_compare_gives_mean_and_sample_deviation(tmp_path):
    for seed, greedy in enumerate((0.5, 0.7)):
        folder = tmp_path / str(seed) / "eval"
        folder.mkdir(parents=True)
        results = {
            "policy-start": {"greedy": greedy, "prompts": 512},
            "rm-a": {"localisation": {"train/process": {"f1_oracle": 0.25}}},
        }
        (folder / "results.json").write_text(json.dumps(results))
    text = compare([tmp_path / "0", tmp_path / "1"])
    assert "| greedy | 0.600 ± 0.141 |" in text  # deviations -0.1 and 0.1: sqrt(0.02 / 1)
    assert "| prompts | 512 ± 0 |" in text
    assert "| localisation train/process f1_oracle | 0.250 ± 0.000 |" in text


@pytest.fixture
def paired_runs(tmp_path):
    """Three starts; GRPO and DistRL twice from each, by their `seed`; names differ, settings do not."""
    gains = [(0.10, 0.20), (0.00, 0.10), (0.20, 0.30)]  # means .15, .05, .25: mean .15, std .1
    for start, pair in enumerate(gains):
        rl = {
            f"{kind}{seed}": {"alpha": alpha, "seed": seed} for seed in (0, 1) for kind, alpha in (("g", 0), ("d", 1))
        }
        results = {"policy-start": {"greedy": 0.1, "avg@2": 0.1}}
        for seed, gain in enumerate(pair):
            results[f"policy-g{seed}"] = {"greedy": 0.5 + start, "avg@2": 0.4, "pass@2": 1.0, "all_steps": 0.3}
            results[f"policy-g{seed}"]["by_prompt"] = {"greedy": [0.5 + start, 0.5 + start]}
            results[f"policy-d{seed}"] = {"greedy": 0.5 + start + gain, "avg@2": 0.4, "all_steps": 0.2, "pass@2": 1.0}
        write_json(tmp_path / str(start) / "config.json", {"seed": start, "rl": rl})
        write_json(tmp_path / str(start) / "eval" / "results.json", results)
    return [tmp_path / str(start) for start in range(3)]


def test_compare_pairs_runs_of_equal_seeds(paired_runs):
    """t(2) = 4.303: .15 +- 4.303 * .1 / sqrt 3; within a start the two pairs differ by .1, so their std is .0707."""
    found = paired.outcomes(paired_runs, read_results(paired_runs))
    assert {recipe: list(places) for recipe, places in found.items()} == {
        recipe: [(start, seed) for start in range(3) for seed in (0, 1)] for recipe in ("g0", "d0")
    }
    row = paired.difference(found, "d0", "g0", "greedy")
    assert row[:4] == pytest.approx((0.15, 4.303 * 0.1 / 3**0.5, 0.1, 0.1 / 2**0.5))
    assert row[4:] == (6, 3)
    text = compare(paired_runs)
    assert "by_prompt" not in text
    assert text.startswith("| minus g0, in pairs | pairs of starts | greedy | avg@2 | all_steps |")
    assert "| d0 | 6 of 3 | +0.150 ± 0.248 (0.100 / 0.071) | +0.000 ± 0.000 (0.000 / 0.000) | -0.100" in text
    assert "| g0 | 6 of 3 | -0.150" in compare(paired_runs, "d0")
    assert "| d0 | 2 of 1 | +0.150 (– / 0.071) |" in compare(paired_runs[:1])  # one start: no interval
    with pytest.raises(ValueError, match=r"one of g0, d0; got 'd1'"):
        compare(paired_runs, "d1")


def test_only_equal_seeds_are_pairs(paired_runs):
    """Another seed of the RL phase, or a start that one of the two did not have, is no pair."""
    config = json.loads((paired_runs[0] / "config.json").read_text())
    for name in ("d0", "d1"):
        config["rl"][name]["seed"] += 5
    write_json(paired_runs[0] / "config.json", config)
    row = paired.difference(paired.outcomes(paired_runs, read_results(paired_runs)), "d0", "g0", "greedy")
    assert row.mean == pytest.approx(0.15)  # of .05 and .25
    assert row[4:] == (4, 2)
    write_json(paired_runs[2] / "config.json", config)
    with pytest.raises(ValueError, match=r"2: rl.g0 has the seeds \(0, 0\) of another run of g0"):
        compare([paired_runs[0], paired_runs[2]])


def test_without_configurations_nothing_is_paired(seeds):
    assert "in pairs" not in compare(seeds)


def test_one_recipe_alone_is_not_paired(paired_runs):
    for run in paired_runs:
        config = json.loads((run / "config.json").read_text())
        write_json(run / "config.json", config | {"rl": {name: config["rl"][name] for name in ("g0", "g1")}})
    assert "in pairs" not in compare(paired_runs)


@pytest.fixture
def seeds(tmp_path):
    """Two runs with a reward model, a value head (no candidate credit), and one that was updated online."""
    for seed, value in enumerate((0.25, 0.75)):
        credit = {"positions": 9, "chance": 0.4, "policy": 0.6}
        row = {"average": 0.3, "majority": 0.5, "best:vbar": value, "vote:vbar": 0.8, "pass": 0.9}
        full = {"candidate_credit": {**credit, "reward_model": value}, "best_of_n": {"4": row, "16": row}}
        results = {"rm-a": full, "rm-q": {"candidate_credit": credit}, "online-a": full}
        (tmp_path / f"{seed}/eval").mkdir(parents=True)
        (tmp_path / f"{seed}/eval/results.json").write_text(json.dumps(results))
    return [tmp_path / "0", tmp_path / "1"]


def test_compare_puts_reward_models_in_short(seeds):
    text = compare(seeds)
    assert text.startswith("| reward model | candidate credit | best of 4 | best of 16 | weighted vote of 16 |")
    assert "| a | 0.500 ± 0.354 | 0.500 ± 0.354 | 0.500 ± 0.354 | 0.800 ± 0.000 |" in text
    assert "| q | – | – | – | – |" in text  # what a model does not have is not a number
    assert "| a, online | 0.500" in text
    assert "| candidate_credit reward_model | 0.500 ± 0.354 | – |" in text


@pytest.mark.parametrize(("name", "start"), [("plot.png", b"\x89PNG"), ("plot.svg", b"<?xml")])
def test_the_picture_of_a_comparison(seeds, tmp_path, name, start):
    draw(seeds, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)
    if name.endswith("svg"):
        text = (tmp_path / name).read_text()
        assert all(f"<!-- {word} -->" in text or f">{word}<" in text for word in ("best of 16", "a, online", "chance"))
    assert not list(tmp_path.glob(".*tmp"))


def test_there_is_nothing_to_draw_without_reward_models(tmp_path):
    (tmp_path / "0/eval").mkdir(parents=True)
    (tmp_path / "0/eval/results.json").write_text(json.dumps({"policy-start": {"greedy": 0.5}}))
    with pytest.raises(ValueError, match="no reward models"):
        draw([tmp_path / "0"], tmp_path / "plot.png")


def test_compare_refuses_runs_of_other_models(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "eval").mkdir(parents=True)
        (tmp_path / name / "eval" / "results.json").write_text(json.dumps({f"policy-{name}": {"greedy": 0.5}}))
    with pytest.raises(ValueError, match=r"policy-b.*policy-a"):
        compare([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(FileNotFoundError, match="ipvrm eval"):
        compare([tmp_path / "c"])
