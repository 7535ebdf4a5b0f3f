"""What is read off confusion counts, against torchmetrics and a count with sets."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segmenter_fast.metrics import (
    frequency_weighted_iou,
    iou,
    mean_accuracy,
    mean_iou,
    pixel_accuracy,
)
from segmenter_fast.ops.confusion import confusion_matrix


def plain(labels, target, classes):
    """The metrics by the definition, with sets of pixels and exact fractions; None for 0 / 0."""
    pixels = [n for n, true in enumerate(target) if true != 255]
    truth = [{n for n in pixels if target[n] == k} for k in range(classes)]
    found = [{n for n in pixels if labels[n] == k} for k in range(classes)]

    def ratio(part, whole):
        return Fraction(part, whole) if whole else None

    def mean(values):
        values = [value for value in values if value is not None]
        return sum(values) / len(values) if values else None

    both = [len(t & f) for t, f in zip(truth, found, strict=True)]
    by_class = [ratio(b, len(t | f)) for b, t, f in zip(both, truth, found, strict=True)]
    weighted = sum(len(t) * (value or 0) for t, value in zip(truth, by_class, strict=True))
    return {
        "iou": by_class,
        "mean": mean(by_class),
        "mean_in_truth": mean(value for value, t in zip(by_class, truth, strict=True) if t),
        "accuracy": ratio(sum(both), len(pixels)),
        "mean_accuracy": mean(ratio(b, len(t)) for b, t in zip(both, truth, strict=True)),
        "weighted": weighted / len(pixels) if pixels else None,
    }


def assert_close(ours, expected):
    assert math.isnan(ours) if expected is None else ours == pytest.approx(float(expected))


def assert_matches(labels, target, classes):
    expected = plain(labels.flatten().tolist(), target.flatten().tolist(), classes)
    confusion = confusion_matrix(labels, target, classes)
    for ours, value in zip(iou(confusion).tolist(), expected["iou"], strict=True):
        assert_close(ours, value)
    assert_close(mean_iou(confusion), expected["mean"])
    assert_close(mean_iou(confusion, in_truth=True), expected["mean_in_truth"])
    assert_close(pixel_accuracy(confusion), expected["accuracy"])
    assert_close(mean_accuracy(confusion), expected["mean_accuracy"])
    assert_close(frequency_weighted_iou(confusion), expected["weighted"])

    classification = pytest.importorskip("torchmetrics.classification")
    if classes > 1 and (target != 255).any():  # torchmetrics needs two classes and a pixel
        occurs = torch.tensor([value is not None for value in expected["iou"]])
        for average, ours in (("none", iou(confusion)[occurs]), ("macro", mean_iou(confusion))):
            metric = classification.MulticlassJaccardIndex(
                classes, average=average, ignore_index=255
            )
            theirs = metric(labels.long(), target.long())
            theirs = theirs[occurs] if average == "none" else theirs
            torch.testing.assert_close(torch.as_tensor(ours).float(), theirs)


@settings(max_examples=60, deadline=None)
@given(
    classes=st.integers(1, 7),
    pixels=st.integers(1, 40),
    true_classes=st.integers(1, 7),
    found_classes=st.integers(1, 7),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_matches_torchmetrics_and_sets(classes, pixels, true_classes, found_classes, ignored, seed):
    """With all pixels ignored, classes that are absent on either side, one class, one pixel."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, min(true_classes, classes), (pixels,), generator=generator)
    labels = torch.randint(0, min(found_classes, classes), (pixels,), generator=generator)
    target[torch.rand(pixels, generator=generator) < ignored] = 255
    assert_matches(labels.byte(), target.byte(), classes)


def test_many_classes():
    torch.manual_seed(0)
    labels, target = torch.randint(0, 150, (2, 60, 70))
    target[0, :9] = 255
    assert_matches(labels, target, 150)


def test_degenerate():
    target = torch.tensor([[0, 0, 255]])
    confusion = confusion_matrix(torch.tensor([[0, 0, 1]]), target, 3)
    assert iou(confusion).isnan().tolist() == [False, True, True]
    assert mean_iou(confusion) == 1.0 and pixel_accuracy(confusion) == 1.0
    empty = confusion_matrix(target, torch.full_like(target, 255), 256)
    assert empty.sum() == 0
    for metric in (mean_iou, pixel_accuracy, mean_accuracy, frequency_weighted_iou):
        assert math.isnan(metric(empty))
