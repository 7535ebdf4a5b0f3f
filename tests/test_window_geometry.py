"""Anchors and tap tables, held to the protocol's own full-resolution steps."""

import itertools

import pytest
import torch
from window_cases import each_case

from segmenter_fast.ops.window_geometry import WindowView, axis_taps, window_anchors
from segmenter_fast.ops.windows import window_logits_reference


@pytest.mark.parametrize(
    ("length", "window", "stride", "expected"),
    [
        (64, 64, 64, [0]),
        (64, 64, 100, [0]),
        (65, 64, 64, [0, 1]),
        (128, 64, 64, [0, 64]),
        (134, 64, 48, [0, 48, 70]),
        (10, 4, 3, [0, 3, 6]),
    ],
)
def test_anchors(length, window, stride, expected):
    assert window_anchors(length, window, stride) == expected


def test_anchors_cover_every_pixel_and_stay_inside():
    for length in range(1, 40):
        for window in range(1, length + 1):
            for stride in range(1, window + 1):
                anchors = window_anchors(length, window, stride)
                assert anchors[0] == 0 and anchors[-1] == length - window
                steps = [b - a for a, b in itertools.pairwise(anchors)]
                assert all(0 < step <= window for step in steps)


@each_case
def test_taps_are_the_composed_matrices(case):
    image_size, window, stride, patch, output, flip = case
    for axis in (0, 1):
        length, side = image_size[axis], window[axis]
        taps = axis_taps(length, side, stride, patch, output[axis], flip, torch.float64)
        # The same operator from the reference: one class, the other axis one pixel and one patch.
        anchors = window_anchors(length, side, stride)
        grid = len(anchors) * -(-side // patch)
        basis = torch.eye(grid, dtype=torch.float64).reshape(grid, len(anchors), -1, 1)
        view = WindowView(basis.transpose(0, 1), (length, 1), (side, 1), stride, patch)
        columns = window_logits_reference(view, (output[axis], 1))[..., 0]
        expected = columns.T.flip(0) if flip else columns.T
        torch.testing.assert_close(taps.dense(), expected, rtol=0, atol=1e-13)


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tap_weights_are_positive_and_sum_to_one(case, dtype):
    image_size, window, stride, patch, output, flip = case
    for axis in (0, 1):
        taps = axis_taps(image_size[axis], window[axis], stride, patch, output[axis], flip, dtype)
        assert taps.weight.dtype == dtype and taps.start.dtype == taps.index.dtype == torch.int32
        assert taps.start[0] == 0 and taps.start[-1] == len(taps.index) == len(taps.weight)
        assert (taps.start.diff() > 0).all()
        assert (taps.weight > 0).all()
        assert 0 <= int(taps.index.min()) and int(taps.index.max()) < taps.grid
        ones = torch.ones(output[axis], dtype=dtype)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(taps.dense().sum(1), ones, rtol=0, atol=8 * eps)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((10, 11, 5), ValueError, "does not fit"),
        ((10, 4, 5), ValueError, "no prediction"),
        ((10, 0, 1), ValueError, "window must be at least 1"),
        ((0, 1, 1), ValueError, "length must be at least 1"),
        ((10, 4, 0), ValueError, "stride must be at least 1"),
        ((10.0, 4, 4), TypeError, "length must be an int"),
        ((10, True, 4), TypeError, "window must be an int"),
    ],
)
def test_rejects_bad_anchors(arguments, error, message):
    with pytest.raises(error, match=message):
        window_anchors(*arguments)


def test_rejects_bad_taps():
    with pytest.raises(ValueError, match="size must be at least 1"):
        axis_taps(10, 4, 4, 2, 0)
    with pytest.raises(ValueError, match="patch_size must be at least 1"):
        axis_taps(10, 4, 4, 0, 10)


def test_rejects_bad_views():
    logits = torch.zeros(4, 3, 2, 2)
    WindowView(logits, (48, 48), (32, 32), 16, 16)
    for bad in (logits[0], logits[:3], logits[:, :, :1]):
        with pytest.raises(ValueError, match=r"logits must be \(4, K, 2, 2\)"):
            WindowView(bad, (48, 48), (32, 32), 16, 16)
    with pytest.raises(TypeError, match="floating point"):
        WindowView(logits.long(), (48, 48), (32, 32), 16, 16)
    with pytest.raises(ValueError, match="at least one class"):
        WindowView(logits[:, :0], (48, 48), (32, 32), 16, 16)
    with pytest.raises(ValueError, match=r"window must be \(H, W\)"):
        WindowView(logits, (48, 48), 32, 16, 16)
    with pytest.raises(ValueError, match="does not fit"):
        WindowView(logits, (48, 48), (64, 64), 16, 16)
