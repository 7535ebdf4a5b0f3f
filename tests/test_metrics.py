"""mIoU and accuracy against torchmetrics and degenerate counts."""

import math

import pytest
import torch

from segmenter_fast.metrics import iou, mean_iou, pixel_accuracy
from segmenter_fast.ops.confusion import confusion_matrix


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
