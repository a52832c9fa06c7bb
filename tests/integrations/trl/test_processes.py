"""Two gloo processes, DDP and FSDP2, learn what one process learns; nothing silently runs as something else."""

import os
from pathlib import Path

import pytest
import torch

from tests.integrations.trl import cases
from tests.ranks import run_ranks

ONLINE = {"online": "before", "learning_rate": 1e-3}
RUNS = {  # name: (policy, reward model, config, distrl)
    "dapo-frozen": ("tied", "reward", {}, {"alpha": 0.5}),
    "grpo-online-untied": ("untied", "reward", {"loss_type": "grpo", "num_iterations": 2}, {"alpha": 0.5, **ONLINE}),
    "fused-online-repirl": (
        "tied",
        "reward",
        {"loss_type": "dr_grpo", "beta": 0.02},
        {"alpha": 0.5, "fused": True, "objective": "repirl", "right_above": 0.6, **ONLINE},
    ),
    "lora-adapter-online": ("lora", "judge", {"gradient_checkpointing": True}, {"alpha": 0.5, **ONLINE}),
}


def run(models, folder, name: str, processes: int) -> tuple[dict, dict, list[str]]:
    """(weights of the policy, of the reward model, types of the parameters in training)."""
    from transformers import TrainerCallback

    policy, reward_model, config, distrl = RUNS[name]
    if policy == "lora":
        policy = cases.lora(cases.model_of(models, "tied"), reward_model)
    config = {
        "per_device_train_batch_size": 8 // processes,
        "num_generations": 8,
        "optim": "sgd",
        "learning_rate": 1e-2,
        **config,
    }
    types = []

    class Types(TrainerCallback):
        def on_step_end(self, *_, model, **__):
            of = (model, trainer.reward_model.asked.model)
            types.append(" ".join(type(next(one.parameters())).__name__ for one in of))

    if processes > 1:
        config["ddp_backend"] = "gloo"
    trainer = cases.build(
        models,
        folder,
        config,
        distrl,
        policy=policy,
        reward_model=reward_model,
        rollout_func=cases.rollouts,
        callbacks=[Types()],
    )
    trainer.train()
    judge = trainer.accelerator.unwrap_model(trainer.reward_model.asked.model)
    if trainer.reward_model.learns:
        assert_state_is_whole(trainer, judge, folder)
    return cases.weights(trainer.accelerator.unwrap_model(trainer.model)), cases.weights(judge), types


def assert_state_is_whole(trainer, judge, folder: Path) -> None:
    """What a checkpoint keeps brings the reward model back after it has changed."""
    before, state = cases.weights(judge), trainer.reward_model.state()  # whole on the first process alone
    if trainer.accelerator.is_main_process:
        torch.save(state, folder / "state.pt")
    trainer.accelerator.wait_for_everyone()
    learnt = trainer.reward_model.optimizer.param_groups[0]["params"]
    moments = [whole(trainer.reward_model.optimizer.state[parameter]["exp_avg"]).clone() for parameter in learnt]
    assert max(moment.abs().max() for moment in moments) > 0
    with torch.no_grad():
        for parameter in learnt:
            parameter.add_(1.0)
            trainer.reward_model.optimizer.state[parameter]["exp_avg"].zero_()
    assert cases.largest_difference(before, cases.weights(judge)) > 0.9
    trainer.reward_model.load_state(torch.load(folder / "state.pt", weights_only=True))
    assert cases.largest_difference(before, cases.weights(judge)) == 0
    for parameter, moment in zip(learnt, moments, strict=True):
        assert whole(trainer.reward_model.optimizer.state[parameter]["exp_avg"]).equal(moment)


def whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def force_fsdp2() -> None:
    """accelerate turns FSDP on for GPUs alone, and runs DDP on a CPU without a word."""
    import accelerate.state as state
    from accelerate.utils import DistributedType

    original = state.AcceleratorState.__init__

    def forced(self, *args, **kwargs):
        if state.PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            state.PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return original(self, *args, **kwargs)

    state.AcceleratorState.__init__ = forced
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    }


def rank_main(rank: int, models, folder: Path, sharded: bool) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    if sharded:
        force_fsdp2()
    from accelerate.state import AcceleratorState, GradientState

    for name, (policy, *_) in RUNS.items():
        layer = "LlamaDecoderLayer" if policy == "untied" else "Qwen3DecoderLayer"
        os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = layer
        found = run(models, folder, name, 2)
        if rank == 0:
            torch.save(found, folder / f"{name}.pt")
        AcceleratorState._reset_state()
        GradientState._reset_state()


@pytest.fixture(scope="module")
def single(models, tmp_path_factory):
    return {name: run(models, tmp_path_factory.mktemp("one"), name, 1) for name in RUNS}


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def double(request, models, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    run_ranks(rank_main, models, folder, request.param == "fsdp2")
    return request.param, {name: torch.load(folder / f"{name}.pt", weights_only=False) for name in RUNS}


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_learn_what_one_learns(single, double, models, name):
    kind, found = double
    policy, judge, types = found[name]
    expected = {"ddp": "Parameter Parameter", "fsdp2": "DTensor DTensor"}[kind]
    assert types == [expected] * 2
    alone, alone_judge, _ = single[name]
    start = cases.weights(cases.model_of(models, "reward"))
    assert cases.largest_difference(policy, alone) < 1e-6
    assert cases.largest_difference(judge, alone_judge) < 1e-6
    if "lora" not in name:
        assert (cases.largest_difference(judge, start) > 1e-4) == ("online" in name)
