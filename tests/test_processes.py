"""examples/processes.py: DDP and FSDP2, by plain torch and by accelerate, learn on two processes what one learns."""

import json
from pathlib import Path

import pytest
import torch

from examples import processes
from tests.ranks import run_ranks

RUNS = {
    "ddp": (False, False),
    "fsdp2": (True, False),
    "accelerate-ddp": (False, True),
    "accelerate-fsdp2": (True, True),
}


def _main(rank: int, folder: Path) -> None:
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType
    from torch.distributed.tensor import DTensor

    torch.distributed.init_process_group("gloo")
    sgd, types = torch.optim.SGD, []

    def seen(parameters, **settings):
        made = sgd(parameters, **settings)
        made.register_step_pre_hook(lambda *_: types.append(type(made.param_groups[0]["params"][0])))
        return made

    torch.optim.SGD = seen
    found = {}
    for name, (sharded, accelerate) in RUNS.items():
        if name == "accelerate-fsdp2":  # on a CPU accelerate would run DDP without a word
            AcceleratorState._reset_state(reset_partial_state=True)
            PartialState(cpu=True, backend="gloo")
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        types.clear()
        found[name] = processes.train(sharded, accelerate)
        assert types
        assert all(issubclass(kind, DTensor) == sharded for kind in types), (name, types)
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, list]:
    folder = tmp_path_factory.mktemp("processes")
    run_ranks(_main, folder)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_learn_what_one_learns(found, name):
    alone = processes.train()
    assert len(alone) == processes.STEPS
    for (loss, norm), (own_loss, own_norm) in zip(alone, found[name], strict=True):
        assert own_loss == pytest.approx(loss, rel=1e-6, abs=1e-6)
        assert own_norm == pytest.approx(norm, rel=1e-6)
