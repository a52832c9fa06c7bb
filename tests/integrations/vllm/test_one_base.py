"""Policy, reward model and reference on one base, and an engine that is given the policy's adapter alone."""

import shutil

import pytest
from safetensors.torch import load_file

from ipvrm_core.trainer.metrics import MetricsLog
from ipvrm_core.trainer.models import OneBase
from ipvrm_core.trainer.sampling.vllm import VllmSampler
from tests.integrations.vllm.runs import CONFIG, Runs

RL = """
[rollout]
prompts = 24
samples = 8
held_out = 8
batch = 24

[rm.prefix]
batch = 16
args = { beta = 5.0 }
optim = { lr = 1e-2 }

[rl.distrl]
steps = 3
minibatch = 24
kl_coef = 0.1
method = { alpha = 1.0, online_reference = "sft" }
batch = { prompts = 12, keep_prompts = 4, rollouts = 8 }
reward_model = { name = "prefix", update = "before", batch = 16, optim = { lr = 1e-2 } }
optim = { lr = 1e-2 }
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Runs:
    """A start that can do something, and in the folder b its rollouts and the reward model: an adapter."""
    made = Runs(tmp_path_factory.mktemp("start"))
    assert made.does("sft", "a") == 0
    kept = [line for line in CONFIG.partition("[rl.grpo]")[0].splitlines() if not line.startswith(("model.", "sft "))]
    model = f'model = {{ path = "{made.folder}/a/sft/model", lora = {{ rank = 4, alpha = 8.0 }} }}\n'
    made.config.write_text(model + "\n".join(kept).replace("checkpoint_every = 2", "checkpoint_every = 1") + RL)
    assert made.does("rollout", "b") == 0
    assert made.does("train-rm", "b") == 0
    return made


def test_an_engine_serves_the_policy_of_one_base(start, monkeypatch):
    handed, bases = [], []
    hand, init = VllmSampler._hand_adapter, OneBase.__init__
    monkeypatch.setattr(VllmSampler, "_hand_adapter", lambda self, model: handed.append(model) or hand(self, model))
    monkeypatch.setattr(OneBase, "__init__", lambda self, *given: bases.append(self) or init(self, *given))
    log = MetricsLog.log

    def ends_after_two(self, step, **numbers):
        log(self, step, **numbers)
        if step == 2:
            raise RuntimeError("cut off")

    shutil.copytree(start.folder / "b", start.folder / "c")
    assert start.does("rl", "b") == 0
    assert len(bases) == 1
    assert len(handed) == 1 + 1 + 3  # at the start, when the phase begins, after every step
    assert all(model.one is bases[0] and model.adapter == "policy" for model in handed)
    lines = start.lines("b", "rl/distrl")
    assert len(lines) == 3
    for line in lines:  # the engine has what the trainer calls the old policy, though the reward model moves too
        assert line["mismatch"] < 1e-5
        assert line["mismatch_max"] < 1e-4
        assert line["grad_norm"] > 0
        assert line["rm_grad_norm"] > 0
        assert line["sigma_v"] > 0
    folder = start.folder / "b/rl/distrl"
    policy, reward_model = (
        load_file(folder / f"{name}_adapter/adapter_model.safetensors") for name in ("model", "reward_model")
    )
    assert policy.keys() == reward_model.keys()
    assert all(not policy[key].equal(reward_model[key]) for key in policy)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "log", ends_after_two)
        with pytest.raises(RuntimeError, match="cut off"):
            start.does("rl", "c")
    assert start.does("rl", "c", "--resume") == 0
    assert start.lines("c", "rl/distrl") == lines
    for name in ("model", "reward_model"):
        whole, resumed = (
            load_file(start.folder / run / f"rl/distrl/{name}_adapter/adapter_model.safetensors") for run in "bc"
        )
        assert all(whole[key].equal(resumed[key]) for key in whole)


def test_one_step_ahead_on_one_base(start):
    """The adapter's updates arrive between two batches of the thread, and the answers are an update old."""
    kept = start.config.read_text()
    start.config.write_text(kept.replace("steps = 3", "steps = 3\nahead = true"))
    for phase in ("rollout", "train-rm", "rl"):
        assert start.does(phase, "d") == 0
    lines = start.lines("d", "rl/distrl")
    assert [line["staleness"] for line in lines] == [0, 1, 1]
    assert lines[0]["mismatch"] < 1e-5 < lines[1]["mismatch"]
    assert all(line["mismatch_ess"] < 1 - 1e-4 for line in lines[1:])
    start.config.write_text(kept)
