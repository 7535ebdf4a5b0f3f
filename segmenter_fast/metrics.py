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


def mean_iou(confusion: Tensor, in_truth: bool = False) -> float:
    """Mean of `iou` over the classes that occur in the truth or in the prediction, in [0, 1].

    Args:
        confusion: (K, K) counts, rows are the truth.
        in_truth: over the classes that occur in the truth alone.
    """
    values = iou(confusion)
    return float((values[confusion.sum(1) > 0] if in_truth else values).nanmean())


def frequency_weighted_iou(confusion: Tensor) -> float:
    """Mean of `iou` weighted with each class's share of the true pixels, in [0, 1].

    Source: Long et al. 2015, section 5.
    """
    truth = confusion.double().sum(1)
    return float((truth * iou(confusion).nan_to_num()).sum() / truth.sum())


def mean_accuracy(confusion: Tensor) -> float:
    """Mean over the true classes of the share of their pixels that are right, in [0, 1]."""
    confusion = confusion.double()
    return float((confusion.diagonal() / confusion.sum(1)).nanmean())


def pixel_accuracy(confusion: Tensor) -> float:
    """Share of the counted pixels that are right, in [0, 1]."""
    confusion = confusion.double()
    return float(confusion.diagonal().sum() / confusion.sum())
