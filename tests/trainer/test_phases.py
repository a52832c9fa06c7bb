"""The phases in one process: what each schedule of the reward model does, what GRPO is a special case of, adapters."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from ipvrm_core.trainer.config import ConfigError, check
from ipvrm_core.trainer.experiment import Experiment
from ipvrm_core.trainer.metrics import computed
from ipvrm_core.trainer.models import load_pretrained
from ipvrm_core.trainer.phases import evaluate, rl, rollout, sft, train_rm
from ipvrm_core.trainer.phases.training import AlreadyStartedError
from tests import tiny_runs
from tests.tiny_runs import BATCH

pytestmark = pytest.mark.slow

BASE = {**tiny_runs.BASE, "rm": {"prefix": {"steps": 5, "batch": 16, "optim": {"lr": 1e-3}}}}
RL = {"steps": 2, "minibatch": 12, "batch": BATCH, "optim": {"lr": 1e-3}}


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A run folder with finished sft, rollout and rm/prefix."""
    folder = tmp_path_factory.mktemp("start")
    experiment = Experiment(check(BASE), folder)
    sft.run(experiment)
    rollout.run(experiment)
    train_rm.run(experiment, "prefix")
    return folder


@pytest.fixture
def train(start, tmp_path):
    """train(**changes of the policy run) -> (metrics of every step, folder of the run), from the shared start."""
    count = iter(range(100))

    def run(model=None, **changes):
        folder = tmp_path / str(next(count))
        for phase in ("sft", "rollout", "rm"):
            shutil.copytree(start / phase, folder / phase)
        batch = {**BATCH, **changes.pop("batch", {})}
        config = {**BASE, "rl": {"x": {**RL, **changes, "batch": batch}}}
        rl.run(Experiment(check({**config, "model": {**BASE["model"], **(model or {})}}), folder), "x")
        lines = [json.loads(line) for line in (folder / "rl/x/metrics.jsonl").read_text().splitlines()]
        return [computed(line) for line in lines], folder

    return run


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / "rl/x/model/model.safetensors").read_bytes()).hexdigest()


def _reward_model(update: str, **more) -> dict:
    return {"name": "prefix", "update": update, "batch": 8, "optim": {"lr": 1e-3}, **more}


POLICY = ("loss_sampled", "loss_candidates", "sigma_v", "rm_auc", "process_std")


def test_when_the_reward_model_is_updated(train):
    """In the first step `after` scores like `none`, `before` does not; from the second step on all three differ."""
    runs = {update: train(reward_model=_reward_model(update))[0] for update in ("none", "before", "after")}
    first = {update: [lines[0][name] for name in POLICY] for update, lines in runs.items()}
    assert first["after"] == first["none"]
    assert first["before"] != first["none"]
    assert runs["after"][1]["sigma_v"] != runs["none"][1]["sigma_v"]
    assert runs["none"][0]["accuracy"] == runs["before"][0]["accuracy"]  # the same answers in the first step
    assert "rm_loss" not in runs["none"][0]
    assert all("rm_loss" in line for update in ("before", "after") for line in runs[update])


def test_without_its_two_coefficients_distrl_is_grpo(train):
    """alpha = 0 and process_coef = 0: the reward model has no say, and the weights are those of GRPO to the bit."""
    _, plain = train()
    _, silent = train(reward_model=_reward_model("none"), method={"alpha": 0.0, "process_coef": 0.0})
    _, speaking = train(reward_model=_reward_model("none"), method={"alpha": 0.0})
    _, distribution = train(reward_model=_reward_model("none"), method={"alpha": 1.0, "process_coef": 0.0})
    assert _digest(silent) == _digest(plain)
    assert len({_digest(plain), _digest(speaking), _digest(distribution)}) == 3


def test_the_official_preset_and_the_other_switches_run(train):
    lines, _ = train(
        preset="official",
        epochs=2,
        kl_coef=0.1,
        entropy_coef=0.01,
        batch={"too_few_mixed": "fill", "keep_prompts": 12},
        method={"online_reference": "sft"},
        reward_model=_reward_model("before"),
    )
    assert [line["kept_prompts"] for line in lines] == [12, 12]  # filled with unmixed prompts
    assert all(line["kl_ref"] > 0 for line in lines)  # several policy steps a batch: away from the start
    assert all(line["candidates"] <= 5 for line in lines)


