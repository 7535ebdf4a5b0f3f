"""Confusion counts on a GPU: how many pixels of each true class were given each label.

    C[t, l] = number of pixels with target t and label l          t not ignore_index

Label maps have runs: stretches of a row with one pair (t, l). A run from pixel s to pixel e adds
(e + 1) - s to its counter, so it takes two additions however long it is, e + 1 at its end and -s
at its start, and a pixel knows by its neighbours whether it is one of the two. So there is nothing
to sort, and no table per block; a counter is wrong while the kernel runs and right after it.

Most runs are of few pairs, and additions to one address wait for each other: programs take turns at
several copies of the counters, which are added up at the end. All sums are of integers, so results
never vary. Pixels out of range are not counted.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from segmenter_fast.ops._triton import Config, Kernel, Operation, check_device, launch, tl, triton
from segmenter_fast.ops.confusion import confusion_matrix_reference

COPIES = 32
COPIES_BYTES = 1 << 23
"""Memory that copies of the counters may take beside the first."""


# --------------------------------------------------------------------------- kernels
@triton.jit
def pair_of(labels_ptr, target_ptr, pixel, pixels, K, ignore_index):
    """Index t K + l of the pixel's counter, -1 if it is not counted."""
    inside = tl.where((pixel >= 0) & (pixel < pixels), 1, 0) != 0
    target = tl.load(target_ptr + pixel, mask=inside, other=0).to(tl.int64)
    label = tl.load(labels_ptr + pixel, mask=inside, other=0).to(tl.int64)
    counted = inside & (target != ignore_index)
    counted = counted & (target >= 0) & (target < K) & (label >= 0) & (label < K)
    return tl.where(counted, target * K + label, -1)


@triton.jit
def _count_kernel(
    labels_ptr,  # (pixels,)
    target_ptr,  # (pixels,)
    counts_ptr,  # (copies, K, K) int64
    pixels,
    K,
    copies,
    ignore_index,
    BLOCK: tl.constexpr,
):
    lane = tl.arange(0, BLOCK)
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + lane
    pair = pair_of(labels_ptr, target_ptr, pixel, pixels, K, ignore_index)
    before = pair_of(labels_ptr, target_ptr, pixel - 1, pixels, K, ignore_index)
    after = pair_of(labels_ptr, target_ptr, pixel + 1, pixels, K, ignore_index)
    starts = (lane == 0) | (before != pair)
    ends = (lane == BLOCK - 1) | (after != pair)
    amount = tl.where(ends, lane + 1, 0) - tl.where(starts, lane, 0)
    copy = (tl.program_id(0) % copies).to(tl.int64) * K * K
    counted = (pair >= 0) & (amount != 0)
    tl.atomic_add(counts_ptr + copy + pair, amount.to(tl.int64), mask=counted, sem="relaxed")


_COUNT = Kernel(_count_kernel, {"default": (Config({"BLOCK": 1024}), Config({"BLOCK": 512}))})


# --------------------------------------------------------------------------- operator
@torch.library.custom_op(
    "segmenter_fast::confusion_matrix_triton", mutates_args=(), device_types=("cpu", "cuda")
)
def _confusion_matrix_op(
    labels: Tensor, target: Tensor, num_classes: int, ignore_index: int
) -> Tensor:
    check_device(labels)
    labels, target = labels.contiguous(), target.contiguous()
    copies = min(COPIES, 1 + COPIES_BYTES // (8 * num_classes**2))
    counts = labels.new_zeros((copies, num_classes, num_classes), dtype=torch.int64)
    pixels = labels.numel()
    config = _COUNT.config(labels)
    launch(
        _COUNT,
        (-(-pixels // config["BLOCK"]),),
        config,
        *(labels, target, counts, pixels, num_classes, copies, ignore_index),
    )
    return counts.sum(0)


@_confusion_matrix_op.register_fake
def _(labels: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    return labels.new_empty((num_classes, num_classes), dtype=torch.int64)


# --------------------------------------------------------------------------- declaration
def _make_inputs(
    dtype: torch.dtype, batch: int, n_cls: int, size: tuple[int, int], run: int = 24
) -> dict[str, Any]:
    def regions() -> Tensor:
        coarse = torch.randint(0, n_cls, (batch, *(-(-side // run) for side in size)))
        fine = coarse.repeat_interleave(run, 1).repeat_interleave(run, 2)
        return fine[:, : size[0], : size[1]].to(dtype).contiguous()

    target = regions()
    labels = torch.where(torch.rand(target.shape) < 0.9, target, regions())
    target.masked_fill_(torch.rand(target.shape) < 0.02, 127)
    return {"labels": labels, "target": target, "num_classes": n_cls, "ignore_index": 127}


def _work(inputs: Mapping[str, Any]) -> tuple[float, float]:
    # Both maps read once, all counters written.
    read = inputs["labels"].nbytes + inputs["target"].nbytes
    return 0, read + 8 * inputs["num_classes"] ** 2


OPERATION = Operation(
    name="confusion_matrix_triton",
    make_inputs=_make_inputs,
    run=lambda **inputs: torch.ops.segmenter_fast.confusion_matrix_triton(*inputs.values()),
    reference=confusion_matrix_reference,
    case={"batch": 32, "n_cls": 100, "size": (512, 512)},
    checks=(
        {"batch": 2, "n_cls": 7, "size": (29, 31), "run": 3},
        {"batch": 1, "n_cls": 90, "size": (37, 101), "run": 1},
    ),
    toy={"batch": 1, "n_cls": 5, "size": (9, 14), "run": 3},
    work=_work,
    verdict="equal",
    dtypes=(torch.uint8, torch.int16, torch.int64),
    contestants={
        "CUDA C++": lambda **inputs: torch.ops.segmenter_fast.confusion_matrix_cuda(
            *inputs.values(), False
        )
    },
)
