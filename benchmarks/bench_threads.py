"""Seg-T-Mask/16, images to label maps, with 1, 2, ... all threads: what each thread more brings.

512 x 512, K = 150, batch 1, random weights; a case for each precision. The ratio is against one
thread. All counts are timed in the same rounds, so that what a busy machine does meets all of them.
"""

import os
from collections.abc import Callable

import pytest
import torch
from bench_model import PRECISIONS, SIZE, images, judges, ours
from harness import Prepared

from segmenter_fast import create_model

VARIANT = "Seg-T-Mask/16"


def cores() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def counts(most: int) -> list[int]:
    """Every number of threads up to 4, then powers of two, and all: 1, 2, 3, 4, 8, 16, 24."""
    small = list(range(1, min(most, 4) + 1))
    doubled = [2**i for i in range(3, most.bit_length()) if 2**i < most]
    return sorted({*small, *doubled, most})


def with_threads(threads: int, call: Prepared) -> Prepared:
    """The same with another number of threads; PyTorch's own is put back."""

    def within(function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                return function()
            finally:
                torch.set_num_threads(before)

        return run

    def build() -> Callable[[], torch.Tensor]:
        labels = within(call)
        labels.fresh = within(lambda: call.fresh())
        return labels

    return Prepared(build)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_threads(contest, precision):
    torch.manual_seed(0)
    model = create_model(VARIANT, num_classes=150, image_size=SIZE).eval()
    x = images(1)
    check, agreement = judges(model, x)
    call = ours(model, x, precision)  # one copy for all: its weights are prepared once
    contest(
        f"{VARIANT}, 512 x 512, batch 1, K = 150, {precision}",
        {f"{n} thread{'s' * (n > 1)}, {precision}": with_threads(n, call) for n in counts(cores())},
        check,
        rounds=11,
        peers=1,
        agreement=agreement,
        images=1,
    )