def test_td_errors_against_the_start_or_the_sampling_policy(train):
    """The two are one in the first step, and part in the second."""
    runs = [train(reward_model=_reward_model("none"), method={"td_reference": name}) for name in ("old", "sft")]
    (first, second), (other_first, other_second) = (lines for lines, _ in runs)
    assert first["rm_score_per_token"] == pytest.approx(other_first["rm_score_per_token"], abs=1e-5)
    assert second["rm_score_per_token"] != pytest.approx(other_second["rm_score_per_token"], abs=1e-5)
    assert len({_digest(folder) for _, folder in runs}) == 2


def test_adapters_through_the_phases(train, start):
    """LoRA for policy and reward model; the saved policy is a plain model that moved away from the start.

    The reward model was trained as a whole, so that there is no base for both.
    """
    lora = {"rank": 4, "alpha": 8.0}
    with pytest.raises(FileNotFoundError, match="model_adapter does not exist"):
        train(model={"lora": lora}, reward_model=_reward_model("before"))
    lines, folder = train(model={"lora": {**lora, "one_base": False}}, reward_model=_reward_model("before"))
    assert len(lines) == 2
    saved, before = load_pretrained(folder / "rl/x/model"), load_pretrained(start / "sft/model")
    own, start_weights = saved.state_dict(), before.state_dict()
    assert own.keys() == start_weights.keys()
    changed = {name for name in own if not torch.equal(own[name], start_weights[name])}
    assert changed
    assert all("proj" in name for name in changed)  # neither embedding, head nor norms
    (newest,) = (folder / "rl/x").glob("step-*")
    assert (newest / "policy.safetensors").stat().st_size < (folder / "rl/x/model/model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("objective", "pairing"), [("implicit_prm", "covering"), ("dpo", "covering"), ("ipvrm", "disjoint")]
)
def test_every_objective_learns_to_rank(start, tmp_path, objective, pairing):
    """On the training prompts themselves, where right answers must come to score higher."""
    for phase in ("sft", "rollout"):
        shutil.copytree(start / phase, tmp_path / phase)
    settings = {"objective": objective, "pairing": pairing, "steps": 40, "batch": 16, "optim": {"lr": 1e-3}}
    experiment = Experiment(check({**BASE, "rm": {"y": settings}}), tmp_path)
    train_rm.run(experiment, "y")
    groups = [g for g in rollout.read(tmp_path / "rollout")[:16] if 0 < sum(g.correct) < len(g.correct)]
    built, trained = experiment.config.rm["y"].build(), experiment.load(tmp_path / "rm/y/model")
    before = train_rm.validate(experiment, experiment.start_policy(), groups, built)["held_out_auc_sum"]
    after = train_rm.validate(experiment, trained, groups, built)["held_out_auc_sum"]
    assert before == 0.5  # the start is its own reference: all scores are 0
    assert after > 0.8


def test_evaluation_of_all_models(train):
    _, folder = train()
    experiment = Experiment(check(json.loads((folder / "config.json").read_text())), folder)
    evaluate.run(experiment)
    results = json.loads((folder / "eval/results.json").read_text())
    assert set(results) == {"policy-start", "policy-x", "rm-prefix"}
    policy = results["policy-start"]
    assert policy["prompts"] == 8
    assert 0 <= policy["all_steps"] <= policy["avg@2"] <= policy["pass@2"] <= 1
    assert policy["undecided"] == 0
    assert set(policy["by_prompt"]) == {"greedy", "avg@2", "all_steps_greedy", "all_steps"}
    for key, shares in policy["by_prompt"].items():
        assert len(shares) == 8
        assert sum(shares) / 8 == pytest.approx(policy[key])
    for value in results["rm-prefix"]["localisation"].values():
        assert 0 <= value["f1_transferred"] <= value["f1_oracle"] <= 1
    train_style = results["rm-prefix"]["localisation"]["train/process"]
    assert train_style["f1_transferred"] == train_style["f1_oracle"]  # tuned and measured on the same traces
    assert results["rm-prefix"]["candidate_credit"]["positions"] > 0


