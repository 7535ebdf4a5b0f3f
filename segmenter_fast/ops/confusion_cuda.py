"""Confusion counts in CUDA C++: how many pixels of each true class were given each label.

    C[t, l] = number of pixels with target t and label l          t not ignore_index

Each block of threads counts a part of the pixels. While the K x K counters fit into a block's
shared memory (K up to 241 on sm_90, 204 on sm_80, 159 on sm_86) it counts there, in 32 bits, and
adds what is not zero to the 64-bit result at the end; beyond, warps add to the result directly,
equal pixels in one addition. Pixels out of range are never counted, only numbered, and the two
numbers stay on the GPU unless `check` asks for them: without it nothing waits for the GPU, and a
CUDA graph can capture the call. Kernel: csrc/cuda/confusion.cu.

The public functions in ops/confusion.py do not call this operator: on a GPU Triton serves until
measurements on one decide which of the two is faster.
"""

import torch
from torch import Tensor

from segmenter_fast.ops._cuda import cuda_module, queue_of
from segmenter_fast.ops.confusion import confusion_matrix_reference
from segmenter_fast.ops.upsample import TARGET_DTYPES, dtype_name


@torch.library.custom_op(
    "segmenter_fast::confusion_matrix_cuda", mutates_args=(), device_types="cuda"
)
def _confusion_matrix_op(
    labels: Tensor, target: Tensor, num_classes: int, ignore_index: int, check: bool
) -> Tensor:
    kernels = cuda_module()
    _check(labels, target, num_classes)
    labels, target = labels.contiguous(), target.contiguous()
    counts = labels.new_zeros((num_classes, num_classes), dtype=torch.int64)
    errors = labels.new_zeros((2,), dtype=torch.int64)
    kernels.confusion_matrix(
        labels.data_ptr(),
        dtype_name(labels),
        target.data_ptr(),
        dtype_name(target),
        labels.numel(),
        num_classes,
        ignore_index,
        counts.data_ptr(),
        errors.data_ptr(),
        *queue_of(labels),
    )
    if check and any(errors.tolist()):
        # Finds the first wrong values and raises with them.
        confusion_matrix_reference(labels, target, num_classes, ignore_index)
    return counts


@_confusion_matrix_op.register_fake
def _(labels: Tensor, target: Tensor, num_classes: int, ignore_index: int, check: bool) -> Tensor:
    return labels.new_empty((num_classes, num_classes), dtype=torch.int64)


def _check(labels: Tensor, target: Tensor, num_classes: int) -> None:
    for name, tensor in (("labels", labels), ("target", target)):
        if tensor.dtype not in TARGET_DTYPES:
            raise TypeError(f"{name} must be uint8, int16, int32 or int64, got {tensor.dtype}")
    if labels.shape != target.shape:
        raise ValueError(f"labels {tuple(labels.shape)} and target {tuple(target.shape)} differ")
    if labels.device != target.device:
        raise ValueError(
            f"labels are on {labels.device} and target is on {target.device}; move one of them"
        )
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
