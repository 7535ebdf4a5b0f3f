"""Confusion matrix and mIoU against torchmetrics and a slow plain count."""

import math

import pytest
import torch

from segmenter_fast.metrics import confusion_matrix, iou, mean_iou, pixel_accuracy


def slow_confusion(labels, target, num_classes, ignore_index):
    counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    for a, b in zip(labels.flatten().tolist(), target.flatten().tolist(), strict=True):
        if b != ignore_index:
            counts[b, a] += 1
    return counts


@pytest.mark.parametrize("num_classes", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_matches_plain_count(num_classes, dtype):
    torch.manual_seed(num_classes)
    labels = torch.randint(0, num_classes, (2, 9, 11)).to(dtype)
    target = torch.randint(0, num_classes, (2, 9, 11)).to(dtype)
    target[torch.rand(target.shape) < 0.2] = 255
    ours = confusion_matrix(labels, target, num_classes)
    assert torch.equal(ours, slow_confusion(labels, target, num_classes, 255))
    assert ours.sum() == (target != 255).sum()


def test_matches_torchmetrics():
    classification = pytest.importorskip("torchmetrics.classification")
    torch.manual_seed(0)
    labels, target = torch.randint(0, 5, (3, 40, 50)), torch.randint(0, 5, (3, 40, 50))
    target[0, :9] = 255
    confusion = confusion_matrix(labels, target, 5)
    metric = classification.MulticlassJaccardIndex(5, average="none", ignore_index=255)
    torch.testing.assert_close(iou(confusion).float(), metric(labels, target))


def test_degenerate():
    target = torch.tensor([[0, 0, 255]])
    confusion = confusion_matrix(torch.tensor([[0, 0, 1]]), target, 3)
    assert iou(confusion).isnan().tolist() == [False, True, True]
    assert mean_iou(confusion) == 1.0 and pixel_accuracy(confusion) == 1.0
    empty = confusion_matrix(target, torch.full_like(target, 255), 256)
    assert empty.sum() == 0 and math.isnan(mean_iou(empty)) and math.isnan(pixel_accuracy(empty))


def test_rejects_bad_input():
    with pytest.raises(ValueError, match="differ"):
        confusion_matrix(torch.zeros(2), torch.zeros(3), 2)
    with pytest.raises(ValueError, match=r"target holds 5, outside \[0, 3\)"):
        confusion_matrix(torch.tensor([0]), torch.tensor([5]), 3)
    with pytest.raises(ValueError, match=r"labels holds 3, outside \[0, 3\)"):
        confusion_matrix(torch.tensor([3]), torch.tensor([0]), 3)
