"""The report of synthetic runs: every number is on the page, what is missing is named, nothing is fetched."""

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("pydantic")

from ipvrm_core.trainer import config as configuration
from ipvrm_core.trainer.report import build, reliability, tables
from ipvrm_core.trainer.report.collect import collect
from ipvrm_core.trainer.report.page import duration, number, points
from ipvrm_core.trainer.report.plots import smooth, window

DEMO = Path(__file__).parents[2] / "trainer" / "configs" / "demo.toml"
PROTOCOLS = ("train/process", "train/prefix", "terse/process", "terse/prefix")
STEPS = 40
BINS = {  # sigma is right on average in the first place, too sure in the last
    "25": [{"low": 0.4, "high": 0.5, "count": 40, "predicted": 0.45, "right": 0.45}],
    "100": [
        {"low": 0.1, "high": 0.2, "count": 30, "predicted": 0.15, "right": 0.25},
        {"low": 0.9, "high": 1.0, "count": 10, "predicted": 0.95, "right": 0.55},
    ],
}


@pytest.fixture(scope="module")
def config():
    return configuration.load(DEMO)


def write_metrics(folder: Path, rows, finished: bool = True) -> None:
    folder.mkdir(parents=True)
    lines = [
        {"step": step, **row, "seconds": 0.5 + 0.01 * step, "peak_memory_mb": 700.0 + step}
        for step, row in enumerate(rows, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        (folder / "model").mkdir()


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def sft(run: Path) -> None:
    write_metrics(run / "sft", [{"nll": 3 * math.exp(-step / 15), "grad_norm": 1.0} for step in range(STEPS)])


def rollout(run: Path) -> None:
    write_metrics(run / "rollout", [{"tokens": 100}] * 3, finished=False)
    summary = {"prompts": 2048, "answers": 16384, "accuracy": 0.4442, "mixed_prompts": 0.583, "finished": 0.9997}
    write_json(run / "rollout" / "summary.json", {**summary, "verdict_ok": 16301, "verdict_timeout": 83})


def reward_model(run: Path, name: str, finished: bool = True) -> None:
    rows = [{"loss": 5 - step / 20, "grad_norm": 2.0} for step in range(STEPS)]
    for step in range(9, STEPS, 10):
        rows[step] |= {"held_out_auc": 0.6 + step / 200, "held_out_auc_sum": 0.61 + step / 200}
    write_metrics(run / "rm" / name, rows, finished)
    write_json(run / "rm" / name / "calibration.json", {"step": STEPS, "percent_of_answer": BINS})


def policy(run: Path, name: str, with_model: bool) -> None:
    noise = random.Random(name)
    rows = []
    for step in range(STEPS):
        row = {
            "accuracy": 0.4 + step / 200 + noise.gauss(0, 0.02),
            "mixed_prompts": 0.6 + noise.gauss(0, 0.03),
            "response_length": 30.0 + noise.gauss(0, 1),
            "entropy": 0.5 - step / 200,
            "kept_prompts": 32,
            "kl_old": 0.001,
            "kl_ref": 0.0,
            "clip_fraction": 0.02,
            "candidates": 1.6,
            "candidate_mass": 0.97,
            "several_candidates": 0.4,
            "verdict_timeout": 0,
            "new_quantity": float(step),
        }
        if with_model:
            row |= {"sigma_v": 20 + noise.gauss(0, 1), "rm_accuracy": 0.8, "process_std": 4.6, "credit": 0.9}
            row |= {"rm_auc": 0.8} if step % 7 else {}  # an unmixed batch has no AUC
        rows.append(row)
    write_metrics(run / "rl" / name, rows)


def evaluation(config) -> dict:
    """Results whose numbers are all different, so that each can be looked for on the page."""
    noise = random.Random(0)
    shares = iter(noise.sample([value / 1000 for value in range(100, 990)], 100))
    results = {}
    for index, name in enumerate(["start", *config.rl]):
        names = ("greedy", "avg@8", "pass@8", "all_steps_greedy", "all_steps")
        results[f"policy-{name}"] = {
            "prompts": 512,
            **{key: next(shares) for key in names},
            "response_length": 30.25 + index,
            "undecided": 4321 + index,
        }
    for index, name in enumerate(config.rm):
        cell = ("f1_oracle", "f1_transferred", "accuracy_erroneous", "accuracy_correct")
        results[f"rm-{name}"] = {
            "localisation": {key: {part: next(shares) for part in cell} for key in PROTOCOLS},
            "candidate_credit": {
                "positions": 732 + index,
                **{key: next(shares) for key in ("chance", "policy", "reward_model")},
            },
        }
        choosers = {key: next(shares) for key in ("drawn", "policy", "td", "best")}
        interval = {"gain": -0.0123, "gain_half_width": 0.0456}
        results[f"choices-rm-{name}"] = {"positions": 201 + index, **choosers, **interval}
        areas = {key: next(shares) for key in ("value", "mean", "abs_value", "td")}
        results[f"rank-{name}"] = {"prefixes": 301 + index, **areas}
    return results


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A finished run and its page, built once: read only."""
    run = tmp_path_factory.mktemp("whole")
    write_json(run / "config.json", json.loads(config.model_dump_json()))
    sft(run)
    rollout(run)
    for name in config.rm:
        reward_model(run, name)
    for name, rl in config.rl.items():
        policy(run, name, rl.reward_model is not None)
    write_json(run / "eval" / "results.json", evaluation(config))
    return build(config, run)


class Page(HTMLParser):
    """Text, headings and whatever an element points at."""

    def __init__(self, text: str):
        super().__init__()
        self.text, self.tags, self.links, self.ids, self.cells = [], [], [], [], []
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "td":
            self.cells.append("")
            self.in_cell = True
        for key, value in attributes:
            if key in ("src", "href", "xlink:href", "data", "action", "srcset", "poster"):
                self.links.append(value)
            if key == "id":
                self.ids.append(value)

    def handle_data(self, data):
        self.text.append(data)
        if self.in_cell:
            self.cells[-1] += data

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag != "td"


def test_whole_run_shows_every_number(config, whole):
    assert (whole.parent.name, whole.name) == ("report", "index.html")
    text = whole.read_text()
    cells = {cell.strip() for cell in Page(text).cells}

    def numbers(value):
        if not isinstance(value, dict):
            return [value]
        return [leaf for key, item in value.items() if not key.startswith("gain") for leaf in numbers(item)]

    for value in numbers(evaluation(config)):
        shown = f"{100 * value:.1f}" if 0 < value < 1 else number(value)
        assert shown in cells, f"{value} is not on the page as {shown}"
    cost = ("28.2 s", "0.705", "740", "1.6 s", "0.520", "703")  # sum and median of seconds, largest memory; of rollout
    for shown in ("16,384", "44.4", "58.3", "16,301", "83", *cost):
        assert shown in cells
    assert "\N{MINUS SIGN}1.2 ± 4.56" in cells
    assert "has not been run" not in text
    assert "is not finished" not in text
    assert "DistRL by sign, rm.implicit_prm, α = 1, GAE × 0.05" in text
    assert "GRPO, outcome reward only" in text
    assert (
        "qwen3 decoder from random weights, 2 layers × 128, float32. Trained on chain (min_ops = 4, max_ops = 8)"
        in text
    )


def test_the_report_says_which_policy_had_perfect_credit(config):
    assert tables.method(config, "oracle") == "DistRL with perfect credit, no reward model, α = 1"
    assert "perfect" not in tables.method(config, "distrl") + tables.method(config, "grpo")


def test_differences_are_judged_prompt_by_prompt(config, tmp_path):
    """Start and GRPO differ by 6 points each time; whether that is clear depends on how the prompts agree."""
    results = evaluation(config)
    start, better = [1] * 50 + [0] * 50, [1] * 56 + [0] * 44
    results["policy-start"] |= {"greedy": 0.5, "avg@8": 0.5, "by_prompt": {"greedy": start, "avg@8": start}}
    others = {"greedy": better, "avg@8": better[::-1]}  # the second is right where the start is wrong
    results["policy-grpo"] |= {"greedy": 0.56, "avg@8": 0.56, "by_prompt": others}
    results["policy-distrl"] |= {"greedy": 0.5, "avg@8": 0.5, "by_prompt": {"greedy": start}}
    write_json(tmp_path / "eval" / "results.json", results)
    found = tables.policies(collect(config, tmp_path))
    changes = {name: changes for name, _, _, changes, _ in found["rows"]}
    assert changes["start"] == {}
    greedy, sampled = (changes["rl.grpo"][key] for key in ("greedy", "avg@8"))
    assert greedy.mean == sampled.mean == pytest.approx(0.06)
    assert greedy.half_width == pytest.approx(1.96 * (0.06 * 0.94 / 99) ** 0.5)
    assert greedy.clear
    assert sampled.half_width > 0.19
    assert not sampled.clear
    assert found["against"] == "rl.grpo"
    pairs = dict(found["pairs"])
    assert pairs["rl.distrl"]["greedy"] == tables.Change(pytest.approx(-0.06), greedy.half_width)
    assert pairs["rl.distrl"]["avg@8"].half_width is None
    assert set(pairs) == {f"rl.{name}" for name in config.rl} - {"rl.grpo"}
    assert f"−6.0 ± {100 * greedy.half_width:.2f}" in build(config, tmp_path).read_text()


def test_page_is_self_contained(whole):
    text = whole.read_text()
    page = Page(text)
    assert all(link.startswith("#") for link in page.links)
    assert not set(page.tags) & {"script", "link", "iframe", "object", "embed", "base"}
    assert not re.search(r"url\((?!#)|@import", text)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links} | set(re.findall(r"url\(#([^)]+)\)", text)) <= set(page.ids)


def test_every_picture_is_also_a_png(whole):
    folder = whole.parent
    pngs = {path.stem for path in folder.glob("*.png")}
    assert len(pngs) == (folder / "index.html").read_text().count("<svg")
    assert {"sft-nll", "rm-loss", "rm-held_out_auc", "rl-accuracy", "rl-sigma_v", "rl-rm_auc"} <= pngs
    assert "rl-new_quantity" in pngs, "an unknown quantity is drawn too"
    assert not pngs & {"rl-kl_ref", "rl-verdict_timeout", "rl-seconds"}, "what was all zero is left out"
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.glob("*.png"))
    assert not list(folder.glob(".*"))


def test_reliability_by_hand(tmp_path):
    """ECE: 0 and 30/40 * 0.1 + 10/40 * 0.4 = 0.175. Points and bars stand where the numbers say."""
    figure = reliability.figure("rm.ipvrm", BINS)
    upper, lower = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in upper.lines}
    assert lines == {
        "calibrated": [[0, 0], [1, 1]],
        "after 25 %: ECE 0.000": [[0.45, 0.45]],
        "after 100 %: ECE 0.175": [[0.15, 0.25], [0.95, 0.55]],
    }
    bars = [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in lower.patches]
    assert [(round(x, 2), height) for x, height in bars] == [(0.43, 40), (0.17, 30), (0.97, 10)]  # side by side
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(lines)


def test_reliability_is_on_the_page(config, whole):
    text = whole.read_text()
    for name in config.rm:
        assert text.count(f'aria-label="rm.{name}: reliability of σ(v̄ₜ)"') == 1
        assert (whole.parent / f"rm-{name}-reliability.png").exists()
    assert "after 100 %: ECE 0.175" in text


def test_same_run_gives_the_same_page(config, tmp_path):
    sft(tmp_path)
    assert build(config, tmp_path).read_bytes() == build(config, tmp_path).read_bytes()


def test_partial_run_names_the_missing_commands(config, tmp_path):
    run = tmp_path / "a run"
    sft(run)
    reward_model(run, "ipvrm", finished=False)
    with (run / "sft" / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 41, "nl')  # cut short by a kill
    page = Page(build(config, run).read_text())
    text = " ".join(" ".join(page.text).split())
    place = f"'{run}/config.json' --run '{run}'"
    assert "sft has not" not in text
    assert f"rollout has not been run: ipvrm rollout {place}" in text
    steps = config.rm["ipvrm"].steps
    assert f"rm.ipvrm is not finished (step 40 of {steps}): ipvrm train-rm --name ipvrm {place} --resume" in text
    assert f"rm.implicit_prm has not been run: ipvrm train-rm --name implicit_prm {place}" in text
    assert f"rl.distrl has not been run: ipvrm rl --name distrl {place}" in text
    assert f"eval has not been run: ipvrm eval {place}" in text
    pngs = {path.stem for path in (run / "report").glob("*.png")}
    assert {"sft-nll", "rm-loss"} <= pngs
    assert not any(name.startswith("rl-") for name in pngs)


def test_evaluation_in_progress(config, tmp_path):
    results = evaluation(config)
    write_json(tmp_path / "eval" / "policy-start.json", results["policy-start"])
    text = build(config, tmp_path).read_text()
    assert f"{100 * results['policy-start']['pass@8']:.1f}" in text
    assert "eval is not finished (1 models so far)" in text


def test_empty_and_missing_folders(config, tmp_path):
    assert "sft has not been run" in build(config, tmp_path).read_text()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        build(config, tmp_path / "nowhere")


def test_run_without_steps_or_tasks(tmp_path):
    """A model by name, data from files: no SFT, no reward model, no checkable steps."""
    config = configuration.check(
        {"name": "r", "model": {"path": "a/b"}, "data": {"path": "x"}, "test": {"path": "y"}, "rl": {"grpo": {}}}
    )
    policies = {f"policy-{name}": {"prompts": 9, "greedy": 0.5, "avg@4": 0.25} for name in ("start", "grpo")}
    made = {
        "positions": 7,
        "drawn": 0.31,
        "policy": 0.32,
        "td": 0.33,
        "best": 0.34,
        "gain": 0.01,
        "gain_half_width": None,
    }
    choices = {"choices-rm-a": {"positions": 0}, "choices-online-grpo": made, "rank-a": {"prefixes": 0}}
    write_json(tmp_path / "eval" / "results.json", policies | choices)
    text = build(config, tmp_path).read_text()
    assert "rl.grpo, at its end</th><td>31.0</td><td>32.0</td><td>33.0</td><td>34.0</td>\n<td>+1.0</td>" in text
    assert "rm.a" not in text
    assert "<p>a/b, float32. Trained on x, tested on y; verifier: math.</p>" in text
    assert "Supervised" not in text
    assert "all steps" not in text
    assert "avg@4" in text


def test_reward_models_on_chats_without_policies(tmp_path):
    """Nothing is evaluated, and the page says what was trained on."""
    chats = {"path": "x.parquet", "kind": "pointwise"}
    rm = {"a": {"data": chats}, "b": {"data": {**chats, "validation_path": "v.parquet"}}, "c": {"data": chats}}
    config = configuration.check({"name": "r", "model": {"path": "a/b"}, "rm": rm})
    reward_model(tmp_path, "a")
    write_json(tmp_path / "eval" / "results.json", {})
    text = build(config, tmp_path).read_text()
    assert "<p>a/b, float32. Trained on x.parquet (rm.a, rm.c), x.parquet, validated on v.parquet (rm.b).</p>" in text
    assert "<h2>Results</h2>" not in text
    assert "rm.b has not been run" in text
    assert "rm.a: reliability" in text
    assert "rm.b: reliability" not in text


def test_names_are_escaped_and_the_folders_own_configuration_counts(config, tmp_path):
    run = tmp_path / "<i>y"
    named = config.model_copy(update={"name": "<b>x"})
    write_json(run / "config.json", json.loads(named.model_dump_json()))
    text = build(config, run).read_text()
    assert "<h1>&lt;b&gt;x</h1>" in text
    assert "&lt;i&gt;y/config.json" in text
    assert "<b>" not in text
    assert "<i>y" not in text


def test_smoothing_by_hand():
    assert smooth(np.array([0.0, 3.0, 6.0, 3.0]), 3) == pytest.approx([1.5, 3.0, 4.0, 4.5])
    assert [window(count) for count in (1, 29, 30, 80, 1200)] == [1, 1, 3, 5, 81]


def test_numbers_as_they_are_shown():
    assert [number(x) for x in (16384, 0.0, 0.5, 1.6049, 42.13, 123.4, 1234.5, 1e-7)] == (
        ["16,384", "0.00", "0.500", "1.60", "42.1", "123", "1,234", "1.00e-07"]
    )
    assert [points(x) for x in (0.0974, -0.02)] == ["+9.7", "\N{MINUS SIGN}2.0"]
    assert [duration(x) for x in (12.34, 245, 3720)] == ["12.3 s", "4 min 05 s", "1 h 02 min"]


def test_a_report_folder_that_leads_elsewhere_is_refused(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "report").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="report must be a folder of the run; got a symbolic link"):
        build(config, tmp_path / "run")
    assert not list((tmp_path / "elsewhere").iterdir())