def test_evaluation_makes_what_is_missing(train):
    """The last model was judged, an earlier one not: it alone is judged, and its line of metrics comes last."""
    _, folder = train()
    experiment = Experiment(check(json.loads((folder / "config.json").read_text())), folder)
    evaluate.run(experiment)
    results = (folder / "eval/results.json").read_text()
    for name in ("results", "policy-start"):
        (folder / f"eval/{name}.json").unlink()
    kept = (folder / "eval/rm-prefix.json").stat()
    evaluate.run(experiment, resume=True)
    assert (folder / "eval/results.json").read_text() == results
    assert (folder / "eval/rm-prefix.json").stat() == kept
    lines = [json.loads(line) for line in (folder / "eval/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]


def test_evaluation_of_a_reward_model_after_its_updates(train, monkeypatch):
    """It is saved beside the policy, and judged against what it was last compared with."""
    _, folder = train(reward_model=_reward_model("before"), method={"online_reference": "sft"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    config["eval"] |= {"best_of_n": [1, 2], "prompts": 24, "choice_prompts": 12}
    experiment = Experiment(check(config), folder)
    evaluate.run(experiment)
    results = json.loads((folder / "eval/results.json").read_text())
    assert set(results) == {
        "policy-start",
        "policy-x",
        "rm-prefix",
        "online-x",
        "choices-rm-prefix",
        "choices-online-x",
    }
    first, last = results["choices-rm-prefix"], results["choices-online-x"]
    assert min(first["positions"], last["positions"]) > 0
    assert first["continuations"] >= 2 * 2 * first["positions"]
    assert (first["td"], first["auc_td"]) != (last["td"], last["auc_td"])  # another policy, another reward model
    offline, online = results["rm-prefix"], results["online-x"]
    assert offline["candidate_credit"]["positions"] == online["candidate_credit"]["positions"]  # the same answers
    fixed = offline["candidate_credit_start"], online["candidate_credit_start"]
    assert fixed[0] == offline["candidate_credit"]
    assert [{**credit, "reward_model": None} for credit in fixed] == [{**fixed[0], "reward_model": None}] * 2
    assert offline["best_of_n"]["2"]["pass"] == online["best_of_n"]["2"]["pass"]
    assert offline["localisation"] != online["localisation"]
    for row in (offline["best_of_n"]["1"], online["best_of_n"]["1"]):
        shares = [row[way] for way in ("pass", "best:vbar", "best:sum", "majority")]
        assert shares == pytest.approx([row["average"]] * 3 + [shares[-1]])  # of one answer there is no choice


def test_a_measurement_that_is_asked_for_later(train):
    """What was there stays as it is. The number of prompts of one that was made cannot change any more."""
    _, folder = train(reward_model=_reward_model("before"))
    config = json.loads((folder / "config.json").read_text())
    evaluate.run(Experiment(check(config), folder))
    before = json.loads((folder / "eval/results.json").read_text())
    config["eval"]["choice_prompts"] = 12
    evaluate.run(Experiment(check(config), folder), resume=True)
    results = json.loads((folder / "eval/results.json").read_text())
    first, last = results.pop("choices-rm-prefix"), results.pop("choices-online-x")
    assert results == before
    assert min(first["positions"], last["positions"]) > 0
    assert first["continuations"] >= 2 * 2 * first["positions"]
    assert (first["td"], first["auc_td"]) != (last["td"], last["auc_td"])  # another policy, another reward model
    config["eval"]["choice_prompts"] = 13
    with pytest.raises(ConfigError, match=r"differing: eval.choice_prompts\)"):
        Experiment(check(config), folder)


def test_a_kill_between_the_two_models(train):
    """The reward model was saved, the policy not yet: the phase saves what is missing and leaves the other alone."""
    _, folder = train(reward_model=_reward_model("before"))
    before = _digest(folder)
    shutil.rmtree(folder / "rl/x/model")
    saved = (folder / "rl/x/reward_model/model.safetensors").stat()
    rl.run(Experiment(check(json.loads((folder / "config.json").read_text())), folder), "x", resume=True)
    assert _digest(folder) == before
    assert (folder / "rl/x/reward_model/model.safetensors").stat() == saved


def test_phases_name_what_is_missing(tmp_path):
    experiment = Experiment(check({**BASE, "rl": {"x": {**RL, "reward_model": _reward_model("none")}}}), tmp_path)
    with pytest.raises(FileNotFoundError, match="sft"):
        rollout.run(experiment)
    with pytest.raises(FileNotFoundError, match="rollout"):
        train_rm.run(experiment, "prefix")
    with pytest.raises(FileNotFoundError, match="sft"):
        rl.run(experiment, "x")


def test_a_started_phase_needs_resume(start):
    experiment = Experiment(check(BASE), start)
    with pytest.raises(AlreadyStartedError, match="--resume"):
        sft.run(experiment)
    sft.run(experiment, resume=True)
    with pytest.raises(ConfigError, match=r"sft\.steps"):
        Experiment(check({**BASE, "sft": {"steps": 3}}), start)
