"""Run once undisturbed and once killed again and again: `python killed_runs.py WHOLE KILLED SEED`.

Each attempt is a fork of this process, which has imported everything and computed nothing, so that
a dozen of them take seconds.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from test_train import tiny

from segmenter_fast.data import Scenes
from segmenter_fast.train import TrainOptions, train

OPTIONS = TrainOptions(
    steps=20, batch_size=2, lr=0.1, save_every=1, val_every=5, log_every=2, ema=0.5
)
KILLS = 12


def die_in_save(number):
    """Have this process killed when half of its save of this number is written."""
    real, saves = torch.save, []

    def save(content, file):
        saves.append(content)
        if len(saves) <= number:
            return real(content, file)
        file.write(b"PK and half of a file")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save


def attempt(data, folder, dying_save=None):
    """The number of a new process that trains, or goes on with training."""
    process = os.fork()
    if process:
        return process
    try:
        if dying_save is not None:
            die_in_save(dying_save)
        resume = (folder / "state.pt").exists()
        train(tiny(), data, data[:1], folder, OPTIONS, resume=resume)
        os._exit(0)
    except BaseException as error:
        print(repr(error), flush=True)
        os._exit(1)


def status(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main(whole, folder, seed):
    torch.set_num_threads(1)
    scenes = Scenes(4, size=(32, 48))
    data = [scenes[i] for i in range(4)]
    started = time.perf_counter()
    assert status(attempt(data, whole)) == 0
    seconds = time.perf_counter() - started
    chance, kills, torn = random.Random(seed), 0, 0
    while True:
        dying_save = chance.randrange(3) if kills % 4 == 1 else None
        process = attempt(data, folder, dying_save)
        if dying_save is None and kills < KILLS:
            time.sleep(chance.uniform(0, seconds / 3))
            os.kill(process, signal.SIGKILL)
        ended = status(process)
        if ended == 0:
            break
        assert ended == -signal.SIGKILL, ended
        kills += 1
        torn += any(folder.glob("**/.*.tmp"))
    print("kills", kills, "torn", torn)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
