"""Confusion counts: how many pixels of each true class were given each label.

    C[t, l] = number of pixels with target t and label l          t not ignore_index

From patch logits the label is argmax_k z_k (ops/upsample_argmax.py). The label map is written on
the way: at a byte per pixel it is a hundredth of the logits that it replaces, and one counter
serves labels from anywhere. No gradient.
"""

import torch
from torch import Tensor

from segmenter_fast.backend import native_module, resolve_backend
from segmenter_fast.ops.upsample import TARGET_DTYPES, check_labels, check_target, dtype_name
from segmenter_fast.ops.upsample_argmax import upsample_argmax


def confusion_matrix_reference(
    labels: Tensor, target: Tensor, num_classes: int, ignore_index: int
) -> Tensor:
    """The definition, in plain PyTorch on any device; checks the labels' range."""
    valid = target != ignore_index
    check_labels(target, num_classes, ignore_index)
    labels, target = labels[valid].long(), target[valid].long()
    _check_predictions(labels, num_classes)
    counts = torch.bincount(target * num_classes + labels, minlength=num_classes**2)
    return counts.view(num_classes, num_classes)


def _check_predictions(labels: Tensor, num_classes: int) -> None:
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
        raise ValueError(f"labels holds {int(labels[outside][0])}, outside [0, {num_classes})")


@torch.library.custom_op("segmenter_fast::confusion_matrix", mutates_args=(), device_types="cpu")
def _confusion_matrix_op(
    labels: Tensor, target: Tensor, num_classes: int, ignore_index: int
) -> Tensor:
    labels, target = labels.contiguous(), target.contiguous()
    try:
        counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    except RuntimeError as error:
        size = 8 * num_classes**2 / 2**30
        raise MemoryError(
            f"counts of {num_classes} x {num_classes} classes take {size:.1f} GiB, which cannot be "
            "allocated"
        ) from error
    bad_targets, bad_labels = native_module().confusion_matrix(
        labels.data_ptr(),
        dtype_name(labels),
        target.data_ptr(),
        dtype_name(target),
        labels.numel(),
        num_classes,
        ignore_index,
        torch.get_num_threads(),
        counts.data_ptr(),
    )
    if bad_targets:
        check_labels(target, num_classes, ignore_index)
    if bad_labels:
        _check_predictions(labels[target != ignore_index], num_classes)
    return counts


@_confusion_matrix_op.register_fake
def _(labels: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    return labels.new_empty((num_classes, num_classes), dtype=torch.int64)


def confusion_matrix(
    labels: Tensor,
    target: Tensor,
    num_classes: int,
    ignore_index: int = 255,
    check: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Count pixels by (target, label).

    Args:
        labels: (...,) uint8|int16|int32|int64 predictions in [0, num_classes); any value where the
            target is ignored.
        target: (...,) uint8|int16|int32|int64 truth in [0, num_classes) or `ignore_index`.
        num_classes: K.
        ignore_index: pixels of this target are left out, be it a class or not.
        check: look at the values with Triton as well, which makes the host wait for the GPU: not
            for a graph that is captured. "native" and "reference" always do. Without it pixels out
            of range are not counted.
        backend: see `segmenter_fast.backend`.

    Returns:
        (K, K) int64 on the inputs' device; rows are the truth.

    Raises:
        ValueError: shapes or devices differ, num_classes below 1; where values are looked at, one
            is out of range.
        TypeError: not one of the integer types.
        BackendError: the backend named cannot run here.
    """
    for name, tensor in (("labels", labels), ("target", target)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
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
    backend = resolve_backend(backend, labels.device)
    if backend == "reference":
        return confusion_matrix_reference(labels, target, num_classes, ignore_index)
    if backend == "triton":
        if check:
            check_labels(target, num_classes, ignore_index)
            _check_predictions(labels[target != ignore_index], num_classes)
        return torch.ops.segmenter_fast.confusion_matrix_triton(
            labels, target, num_classes, ignore_index
        )
    return torch.ops.segmenter_fast.confusion_matrix(labels, target, num_classes, ignore_index)


def upsample_confusion(
    logits: Tensor,
    target: Tensor,
    size: tuple[int, int] | None = None,
    crop: tuple[int, int, int, int] | None = None,
    ignore_index: int = 255,
    check: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Confusion counts C[t, argmax_k z_k] of the bilinearly upsampled logits.

    Args:
        logits: (B, K, h, w) floating point, any strides.
        target: (B, height, width) uint8|int16|int32|int64 class indices, covering `crop`.
        size: (H, W) the full output, in pixels; None is the target's own size.
        crop: (top, left, height, width) in pixels, the part of `size` that the target covers; None
            is all of it.
        ignore_index: label of the pixels that are not counted.
        check: as for `confusion_matrix`, of the target.
        backend: see `segmenter_fast.backend`.

    Returns:
        (K, K) int64, rows are target classes and columns predicted ones; every pixel that is not
        ignored is counted once.

    Raises:
        ValueError: shapes that do not fit together; where labels are looked at, one outside [0, K)
            that is not ignore_index.
        TypeError: logits not floating point, target not an integer type.
        BackendError: the backend named cannot run here.
    """
    size, crop = check_target(target, logits, size, crop)
    labels = upsample_argmax(logits, size, crop, backend=backend)
    return confusion_matrix(labels, target, logits.shape[1], ignore_index, check, backend)
