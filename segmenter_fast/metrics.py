"""Confusion matrices and what is read off them."""

import torch
from torch import Tensor


def confusion_matrix(
    labels: Tensor, target: Tensor, num_classes: int, ignore_index: int = 255
) -> Tensor:
    """Count pixels by (target, label).

    Args:
        labels: (...,) integer predictions in [0, num_classes).
        target: (...,) integer truth in [0, num_classes) or `ignore_index`.
        num_classes: K.
        ignore_index: pixels of this target are left out.

    Returns:
        (K, K) int64 on the inputs' device; rows are the truth.

    Raises:
        ValueError: shapes differ, or a value is out of range.
    """
    if labels.shape != target.shape:
        raise ValueError(f"labels {tuple(labels.shape)} and target {tuple(target.shape)} differ")
    valid = target != ignore_index
    labels, target = labels[valid].long(), target[valid].long()
    for name, values in (("target", target), ("labels", labels)):
        outside = (values < 0) | (values >= num_classes)
        if outside.any():
            raise ValueError(
                f"{name} holds {int(values[outside][0])}, outside [0, {num_classes}) "
                f"and not ignore_index {ignore_index}"
            )
    counts = torch.bincount(target * num_classes + labels, minlength=num_classes**2)
    return counts.view(num_classes, num_classes)


def iou(confusion: Tensor) -> Tensor:
    """Intersection over union of each class, (K,) float64; NaN where a class never occurs.

    Args:
        confusion: (K, K) counts, rows are the truth.
    """
    confusion = confusion.double()
    intersection = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - intersection
    return intersection / union  # 0 / 0 is NaN


def mean_iou(confusion: Tensor) -> float:
    """Mean of `iou` over the classes that occur in the truth or in the prediction, in [0, 1]."""
    return float(iou(confusion).nanmean())


def pixel_accuracy(confusion: Tensor) -> float:
    """Share of the counted pixels that are right, in [0, 1]."""
    confusion = confusion.double()
    return float(confusion.diagonal().sum() / confusion.sum())
