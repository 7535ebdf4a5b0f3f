"""The training loader: the same pictures whoever makes them, and after an interruption."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import write_pair

from segmenter_fast.data import (
    Augmentation,
    FolderDataset,
    InMemory,
    Scenes,
    images_per_second,
    make_loader,
)
from segmenter_fast.data.loader import TrainSampler

AUGMENTATION = Augmentation((24, 40))


def small():
    return Scenes(7, size=(32, 48))


def read(steps=5, batch_size=4, dataset=None, **options):
    """Images, targets and sizes of all batches, one after the other."""
    batches = make_loader(dataset or small(), AUGMENTATION, batch_size, steps, **options)
    return [torch.cat(parts) for parts in list(zip(*batches, strict=True))[:3]]


def same(first, second):
    return all(map(torch.equal, first, second))


def test_batches():
    loader = make_loader(small(), AUGMENTATION, 4, 5)
    batches = list(loader)
    assert len(loader) == len(batches) == 5
    for batch in batches:
        assert batch.images.shape == (4, 3, 24, 40) and batch.images.dtype == torch.uint8
        assert batch.target.shape == (4, 24, 40) and batch.target.dtype == torch.uint8
        assert batch.sizes.shape == (4, 2) and batch.sizes.dtype == torch.int64
        assert batch.seconds.shape == (4,) and (batch.seconds > 0).all()


def test_pictures_do_not_depend_on_workers():
    alone = read()
    for workers in (1, 2):
        assert same(read(workers=workers), alone)


def test_pictures_do_not_depend_on_the_number_of_processes():
    """Each step's pictures, put in the order of the ranks, are those of one process."""
    alone = read()
    for world_size in (2, 4):
        parts = [read(rank=rank, world_size=world_size, workers=rank % 2) for rank in range(2)]
        parts += [read(rank=rank, world_size=world_size) for rank in range(2, world_size)]
        share = 4 // world_size
        together = [
            torch.cat([p[i : i + share] for i in range(0, 5 * share, share) for p in kind])
            for kind in zip(*parts, strict=True)
        ]
        assert same(together, alone)


def test_rank_and_number_come_from_torch_distributed(tmp_path):
    """A process of a group of one that says it is of two would read other pictures."""
    code = (
        "import torch, torch.distributed as dist\n"
        "from test_loader import read\n"
        f"dist.init_process_group('gloo', init_method='file://{tmp_path}/store',\n"
        "                        rank=RANK, world_size=2)\n"
        f"torch.save(read(), '{tmp_path}/RANK.pt')\n"
        "dist.destroy_process_group()\n"
    )
    here = Path(__file__).parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{here}:{here.parent}"}
    processes = [
        subprocess.Popen([sys.executable, "-c", code.replace("RANK", rank)], env=environment)
        for rank in "01"
    ]
    assert [process.wait(60) for process in processes] == [0, 0]
    for rank in range(2):
        assert same(torch.load(tmp_path / f"{rank}.pt"), read(rank=rank, world_size=2))


def test_pictures_change_with_epoch_and_seed():
    dataset = torch.utils.data.Subset(small(), [0])
    images = read(4, 1, dataset)[0]
    assert len({image.numpy().tobytes() for image in images}) == 4
    assert not torch.equal(read(4, 1, dataset, seed=1)[0], images)
    order = [list(TrainSampler(7, 7, 1, seed)) for seed in (0, 1)]
    assert order[0] != order[1]


def test_every_epoch_has_every_sample_once():
    keys = [key for batch in TrainSampler(7, 4, 7) for key in batch]
    epochs = [[index for epoch, index in keys if epoch == e] for e in range(4)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert [epoch for epoch, _ in keys] == sorted(epoch for epoch, _ in keys)


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_resuming_continues_with_the_same_pictures(done):
    whole = read()
    start = make_loader(small(), AUGMENTATION, 4, 5).batch_sampler.position_after(done)
    assert start == divmod(4 * done, 7)
    rest = read(5 - done, start=start, workers=1)
    assert same(rest, [part[4 * done :] for part in whole])
    # What is saved may itself come from a run that was resumed.
    again = TrainSampler(7, 4, 5 - done, start=start)
    assert again.position_after(2) == divmod(4 * (done + 2), 7)
    assert again.position_after(0) == start


def test_the_loader_leaves_torchs_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    read(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_errors_of_a_worker_name_the_file(tmp_path):
    write_pair(tmp_path, "good")
    write_pair(tmp_path, "bad", label=9)
    data = FolderDataset(tmp_path / "images/train", tmp_path / "annotations/train", ["x", "y"])
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"bad\.png holds label 9 at 600 pixels"):
            read(1, 2, data, workers=workers)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="no sender of a signal here")
def test_sigterm_ends_a_worker_only_from_its_parent():
    """Not from elsewhere, as in SLURM's last minutes; else the interpreter could never end."""
    batches = iter(make_loader(small(), AUGMENTATION, 2, 8, workers=1))
    next(batches)
    [worker] = batches._workers
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    assert sum(1 for _ in zip(batches, range(5), strict=False)) == 5 and worker.is_alive()
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0


def test_images_per_second():
    seconds = torch.tensor([0.1, 0.3], dtype=torch.float64)
    assert images_per_second(seconds, 0) == pytest.approx(5)
    assert images_per_second(seconds, 1) == pytest.approx(5)
    assert images_per_second(seconds, 8) == pytest.approx(40)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 0}, "no samples"),
        ({"batch_size": 3, "world_size": 2}, "multiple of their number 2, got 3"),
        ({"rank": 1}, "rank must be 0 to 0, got 1"),
        ({"steps": -1}, "steps and seed must be"),
        ({"start": (0, 7)}, r"0 <= position < 7, got \(0, 7\)"),
    ],
)
def test_rejects_what_does_not_exist(change, message):
    with pytest.raises(ValueError, match=message):
        TrainSampler(**{"length": 7, "batch_size": 4, "steps": 1, **change})


def test_in_memory_and_files_give_the_same(tmp_path):
    values = np.random.default_rng(0)
    for stem in "abc":
        write_pair(tmp_path, stem, label=int(values.integers(2)))
    data = FolderDataset(tmp_path / "images/train", tmp_path / "annotations/train", ["x", "y"])
    assert same(read(2, 3, InMemory(data), workers=1), read(2, 3, data))
