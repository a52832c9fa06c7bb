"""`ipvrm plan`: what is counted, by hand, and what a process really takes."""

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ipvrm_core
from ipvrm_core.fused.head import default_buffer_bytes
from ipvrm_core.trainer.commands import plan as command
from ipvrm_core.trainer.commands.main import main
from ipvrm_core.trainer.config import check, load
from ipvrm_core.trainer.plan.estimate import STEP, Peak, estimate
from ipvrm_core.trainer.plan.measure import measure
from ipvrm_core.trainer.plan.sizes import longest
from ipvrm_core.trainer.plan.tracker import Tracker
from ipvrm_core.trainer.preflight import tokenizer_of
from tests import tiny_runs

CPU = torch.device("cpu")
LORA = {"rank": 4, "alpha": 8.0}
BASE = {
    **tiny_runs.BASE,
    "rm": {"prefix": {"batch": 16}, "explicit": {"objective": "qrm"}, "free": {"objective": "endorm"}},
    "rl": {
        "grpo": {"batch": tiny_runs.BATCH},
        "distrl": {
            "batch": tiny_runs.BATCH,
            "method": {"td_reference": "sft"},
            "reward_model": {"name": "prefix"},
        },
    },
}


def peaks(*only: str, device=CPU, **more) -> dict[tuple[str, str], Peak]:
    config = check({**BASE, **more})
    tokenizer = tokenizer_of(config)
    return {(p.phase, p.name): p for p in estimate(config, tokenizer, longest(config, tokenizer), device, only)}


def model(**more) -> dict:
    return {"model": {**BASE["model"], **more}}


def size(lora: int = 0) -> tuple[int, int]:
    """(numbers of the model, numbers of its adapters), by hand: V = 19 characters, width 32, 2 heads of 16, MLP 64."""
    d, inner, V = 32, 64, 19
    layer = 4 * d * d + 3 * d * inner + 2 * 16 + 2 * d  # projections; norms of queries and keys; norms of the layer
    adapters = lora * (4 * 2 * d + 3 * (d + inner))
    return V * d + layer + d, adapters


# ---- the count


def test_the_tracker_counts_what_is_live():
    with FakeTensorMode(), Tracker(CPU) as tracker:
        kept = torch.ones(1000)  # 4,000 bytes
        tracker.label("weights", [kept])
        product = kept * 2
        assert tracker.live == {"weights": 4000, "activations": 4000}
        view = product.view(10, 100)  # no memory of its own
        (product + 1).sum()
        assert tracker.most == 12_004  # a sum of two, and its own sum
        del product, view
        assert tracker.total == 4000
        tracker.restart()
        assert tracker.most == 4000


@pytest.mark.parametrize("trained", [False, True])
def test_a_gpus_buffers_at_the_head_are_those_of_its_kind_of_head(trained):
    """More rows of 6 bytes a logit than either budget holds; with a trained head dW is there besides."""
    N, V = 8192, 151936
    with FakeTensorMode(), Tracker(torch.device("cuda")) as tracker:
        hidden, weight = torch.ones(N, 1, requires_grad=True), torch.ones(V, 1, requires_grad=trained)
        numbers, weights = (torch.ones(N, 1) for _ in range(2)), torch.ones(2, N)
        batch = ipvrm_core.PolicyBatch(torch.ones(N, 1).long(), *numbers, *weights)
        before = tracker.total
        ipvrm_core.distrl_loss(hidden, weight, batch)
    buffers = tracker.most - before
    expected = default_buffer_bytes(torch.device("cuda"), trained)
    assert expected <= buffers <= expected + 2 * 4 * (N + V + N * 20)


def test_weights_gradients_and_optimiser_by_hand():
    numbers, adapters = size(4)
    trained = "sft", "rm.prefix", "rm.explicit", "rm.free"
    whole, lora = peaks(*trained), peaks(*trained, **model(lora=LORA))
    train = "forward and backward"
    for phase in ("sft", "rm.prefix"):
        assert whole[phase, train].parts["weights"] == 4 * numbers
        assert whole[phase, train].parts["optimiser"] == 8 * numbers
        assert lora[phase, train].parts["weights"] == 4 * (numbers + adapters)
        assert lora[phase, train].parts["optimiser"] == 8 * adapters
        assert 0 < whole[phase, train].parts["gradients"] <= 4 * numbers
        assert whole[phase, STEP].parts["gradients"] == 4 * numbers
        assert lora[phase, STEP].parts["gradients"] == 4 * adapters
    assert whole["rm.explicit", train].parts["weights"] == 4 * (numbers + 33)  # its value head
    assert ("rm.free", train) not in whole  # nothing is trained


