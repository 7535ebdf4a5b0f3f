"""What is read off a confusion matrix (ops/confusion.py makes one)."""

from torch import Tensor


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
