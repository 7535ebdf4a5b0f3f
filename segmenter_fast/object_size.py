"""The size of the object that each pixel of a label map belongs to.

An object is a connected component of a class in the ground truth: pixels that touch, at a side or a
corner, and have one label. Pixels without a class belong to none, and part what they lie between.
Every other pixel is in one component, so the confusion counts of the sizes add up to those of all
pixels. IoU of a size is read off its own counts: of the pixels of objects of that size, which are
in both truth and prediction a class, over which are in either. A wrong label is so charged to the
size of the object that it was given to, not of the one that it was taken for.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

AREAS = (32**2, 96**2)
"""Pixels, at the label map's size, from which an object is medium, and from which it is large.

Source: the evaluation of COCO (Lin et al. 2014), of whose areas these are the bounds.
"""

SIZES = ("small", "medium", "large")


def check_areas(areas: Sequence[int]) -> tuple[int, int]:
    """The two bounds, or a ValueError that says what they must be."""
    areas = tuple(areas)
    if len(areas) != 2 or not 0 < areas[0] <= areas[1]:
        raise ValueError(
            "object areas must be two numbers of pixels, from which objects are medium and from "
            f"which large, such as {AREAS[0]},{AREAS[1]}; got {areas}"
        )
    return areas


def object_sizes(
    target: Tensor, ignore_index: int = 255, areas: Sequence[int] = AREAS
) -> tuple[Tensor, Tensor]:
    """For each pixel the number in `SIZES` of its object's size.

    Args:
        target: (H, W) integer labels on the CPU.
        ignore_index: label without a class.
        areas: two numbers of pixels: small is below the first, large from the second.

    Returns:
        sizes: (H, W) uint8, 255 where the label is `ignore_index`.
        objects: (3,) int64, how many objects of each size there are.

    Raises:
        ValueError: not two dimensions, or bounds that are not in order.
    """
    areas = check_areas(areas)
    if target.ndim != 2:
        raise ValueError(f"target must be (H, W), got {tuple(target.shape)}")
    if target.numel() == 0:
        return torch.zeros(target.shape, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)
    labels = target.numpy()
    starts, lengths, component = _components(labels)
    area = np.bincount(component, weights=lengths)
    size = np.searchsorted(areas, area, side="right").astype(np.uint8)
    ignored = labels.reshape(-1)[starts] == ignore_index
    # A component's number is that of its first run; the others' numbers count no object.
    first = (component == np.arange(len(component))) & ~ignored
    objects = np.bincount(size[component[first]], minlength=3)
    sizes = np.repeat(np.where(ignored, np.uint8(255), size[component]), lengths)
    return torch.from_numpy(sizes.reshape(labels.shape)), torch.from_numpy(objects)


def _components(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut the rows of (H, W) into N runs of one label, and join those that touch.

    Returns:
        starts: (N,) flat index of each run's first pixel.
        lengths: (N,) its pixels.
        component: (N,) the number of the first run that it hangs together with.
    """
    height, width = labels.shape
    begins = np.ones((height, width), bool)
    np.not_equal(labels[:, 1:], labels[:, :-1], out=begins[:, 1:])
    run = np.cumsum(begins.reshape(-1), dtype=np.int32) - 1  # of each pixel
    starts = np.flatnonzero(begins)
    lengths = np.diff(starts, append=labels.size)

    # A run touches those above it from one pixel before its first to one behind its last.
    lower = np.searchsorted(starts, width)  # the first run of the second row
    rows, left = np.divmod(starts[lower:], width)
    above = (rows - 1) * width
    first = run[above + np.maximum(left - 1, 0)]
    last = run[above + np.minimum(left + lengths[lower:], width - 1)]
    number = last - first + 1
    below = np.repeat(np.arange(lower, len(starts), dtype=np.int32), number)
    offset = np.arange(len(below)) - np.repeat(np.cumsum(number) - number, number)
    upper = np.repeat(first, number) + offset.astype(np.int32)
    value = labels.reshape(-1)[starts]
    same = value[below] == value[upper]
    return starts, lengths, _joined(len(starts), upper[same], below[same])


def _joined(count: int, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The smallest number that each of `count` hangs together with through the pairs.

    Every round hangs the roots of each pair below the smaller one, then shortens all the paths to
    their roots: a union-find over whole arrays, whose rounds grow with the logarithm of `count`.
    """
    parent = np.arange(count, dtype=np.int32)
    while len(one):
        a, b = parent[one], parent[other]
        apart = a != b
        one, other, a, b = one[apart], other[apart], a[apart], b[apart]
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(shorter := parent[parent], parent):
            parent = shorter
    return parent
