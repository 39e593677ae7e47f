"""The DeepSpeed engine around the objective, on GPUs and on CPU alike.

One process is one rank. Under the deepspeed launcher, torchrun or srun the rank's variables are
set; started plainly, a process is rank 0 of 1. Collectives run on NCCL where there are GPUs and on
gloo elsewhere; DeepSpeed's own shared-memory collectives for CPU are switched off, since they
would have to be compiled first.
"""

import os
import socket
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

# Named before DeepSpeed looks, or it warns of every accelerator that is not there.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed

from model.family import Objective

T = TypeVar("T")

SLURM_NAMES = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many, and the device that it uses."""

    rank: int
    world: int
    device: torch.device


def join() -> Ranks:
    """Join the other ranks, or be the only one."""
    for name, slurm in SLURM_NAMES.items():
        if name not in os.environ and slurm in os.environ and "SLURM_STEP_ID" in os.environ:
            os.environ[name] = os.environ[slurm]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    cuda = torch.cuda.is_available()
    if not cuda:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if cuda else "gloo", verbose=False)
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), device)


def leave() -> None:
    """Leave the other ranks, so that another run can follow in this process."""
    deepspeed.comm.destroy_process_group()


def from_first_rank(value: T, ranks: Ranks) -> T:
    """What rank 0 holds as `value`, on every rank."""
    shared = [value]
    if ranks.world > 1:
        torch.distributed.broadcast_object_list(shared, src=0)
    return shared[0]


def build(objective: Objective, *, learning_rate: float, batch: int, world: int, zero: int) -> Any:
    """The DeepSpeed engine: Adam with the betas of ∞-Diff's code, weights in float32, gradients
    clipped to 1.
    """
    optimizer = torch.optim.AdamW(
        objective.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0
    )
    engine, _, _, _ = deepspeed.initialize(
        model=objective,
        optimizer=optimizer,
        dist_init_required=False,
        config={
            "train_batch_size": batch,
            "train_micro_batch_size_per_gpu": batch // world,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": zero},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**31,
        },
    )
    return engine


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
