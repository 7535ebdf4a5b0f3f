"""Batches for training: the same pictures for any number of workers and processes, and resumable.

The shuffled samples of all epochs are one endless row. Batch k has those from k B to (k + 1) B, of
which each process takes its share in order; a batch may span two epochs, and none is short. Each
sample is augmented with a generator seeded by (seed, epoch, index): neither the worker or process
that makes it nor what was made before changes it.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from segmenter_fast.data.augment import Augmentation

PREFETCH = 4  # batches that a worker has ready: enough to ride out a run of large pictures


class Batch(NamedTuple):
    """What a loader gives; on the device `normalise(images, sizes, mean, std)` completes it.

    Args:
        images: (B, 3, h, w) uint8.
        target: (B, h, w) uint8, `ignore_index` outside of the pictures.
        sizes: (B, 2) int64, height and width that each picture fills from the upper left corner.
        seconds: (B,) float64 that reading and augmenting each took in its worker.
    """

    images: Tensor
    target: Tensor
    sizes: Tensor
    seconds: Tensor


class TrainSampler(Sampler):
    """Lists of (epoch, index) for the batches of one process.

    Args:
        length: samples of the dataset.
        batch_size: of all processes together.
        steps: batches to give.
        seed: of the order.
        start: (epoch, position) to begin at; `position_after` of the run to continue.
        rank, world_size: which process of how many this is.

    Raises:
        ValueError: no samples, a batch that the processes cannot share evenly, or a start, rank or
            number that does not exist.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        steps: int,
        seed: int = 0,
        start: tuple[int, int] = (0, 0),
        rank: int = 0,
        world_size: int = 1,
    ):
        if length < 1:
            raise ValueError("the dataset has no samples")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be 0 to {world_size - 1}, got {rank}")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"batch_size counts the samples of all processes and must be a multiple of their "
                f"number {world_size}, got {batch_size}"
            )
        if steps < 0 or seed < 0:
            raise ValueError(f"steps and seed must be 0 or more, got {steps} and {seed}")
        epoch, position = start
        if epoch < 0 or not 0 <= position < length:
            raise ValueError(
                f"start must be (epoch, position) with 0 <= position < {length}, got {start}"
            )
        self.length, self.batch_size, self.steps = length, batch_size, steps
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.first = epoch * length + position

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch_size // self.world_size
        shuffled, order = -1, np.empty(0, np.int64)
        for step in range(self.steps):
            start = self.first + step * self.batch_size + self.rank * share
            keys = []
            for number in range(start, start + share):
                epoch, position = divmod(number, self.length)
                if epoch != shuffled:
                    generator = np.random.default_rng([self.seed, 0, epoch])
                    shuffled, order = epoch, generator.permutation(self.length)
                keys.append((epoch, int(order[position])))
            yield keys

    def position_after(self, steps: int) -> tuple[int, int]:
        """The (epoch, position) of a run that has used `steps` batches: the next one's `start`."""
        return divmod(self.first + steps * self.batch_size, self.length)


class _Augmented(Dataset):
    """Maps (epoch, index) to an augmented sample and the seconds that it took."""

    def __init__(self, dataset, augmentation: Augmentation, seed: int):
        self.dataset, self.augmentation, self.seed = dataset, augmentation, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        started = time.perf_counter()
        epoch, index = key
        image, target = self.dataset[index]
        rng = np.random.default_rng([self.seed, 1, epoch, index])
        crop = self.augmentation(image, target, rng)
        return Batch(*crop, torch.tensor(time.perf_counter() - started, dtype=torch.float64))


def make_loader(
    dataset,
    augmentation: Augmentation,
    batch_size: int,
    steps: int,
    seed: int = 0,
    start: tuple[int, int] = (0, 0),
    workers: int = 0,
    rank: int | None = None,
    world_size: int | None = None,
    pin_memory: bool = False,
) -> DataLoader:
    """The training batches of this process, as `Batch`.

    `loader.batch_sampler.position_after(n)` is what to save after n batches and to give as `start`
    to continue. It does not depend on what workers have prefetched.

    Args:
        dataset: maps an index to (uint8 image (3, H, W), uint8 labels (H, W)).
        augmentation: turns that into a crop.
        batch_size: of all processes together.
        steps: batches to give.
        seed: of the order and of every sample.
        start: (epoch, position) to begin at.
        workers: processes that read and augment; 0 is this one.
        rank, world_size: which process of how many this is; None asks torch.distributed.
        pin_memory: copy batches to page-locked memory, from which a GPU can fetch them alongside.

    Raises:
        ValueError: as `TrainSampler`. What a sample raises surfaces when its batch is due.
    """
    running = torch.distributed.is_available() and torch.distributed.is_initialized()
    if rank is None:
        rank = torch.distributed.get_rank() if running else 0
    if world_size is None:
        world_size = torch.distributed.get_world_size() if running else 1
    sampler = TrainSampler(len(dataset), batch_size, steps, seed, start, rank, world_size)
    return DataLoader(
        _Augmented(dataset, augmentation, seed),
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=PREFETCH if workers else None,
        # Else starting the loader would draw from the generator of dropout, in resumed runs too.
        generator=torch.Generator(),
        worker_init_fn=_outlive_termination,
    )


def _outlive_termination(worker: int) -> None:
    """Let SIGTERM end a worker only if its parent sends it, as at the interpreter's exit.

    SLURM sends it to workers, too, while training is still to finish a step and to save.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS, which knows no sender
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def images_per_second(seconds: Tensor, workers: int) -> float:
    """How many images the workers of this process can make, which the model should stay below.

    Args:
        seconds: of a `Batch`, or of several together.
        workers: as given to `make_loader`.
    """
    return max(1, workers) * seconds.numel() / float(seconds.sum())
