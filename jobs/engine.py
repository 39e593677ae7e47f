"""The DeepSpeed engine around the objective, on GPUs and on CPU alike.

One process is one rank. Under the deepspeed launcher and torchrun the rank's variables are set;
under srun they follow from SLURM's; started plainly, a process is rank 0 of 1. Collectives run on
NCCL where there are GPUs and on gloo elsewhere; DeepSpeed's own shared-memory collectives for CPU
are switched off, since they would have to be compiled first.
"""

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

# Named before DeepSpeed looks, or it warns of every accelerator that is not there.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed

from jobs.optimizer import OptimizerName, make_optimizer
from model.family import Objective

T = TypeVar("T")

SLURM_NAMES = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
VARIABLES = (*SLURM_NAMES, "MASTER_ADDR", "MASTER_PORT")
FIRST_PORT, NUM_PORTS = 10_000, 20_011  # below those that systems hand out; a prime number


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many, and the device that it uses."""

    rank: int
    world: int
    device: torch.device


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Be with the other ranks, or the only one, for as long as the block lasts.

    The variables that say where ranks meet are afterwards as they were, so that no process started
    later takes itself for one of these ranks.
    """
    before = {name: os.environ.get(name) for name in VARIABLES}
    done = False
    try:
        yield _join()
        done = True
    finally:
        # Whoever leaves for an error does not wait for ranks that may never come.
        if torch.distributed.is_initialized() and (
            done or torch.distributed.get_world_size() == 1
        ):
            deepspeed.comm.destroy_process_group()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _join() -> Ranks:
    if "RANK" not in os.environ and "SLURM_STEP_ID" in os.environ:
        os.environ.update({name: os.environ[slurm] for name, slurm in SLURM_NAMES.items()})
        if os.environ["WORLD_SIZE"] != "1" and "MASTER_ADDR" not in os.environ:
            address, port = _meeting_place()
            os.environ.update({"MASTER_ADDR": address, "MASTER_PORT": str(port)})
    for name, alone in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        os.environ.setdefault(name, alone)
    cuda = torch.cuda.is_available()
    backend = "nccl" if cuda else "gloo"
    if not cuda:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if os.environ["WORLD_SIZE"] == "1":
        # A lone rank meets nobody: it needs no port.
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    deepspeed.init_distributed(backend, verbose=False, auto_mpi_discovery=False)
    device = torch.device("cpu")
    if cuda:
        # Where the launcher shows each rank its own GPU only, that one is number 0.
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), device)


def from_first_rank(value: T, ranks: Ranks) -> T:
    """What rank 0 holds as `value`, on every rank."""
    shared = [value]
    if ranks.world > 1:
        torch.distributed.broadcast_object_list(shared, src=0)
    return shared[0]


def build(
    objective: Objective,
    *,
    optimizer: OptimizerName,
    learning_rate: float,
    batch: int,
    world: int,
    zero: int,
) -> Any:
    """The DeepSpeed engine of one part of a denoiser: weights in float32, gradients clipped to
    1.
    """
    engine, _, _, _ = deepspeed.initialize(
        model=objective,
        optimizer=make_optimizer(objective, optimizer, learning_rate),
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


def multiplies_in_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 faster than float32: GPUs, and CPUs with instructions
    for it.
    """
    if device.type == "cuda":
        return True
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _meeting_place() -> tuple[str, int]:
    """Where the ranks of a SLURM step meet: its first node, and a port of their own.

    The address is the one by which SLURM itself reaches the node, since names may not resolve. The
    port depends on the restart, so that ranks never meet those of a step that outlived a requeue.
    """
    names = _ask_scontrol("show", "hostnames", os.environ["SLURM_STEP_NODELIST"])
    node = _ask_scontrol("--oneliner", "show", "node", names.split()[0])
    found = re.search(r"\bNodeAddr=(\S+)", node)
    assert found is not None, node
    job, restart, step = (
        int(os.environ.get(name, "0"))
        for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")
    )
    return found[1], FIRST_PORT + (64 * job + 8 * restart + step) % NUM_PORTS


def _ask_scontrol(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["scontrol", *arguments], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(
            f"the ranks of this SLURM step cannot find each other: scontrol "
            f"{' '.join(arguments)} does not work here ({error}); set MASTER_ADDR and MASTER_PORT"
        ) from error
    return done.stdout
