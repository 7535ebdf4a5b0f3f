"""How torchrun and srun describe their processes, what is refused, and that none stays joined."""

import socket
from pathlib import Path

import pytest
import torch
from processes import started

from segmenter_fast.distributed import (
    Launch,
    first_host,
    gathered,
    launched,
    local_gpu,
    rank,
    summed,
    world_size,
)

TORCHRUN = {
    "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4",
    "MASTER_ADDR": "gpu1", "MASTER_PORT": "29500",
}  # fmt: skip
SRUN = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[003-004]", "SLURM_JOB_ID": "1234567",
}  # fmt: skip


def test_torchrun():
    assert launched(TORCHRUN) == Launch(3, 1, 4, "gpu1", 29500)
    assert launched(TORCHRUN | SRUN) == launched(TORCHRUN)


def test_srun():
    launch = launched(SRUN)
    assert launch[:4] == (5, 1, 8, "gpu003")
    assert 20000 <= launch.port < 40000
    assert launched(SRUN | {"SLURM_JOB_ID": "1234568"}).port != launch.port
    assert launched(SRUN | {"MASTER_ADDR": "x", "MASTER_PORT": "7"})[3:] == ("x", 7)


def test_alone():
    assert launched({}) is None
    assert launched(TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"}) is None
    # A batch script is one process of a job with many tasks.
    assert launched({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}) is None
    assert (rank(), world_size()) == (0, 1)
    x = torch.tensor([1.0])
    assert summed(x) is x and gathered(x).shape == (1, 1)


@pytest.mark.parametrize(
    ("environment", "change", "message"),
    [
        (TORCHRUN, {"LOCAL_RANK": ""}, "LOCAL_RANK must be a number .* got ''"),
        (TORCHRUN, {"MASTER_ADDR": ""}, "MASTER_ADDR must name the machine"),
        (TORCHRUN, {"MASTER_PORT": "x"}, "MASTER_PORT must be a number .* got 'x'"),
        (TORCHRUN, {"RANK": "4"}, "RANK must be below WORLD_SIZE 4, got 4"),
        (SRUN, {"SLURM_PROCID": "8"}, "SLURM_PROCID must be below"),
        (SRUN, {"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST must list machines"),
    ],
)
def test_rejects_bad_environment(environment, change, message):
    with pytest.raises(ValueError, match=message):
        launched(environment | change)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[003-004,7],cpu1", "gpu003"),
        ("a[9,11]b,c", "a9b"),
    ],
)
def test_first_host(nodes, host):
    assert first_host(nodes) == host


def test_a_gpu_for_each_process(monkeypatch):
    launch = launched(TORCHRUN)
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    assert local_gpu(launch, 2) == 1
    with pytest.raises(ValueError, match=r"process 1 of this machine has no GPU .* at most 1"):
        local_gpu(launch, 1)
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert local_gpu(launch, 1) == 0  # srun shows each process its own


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are listed in /proc")
def test_leave_ends_the_threads_of_gloo():
    """Whatever was imported since; they could abort the process when the interpreter ends."""
    script = """
import os, torch
from segmenter_fast.distributed import join, launched, leave, summed

threads = lambda: len(os.listdir("/proc/self/task"))
alone = threads()
join(launched(), torch.device("cpu"))
import torch.distributed.nn.functional
summed(torch.ones(1))
assert threads() > alone, "no threads to speak with"
leave()
assert threads() == alone, f"{threads() - alone} threads are left"
"""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [started("-c", script, RANK=rank, LOCAL_RANK=rank, **common) for rank in ("0", "1")]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
