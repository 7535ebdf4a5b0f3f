"""Several processes that train one model: how they were started, and what they add up to.

`torchrun` and SLURM's `srun` both describe the processes in environment variables. Without them
there is one process, for which every function here does nothing.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Launch(NamedTuple):
    """One of several processes.

    Args:
        rank: its number among all; number 0 writes files and talks.
        local_rank: its number on its machine.
        world_size: how many there are.
        address, port: where process 0 listens.
    """

    rank: int
    local_rank: int
    world_size: int
    address: str
    port: int


def launched(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """This process among those that torchrun or srun started; None if it is alone.

    Raises:
        ValueError: a variable that belongs to the others is missing or makes no sense, named.
    """

    def number(name: str) -> int:
        text = environment.get(name, "")
        if not text.isdecimal():
            raise ValueError(
                f"{name} must be a number beside the other variables of torchrun or srun, "
                f"got {text!r}: start all processes with one of the two, or unset the variables"
            )
        return int(text)

    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        address, port = environment.get("MASTER_ADDR", ""), "MASTER_PORT"
        if not address:
            raise ValueError("MASTER_ADDR must name the machine of process 0 beside RANK, got ''")
    # Of the step, not of the job: a batch script is one process of a job that has many tasks.
    elif environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
        nodes = environment.get("SLURM_STEP_NODELIST", "")
        address, port = environment.get("MASTER_ADDR") or first_host(nodes), "MASTER_PORT"
    else:
        return None
    rank, local_rank, world_size = map(number, names)
    if world_size == 1:
        return None
    if rank >= world_size:
        raise ValueError(f"{names[0]} must be below {names[2]} {world_size}, got {rank}")
    if names[0] == "RANK" or port in environment:
        return Launch(rank, local_rank, world_size, address, number(port))
    # Every process must come to the same one, and two jobs on a machine to different ones.
    return Launch(rank, local_rank, world_size, address, 20000 + number("SLURM_JOB_ID") % 20000)


def first_host(nodes: str) -> str:
    """The first machine of SLURM's list: "gpu[003-004,7],cpu1" begins with gpu003.

    Raises:
        ValueError: no list.
    """
    match = re.match(r"([^\[,]*)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes)
    host = "".join(part or "" for part in match.groups()) if match else ""
    if not host:
        raise ValueError(f"SLURM_STEP_NODELIST must list machines, got {nodes!r}")
    return host


def local_gpu(launch: Launch, count: int) -> int:
    """The number of the GPU of this process, of the `count` that it sees.

    Raises:
        ValueError: more processes on this machine than GPUs.
    """
    if count == 1 and "SLURM_PROCID" in os.environ:
        return 0  # srun can show each of its processes the one GPU that it shall have
    if launch.local_rank >= count:
        raise ValueError(
            f"process {launch.local_rank} of this machine has no GPU of its own, PyTorch sees "
            f"{count}: start at most {count} processes per machine, or give --device cpu"
        )
    return launch.local_rank


def join(launch: Launch, device: torch.device) -> None:
    """Meet the other processes; NCCL speaks between GPUs, gloo else."""
    # Its functions have the group of all processes as a default argument, read at import. Imported
    # later, by PyTorch's compiler for one, they would hold the group made here beyond `leave`, and
    # threads of gloo that are alive when the interpreter ends can abort the process.
    import torch.distributed.nn.functional

    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"tcp://{launch.address}:{launch.port}",
        rank=launch.rank,
        world_size=launch.world_size,
    )


def leave() -> None:
    """Part from the other processes. Not after an error, when they may never answer."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def summed(x: Tensor) -> Tensor:
    """The sum over all processes; `x`, on the device that they speak from, is overwritten."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def gathered(x: Tensor) -> Tensor:
    """(processes, *x.shape) with what each of them has."""
    if world_size() == 1:
        return x[None]
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x)
    return torch.stack(parts)


@contextlib.contextmanager
def one_goes_first(launch: Launch | None) -> Iterator[None]:
    """Each machine's first process runs the block, then the others do: one download for all."""
    first = launch is None or launch.local_rank == 0
    if launch is not None and not first:
        dist.barrier()
    yield
    if launch is not None and first:
        dist.barrier()
