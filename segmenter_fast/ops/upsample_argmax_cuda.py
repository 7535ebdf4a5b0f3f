"""Upsample + argmax in CUDA C++: labels straight from patch logits, those of the CPU bit by bit.

    label(Y, X) = argmax_k z_k(Y, X)          z as in ops/upsample.py

A warp labels one cell of the patch grid, the pixels that read the same four patches. First its
lanes are classes: inside the cell every z_k is a convex combination of four corners, so with

    least = max_k min_corners l_k          no label's logit is below it anywhere in the cell

a class whose corners all lie below `least` cannot win there. Each lane votes for its class, and a
ballot of the warp puts those that are left, often one of 150, into a list in order. Then the lanes
are pixels, and keep the first of the largest values. The arithmetic is that of csrc/cell.h, which
the CPU's kernel includes too, without fused multiply-adds. Kernel: csrc/cuda/upsample_argmax.cu.

The public function in ops/upsample_argmax.py does not call this operator: on a GPU Triton serves
until measurements on one decide which of the two is faster.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from segmenter_fast.ops import upsample_argmax_triton
from segmenter_fast.ops._cuda import cuda_module, queue_of
from segmenter_fast.ops.upsample import check_geometry, dtype_name, label_dtype


@torch.library.custom_op(
    "segmenter_fast::upsample_argmax_cuda", mutates_args=(), device_types="cuda"
)
def _upsample_argmax_op(logits: Tensor, size: Sequence[int], crop: Sequence[int]) -> Tensor:
    kernels = cuda_module()
    size, crop = check_geometry(logits, size, crop)
    labels = logits.new_empty((logits.shape[0], *crop[2:]), dtype=label_dtype(logits.shape[1]))
    kernels.upsample_argmax(
        logits.data_ptr(),
        dtype_name(logits),
        logits.shape,
        logits.stride(),
        size,
        crop,
        labels.data_ptr(),
        dtype_name(labels),
        *queue_of(logits),
    )
    return labels


@_upsample_argmax_op.register_fake
def _(logits: Tensor, size: Sequence[int], crop: Sequence[int]) -> Tensor:
    shape = (logits.shape[0], crop[2], crop[3])
    return logits.new_empty(shape, dtype=label_dtype(logits.shape[1]))


OPERATION = replace(
    upsample_argmax_triton.OPERATION,
    name="upsample_argmax_cuda",
    run=torch.ops.segmenter_fast.upsample_argmax_cuda,
)