def test_the_models_of_a_policy_run_by_hand():
    numbers, adapters = size(4)
    update = "update of the policy"
    apart = peaks("rl.distrl", **model(lora={**LORA, "one_base": False}))["rl.distrl", update].parts
    shared = peaks("rl.distrl", **model(lora=LORA))["rl.distrl", update].parts
    assert apart["weights"] == 4 * (3 * numbers + 2 * adapters)  # policy, reward model, reference
    assert shared["weights"] == 4 * (numbers + 2 * adapters)
    assert apart["optimiser"] == shared["optimiser"] == 16 * adapters
    assert peaks("rl.grpo")["rl.grpo", update].parts["weights"] == 4 * numbers


def test_bfloat16_weights_have_float32_copies():
    numbers, _ = size()
    parts = peaks("rm.prefix", **model(dtype="bfloat16"))["rm.prefix", STEP].parts
    assert parts["weights"] == 2 * numbers
    assert parts["optimiser"] == 12 * numbers
    assert parts["gradients"] == 4 * numbers


def test_moments_that_wait_on_the_cpu_are_not_on_a_gpu():
    """Two optimisers: in a pass the moments of neither are there, in a step those of the one that makes it."""
    numbers, _ = size()
    distrl = BASE["rl"]["distrl"]
    used = {**distrl["reward_model"], "optim": {"lr": 1e-4, "offload": True}}
    rl = {"distrl": {**distrl, "optim": {"lr": 1e-6, "offload": True}, "reward_model": used}}
    for device, passes, step in ((torch.device("cuda"), 0, 8), (CPU, 16, 16)):
        found = peaks("rl.distrl", device=device, rl=rl)
        assert found["rl.distrl", "update of the policy"].parts["optimiser"] == passes * numbers
        assert found["rl.distrl", STEP].parts["optimiser"] == step * numbers


GPU, VLLM = torch.device("cuda"), {"sampler": "vllm", "max_new_tokens": 16, "vllm": {"cache_gib": 0.25}}


@pytest.mark.parametrize(
    ("device", "ahead", "asleep"), [(GPU, False, True), (GPU, True, False), (CPU, False, False)], ids=str
)
def test_an_engine_by_hand(device, ahead, asleep):
    """V = 19 is 64 rows there. It sleeps while models learn: on a GPU, unless it samples the next batch meanwhile."""
    rl = {"grpo": {**BASE["rl"]["grpo"], "ahead": ahead}}
    sections = {"generation": VLLM, "rl": rl, "sft": {**BASE["sft"], "stop_accuracy": 0.5}}
    found = peaks("sft", "rollout", "rm.prefix", "rl.grpo", "eval", device=device, **sections)
    held = {"engine's weights": 4 * (size()[0] + (64 - 19) * 32), "engine's cache": 2**28}
    nothing = dict.fromkeys(held, 0)
    for (phase, name), peak in found.items():
        learns = name != "sampling" and phase in ("sft", "rl.grpo")
        sleeps = learns and (asleep or (phase == "sft" and device == GPU))
        expected = nothing if phase == "rm.prefix" or sleeps else held
        assert {part: peak.parts[part] for part in held} == expected, (phase, name)
        assert peak.total == peak.models + sum(expected.values())
    sampling = {phase: peak for (phase, name), peak in found.items() if name == "sampling"}
    assert sampling.keys() == {"sft", "rollout", "rl.grpo", "eval"}
    for peak in sampling.values():
        assert peak.parts["KV cache"] == 0
        assert not peak.can_be_made
    rotary = 2 * 8 * 4
    assert sampling["rl.grpo"].models == sampling["sft"].models == 12 * size()[0] + rotary  # weights and moments


