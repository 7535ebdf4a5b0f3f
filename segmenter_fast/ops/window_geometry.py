"""Where windows lie on an image, and how an output pixel reads their patches.

A view is one scaled, perhaps flipped, copy of an image, cut into windows. The protocol upsamples
every window's logits to pixels (U), drops the padding, adds the windows at their anchors and
divides by how many cover a pixel (1/c), resizes to the output (R) and flips back (F). All of it is
linear and treats rows and columns separately, since anchors form a grid and the count is a product
of two counts. So it is one sparse matrix per axis, whose rows are the taps of an output pixel:

    T = F R diag(1/c) [shift_1 U, shift_2 U, ...]     (output, windows x patches)

Its weights are >= 0 and every row sums to 1: each output is a convex combination of patches. A row
has 2 to 4 entries away from overlaps.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from segmenter_fast.ops.upsample import LOGIT_DTYPES


def check_int(name: str, value: int, least: int = 1) -> None:
    """Raise TypeError or ValueError unless `value` is an int of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_size(name: str, value: Sequence[int]) -> tuple[int, int]:
    """(H, W) as a tuple; raise TypeError or ValueError unless it is two positive ints."""
    if not isinstance(value, (tuple, list, torch.Size)) or len(value) != 2:
        raise ValueError(f"{name} must be (H, W), got {value!r}")
    for axis, pixels in zip(("height", "width"), value, strict=True):
        check_int(f"{name}'s {axis}", pixels)
    return tuple(value)


def window_anchors(length: int, window: int, stride: int) -> list[int]:
    """First pixels of the windows along one axis: 0, stride, 2 stride, ... and length - window.

    Args:
        length: pixels of the axis, at least `window`.
        window: pixels of a window.
        stride: pixels between windows, at most `window` if there are several.

    Returns:
        Strictly increasing anchors; the last window ends with the axis.

    Raises:
        ValueError: not positive, length < window, or pixels that no window covers.
        TypeError: not ints.

    Source: official segm/model/utils.py, sliding_window.
    """
    for name, value in (("length", length), ("window", window), ("stride", stride)):
        check_int(name, value)
    if length < window:
        raise ValueError(f"a window of {window} pixels does not fit an axis of {length}")
    if stride > window and length > window:
        raise ValueError(
            f"stride {stride} is larger than the window of {window}: pixels between windows would "
            "have no prediction"
        )
    return [*range(0, length - window, stride), length - window]


