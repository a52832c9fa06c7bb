"""A function on two or more gloo processes of this machine."""

import os
import socket
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function: Callable, *args, world: int = 2) -> None:
    """function(rank, *args) on each rank, one thread each, with the environment that torchrun would give it.

    The function makes the process group, or lets its framework make it; it need not take it apart.
    """
    mp.spawn(_rank, args=(function, world, free_port(), args), nprocs=world)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _rank(rank: int, function: Callable, world: int, port: int, args: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    function(rank, *args)
    # FSDP2 leaves a running thread in its process groups, and a process that ends in the usual way is then aborted now
    # and then ("terminate called without an active exception").
    dist.barrier()
    os._exit(0)
