"""Windows, strides, resizes and flips that the tests of both window files share."""

import pytest
import torch

from segmenter_fast.ops.window_geometry import WindowView, window_anchors

# image, window, stride, patch, output, flip: strides that no patch divides, padding, both resizes
CASES = {
    "one window": ((64, 64), (64, 64), 64, 8, (64, 64), False),
    "aligned": ((64, 96), (32, 32), 16, 16, (64, 96), False),
    "unaligned stride": ((70, 101), (48, 48), 31, 16, (70, 101), False),
    "smaller and flipped": ((70, 101), (48, 48), 31, 16, (53, 47), True),
    "larger and flipped": ((90, 77), (50, 50), 37, 16, (120, 177), True),
    "much smaller": ((97, 133), (41, 41), 13, 8, (5, 3), False),
    "many overlaps": ((40, 61), (24, 24), 5, 8, (41, 61), True),
    "whole image": ((37, 53), (37, 53), 53, 16, (37, 53), True),
    "one pixel": ((1, 1), (1, 1), 1, 16, (3, 2), False),
    "thin": ((5, 300), (5, 5), 4, 4, (5, 300), False),
}


def make_view(case, n_cls=6, dtype=torch.float64, seed=0):
    image_size, window, stride, patch, _, flip = case
    count = 1
    for length, side in zip(image_size, window, strict=True):
        count *= len(window_anchors(length, side, stride))
    grid = [-(-side // patch) for side in window]
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, n_cls, *grid, generator=generator, dtype=torch.float64)
    return WindowView(logits.to(dtype), image_size, window, stride, patch, flip)


each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