def test_an_engine_in_bfloat16_with_room_for_adapters():
    """Rank 4 runs in 8: at the seven layers, the head and the embedding."""
    found = peaks("rl.grpo", generation={**VLLM, "vllm": {"dtype": "bfloat16"}}, **model(lora=LORA))
    numbers = size()[0] + (64 - 19) * 32 + size(8)[1] + 2 * 8 * (19 + 32)
    assert found["rl.grpo", "sampling"].parts["engine's weights"] == 2 * numbers


def test_no_engine_without_vllm():
    assert "engine's weights" not in peaks("rl.grpo")["rl.grpo", "sampling"].parts


def test_the_cache_of_a_sampler_by_hand():
    """Keys and values of one layer of width 32, float32, for 72 answers of at most prompt + 15 tokens."""
    config = check(BASE)
    prompt = longest(config, tokenizer_of(config))["sampled"].prompt
    assert peaks("rl.grpo")["rl.grpo", "sampling"].parts["KV cache"] == 2 * 32 * 4 * 72 * (prompt + 15)


def test_what_saves_memory_does():
    """On the passes that train, of a model with several layers and micro-batches of some size."""
    scratch = {**BASE["model"]["scratch"], "layers": 4}
    wide = {"model": {"scratch": scratch}, "sft": {"batch": 64}}
    key = "sft", "forward and backward"
    plain, again, packed = (
        peaks("sft", **wide, **more)[key].parts["activations"]
        for more in ({}, {"activation_checkpointing": True}, {"packing": True})
    )
    assert again < 0.5 * plain
    assert packed < plain  # no mask
    assert peaks("sft", **wide, micro_batch_tokens=512)[key].parts["activations"] < 0.6 * plain
    update = "rl.grpo", "update of the policy"  # after a pass that samples, which is made in the other mode
    sampled, sampled_again = (
        peaks("rl.grpo", model=wide["model"], **more)[update].parts["activations"]
        for more in ({}, {"activation_checkpointing": True})
    )
    assert sampled_again < 0.5 * sampled


# ---- the command


def test_the_command(tmp_path, capsys):
    path = tmp_path / "tiny.json"
    path.write_text(check(BASE).model_dump_json())
    assert main(["plan", str(path), "--memory", "1", "--json", str(tmp_path / "plan.json")]) == 0
    said = capsys.readouterr().out
    assert "weights  gradients  optimiser  activations" in said
    assert "GiB: it fits in 1." in said
    assert main(["plan", str(path), "--memory", "0.5"]) == 0
    assert "does NOT fit in 0.5" in capsys.readouterr().out
    rows = json.loads((tmp_path / "plan.json").read_text())["passes"]
    assert {row["phase"] for row in rows} == {
        "sft",
        "rollout",
        "rm.prefix",
        "rm.explicit",
        "rl.grpo",
        "rl.distrl",
        "eval",
    }
    assert all(row["bytes"] == sum(row["parts"].values()) for row in rows)
    assert main(["plan", str(path), "--gpu", "H1000"]) == 2
    assert "--gpu must be one of A10, " in capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} == {"tiny.json", "plan.json"}  # no folder of a run


def test_a_shipped_configuration_for_a_gpu(capsys):
    """The demo's models are small: what they need most is not their weights."""
    assert main(["plan", "demo", "--gpu", "T4", "--phase", "rm.ipvrm"]) == 0
    said = capsys.readouterr().out
    assert "its largest part: " in said
    assert "it fits in 14.6" in said
    assert command.GPUS["T4"] == 14.6


@pytest.mark.slow
def test_within_a_tenth_of_what_a_process_takes(tmp_path):
    """The demo's model on micro-batches of 8,192 tokens, forward, backward and a whole policy update."""
    config = load("demo", ["micro_batch_tokens=8192", "device=cpu"])
    tokenizer = tokenizer_of(config)
    sizes = longest(config, tokenizer)
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json())
    wanted = {("sft", "forward and backward"), ("rl.distrl", "update of the policy")}
    for peak in estimate(config, tokenizer, sizes, CPU):
        if (peak.phase, peak.name) in wanted:
            taken = measure(path, sizes, peak.phase, peak.name)
            assert 0.9 < peak.total / taken < 1.1, (peak, taken)