@dataclasses.dataclass(frozen=True, eq=False)
class WindowView:
    """Patch logits of all windows of one scaled, perhaps flipped, copy of an image.

    Args:
        logits: (N, K, h, w) floating point, windows in row-major order of their anchors, a window
            padded at the right and bottom to h x w whole patches.
        image_size: (H, W) in pixels of the copy that the windows were cut from.
        window: (height, width) of a window in pixels, at most `image_size`.
        stride: pixels between windows.
        patch_size: side of a patch in pixels.
        flip: the copy is mirrored left to right.

    Raises:
        ValueError: a shape that contradicts the others.  TypeError: logits not floating point.
    """

    logits: Tensor
    image_size: tuple[int, int]
    window: tuple[int, int]
    stride: int
    patch_size: int
    flip: bool = False

    def __post_init__(self):
        check_int("patch_size", self.patch_size)
        image_size = check_size("image_size", self.image_size)
        window = check_size("window", self.window)
        rows, columns = self.anchors
        grid = [-(-side // self.patch_size) for side in window]
        expected = (len(rows) * len(columns), *grid)
        if self.logits.ndim != 4 or (self.logits.shape[0], *self.logits.shape[2:]) != expected:
            raise ValueError(
                f"logits must be ({expected[0]}, K, {grid[0]}, {grid[1]}) for windows of {window} "
                f"at stride {self.stride} in {image_size}, got {tuple(self.logits.shape)}"
            )
        if self.logits.shape[1] == 0:
            raise ValueError("logits need at least one class")
        if self.logits.dtype not in LOGIT_DTYPES:
            raise TypeError(f"logits must be floating point, got {self.logits.dtype}")

    @property
    def anchors(self) -> tuple[list[int], list[int]]:
        """Top edges and left edges of the windows, in pixels."""
        top, left = (
            window_anchors(length, window, self.stride)
            for length, window in zip(self.image_size, self.window, strict=True)
        )
        return top, left


# --------------------------------------------------------------------------------------- tap tables
class AxisTaps(NamedTuple):
    """One axis of T as sparse rows: output pixel y reads entries start[y] to start[y + 1].

    Attributes:
        start: (output + 1,) int32.
        index: (entries,) int32 position in the stacked patch grid, increasing within a row.
        weight: (entries,) float32 or float64, positive; every row sums to 1.
        grid: length of the stacked patch grid, windows x patches.
    """

    start: Tensor
    index: Tensor
    weight: Tensor
    grid: int

    def dense(self) -> Tensor:
        """(output, grid) the same as a matrix."""
        counts = self.start.diff().long()
        rows = torch.arange(len(counts)).repeat_interleave(counts)
        matrix = self.weight.new_zeros(len(counts), self.grid)
        matrix[rows, self.index.long()] = self.weight
        return matrix


def _bilinear(output: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Lower source, upper source and the upper one's weight (float64), half-pixel centres.

    The source coordinate is rounded in `dtype`, because that is where PyTorch rounds it.
    """
    scale = torch.tensor(length, dtype=dtype) / output
    source = (scale * (torch.arange(output, dtype=dtype) + 0.5) - 0.5).clamp(min=0)
    lower = source.long().clamp(max=length - 1)
    upper = (lower + 1).clamp(max=length - 1)
    return lower, upper, (source - lower).double().clamp(0, 1)


# A video's frames ask for the same tables again and again; building them costs more than reading
# the logits through them.
@functools.lru_cache(maxsize=64)
def axis_taps(
    length: int,
    window: int,
    stride: int,
    patch_size: int,
    size: int,
    flip: bool = False,
    dtype: torch.dtype = torch.float32,
) -> AxisTaps:
    """T = F R diag(1/c) [shift_i U] for one axis, built in float64.

    Args:
        length: pixels of the scaled image along this axis.
        window: pixels of a window.
        stride: pixels between windows.
        patch_size: pixels of a patch.
        size: pixels of the output.
        flip: the view is mirrored along this axis.
        dtype: of the weights, float32 or float64, and of PyTorch's rounding of coordinates.

    Returns:
        AxisTaps of `size` rows over len(anchors) * ceil(window / patch_size) patches.

    Raises:
        ValueError: as `window_anchors`, or a patch or size that is not positive.
    """
    check_int("patch_size", patch_size)
    check_int("size", size)
    anchors = torch.tensor(window_anchors(length, window, stride))
    patches = -(-window // patch_size)
    grid = len(anchors) * patches

    # [shift_i U] and c as (pixel, patch, weight) entries, two for each pixel of each window.
    pixel = anchors[:, None] + torch.arange(window)
    first = torch.arange(len(anchors))[:, None] * patches
    lower, upper, fraction = (t[:window] for t in _bilinear(patches * patch_size, patches, dtype))
    count = torch.bincount(pixel.flatten(), minlength=length)
    patch = torch.stack((first + lower, first + upper)).flatten()
    weight = (torch.stack((1 - fraction, fraction))[:, None] / count[pixel]).flatten()
    pixel = pixel.expand(2, -1, -1).flatten()
    order = pixel.argsort(stable=True)
    patch, weight = patch[order], weight[order]
    entries = torch.bincount(pixel, minlength=length)
    start = entries.cumsum(0) - entries

    # R reads two pixels for each output, and with them all their entries.
    lower, upper, fraction = _bilinear(size, length, dtype)
    read = torch.stack((lower, upper), 1).flatten()
    read_weight = torch.stack((1 - fraction, fraction), 1).flatten()
    output = torch.arange(size).repeat_interleave(2)
    if flip:
        output = size - 1 - output
    times = entries[read]
    owner = torch.arange(2 * size).repeat_interleave(times)
    within = torch.arange(len(owner)) - (times.cumsum(0) - times)[owner]
    entry = start[read[owner]] + within

    # Entries of the same output and patch add up; those of weight 0 are none.
    key, position = torch.unique(output[owner] * grid + patch[entry], return_inverse=True)
    total = torch.zeros(len(key), dtype=torch.float64)
    total.index_add_(0, position, read_weight[owner] * weight[entry])
    key, total = key[total > 0], total[total > 0]
    rows = torch.bincount(key // grid, minlength=size)
    return AxisTaps(F.pad(rows.cumsum(0), (1, 0)).int(), (key % grid).int(), total.to(dtype), grid)
