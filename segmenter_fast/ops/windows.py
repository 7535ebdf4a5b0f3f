"""Sliding windows, scales and flips, evaluated from patch logits without a full-size intermediate.

A view is one scaled, perhaps flipped, copy of an image, cut into windows. The protocol upsamples
every window's logits to pixels (U), drops the padding, adds the windows at their anchors and
divides by how many cover a pixel (1/c), resizes to the output (R), flips back (F), takes the
softmax and averages over views. All before the softmax is linear and treats rows and columns
separately, since anchors form a grid and the count is a product of two counts. With S the patch
logits of all windows as one grid,

    T = F R diag(1/c) [shift_1 U, shift_2 U, ...]              per axis, (output, windows x patches)
    z_k(y, x) = sum_ij TY(y, i) TX(x, j) S_k(i, j)             weights >= 0, every row sums to 1
    p_k(y, x) = 1/V sum_v exp(z_vk) / sum_c exp(z_vc)
    label(y, x) = argmax_k p_k(y, x)                           of z_k directly when V = 1

A row of T has 2 to 4 entries away from overlaps, so a tile of the output reads a few patches: two
small matrix products make its logits, and memory is K x tile however large the image.

For V = 1 classes are pruned exactly: a tile's logits are convex combinations of the patches it
reads, so a class whose largest patch logit there is below another's smallest wins no pixel of it.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from segmenter_fast.ops.upsample import LOGIT_DTYPES, label_dtype, upcast
from segmenter_fast.ops.upsample_argmax import upsample_argmax

SERIAL_TILE = (16, 128)
"""Rows and columns of output evaluated at once: K x 2048 floats stay in a core's L2 cache."""
CPU_TILE = (64, 256)
"""With several threads: each operation ends in a barrier, so fewer and larger ones."""
GPU_TILE = (128, 1024)
"""Larger, so that launches do not dominate: K x 131072 floats, 79 MB at K = 150."""


def _check_int(name: str, value: int, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_size(name: str, value: Sequence[int]) -> tuple[int, int]:
    if not isinstance(value, (tuple, list, torch.Size)) or len(value) != 2:
        raise ValueError(f"{name} must be (H, W), got {value!r}")
    for axis, pixels in zip(("height", "width"), value, strict=True):
        _check_int(f"{name}'s {axis}", pixels)
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
        _check_int(name, value)
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
        _check_int("patch_size", self.patch_size)
        image_size = _check_size("image_size", self.image_size)
        window = _check_size("window", self.window)
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


# ---------------------------------------------------------------------------------------- reference
def window_logits_reference(view: WindowView, size: tuple[int, int]) -> Tensor:
    """(K, *size) logits of one view by the protocol's own steps, everything at full resolution.

    Source: official segm/model/utils.py, merge_windows.
    """
    windows = upcast(view.logits)
    n_cls, rows, columns = windows.shape[1:]
    padded = (rows * view.patch_size, columns * view.patch_size)
    height, width = view.window
    total = windows.new_zeros((n_cls, *view.image_size))
    count = windows.new_zeros((1, *view.image_size))
    tops, lefts = view.anchors
    corners = [(top, left) for top in tops for left in lefts]
    for window, (top, left) in zip(windows, corners, strict=True):
        pixels = F.interpolate(window[None], size=padded, mode="bilinear")[0, :, :height, :width]
        total[:, top : top + height, left : left + width] += pixels
        count[:, top : top + height, left : left + width] += 1
    logits = F.interpolate((total / count)[None], size=tuple(size), mode="bilinear")[0]
    return logits.flip(-1) if view.flip else logits


def window_probabilities_reference(views: Sequence[WindowView], size: tuple[int, int]) -> Tensor:
    """(K, *size) softmax of each view's logits, averaged over views.

    Source: official segm/model/utils.py, inference.
    """
    total = window_logits_reference(views[0], size).softmax(0)
    for view in views[1:]:
        total += window_logits_reference(view, size).softmax(0)
    return total / len(views)


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
    _check_int("patch_size", patch_size)
    _check_int("size", size)
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


class _Block(NamedTuple):
    """A run of output pixels, the patches they read and the weights between them."""

    start: int
    stop: int
    patches: Tensor  # (n,) int64
    weight: Tensor  # (stop - start, n)


def _blocks(taps: AxisTaps, step: int, device: torch.device) -> list[_Block]:
    """Cut one axis into runs of `step` pixels with small dense matrices."""
    size = len(taps.start) - 1
    starts = taps.start.tolist()
    blocks = []
    for begin in range(0, size, step):
        end = min(begin + step, size)
        part = slice(starts[begin], starts[end])
        patches, column = torch.unique(taps.index[part].long(), return_inverse=True)
        row = torch.arange(end - begin).repeat_interleave(taps.start[begin : end + 1].diff())
        weight = taps.weight.new_zeros(end - begin, len(patches))
        weight[row, column] = taps.weight[part]
        blocks.append(_Block(begin, end, patches.to(device), weight.to(device)))
    return blocks


# --------------------------------------------------------------------------------------- evaluation
class _Plan(NamedTuple):
    """One view ready to be read: its stacked grid and both axes in blocks."""

    grid: Tensor  # (rows, K, columns): a run of rows is contiguous, classes lie beside each other
    rows: list[_Block]
    columns: list[_Block]


def _stack(view: WindowView) -> Tensor:
    """(windows x patches, K, windows x patches) all windows' patch logits as one grid."""
    windows = upcast(view.logits)
    tops, lefts = view.anchors
    n_cls, height, width = windows.shape[1:]
    grid = windows.reshape(len(tops), len(lefts), n_cls, height, width)
    return grid.permute(0, 3, 2, 1, 4).reshape(len(tops) * height, n_cls, len(lefts) * width)


def _combine(patches: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """sum_ij rows[y, i] columns[x, j] patches[i, k, j] -> (y, k, x), rows first."""
    n_cls, width = patches.shape[1:]
    half = rows @ patches.reshape(len(patches), n_cls * width)
    return (half.reshape(-1, width) @ columns.T).view(len(rows), n_cls, len(columns))


def _candidates(patches: Tensor) -> Tensor | None:
    """Classes that may win somewhere in the tile, or None for all of them.

    Comparisons with NaN are false: neither a class with a NaN nor any class beside it is dropped.
    """
    beaten = patches.amax((0, 2)) < patches.amin((0, 2)).max()
    kept = (~beaten).nonzero()[:, 0]
    return kept if len(kept) < patches.shape[1] else None


def _argmax(scores: Tensor) -> Tensor:
    """Argmax over dim 1 of (rows, K, columns); overwrites `scores`.

    On a CPU, comparing with the maximum and ranking what equals it is several times faster than
    argmax over a dimension in the middle. A NaN makes the maximum NaN, which equals nothing.
    """
    largest = scores.amax(1, keepdim=True)
    n_cls = scores.shape[1]
    if scores.device.type != "cpu" or n_cls > 1 << 24 or largest.isnan().any():
        return scores.argmax(1)
    rank = torch.arange(n_cls, 0, -1, dtype=scores.dtype)[:, None]
    return n_cls - scores.ge_(largest).mul_(rank).amax(1).long()


class WindowLogits:
    """Patch logits of every view of an image, read at each output pixel tile by tile.

    Args:
        views: one or more WindowView with the same K, dtype and device.
        size: (H, W) of the output in pixels.
        tile: rows and columns of output evaluated at once; None suits the device. Finite logits
            give the same result for any tile, up to rounding; NaN and infinity spread over every
            tile that reads them.

    Raises:
        ValueError: no views, views that do not agree, a size or tile that is not positive.

    Source: official segm/model/utils.py, inference and merge_windows.
    """

    def __init__(
        self,
        views: Sequence[WindowView],
        size: tuple[int, int],
        tile: tuple[int, int] | None = None,
    ):
        if not views:
            raise ValueError("views is empty: at least one is needed")
        kinds = {(v.logits.shape[1], v.logits.dtype, v.logits.device) for v in views}
        if len(kinds) > 1:
            raise ValueError(f"views differ in (classes, dtype, device): {sorted(map(str, kinds))}")
        self.views = tuple(views)
        self.size = _check_size("size", size)
        self.n_cls = views[0].logits.shape[1]
        self.tile = self._suitable_tile() if tile is None else _check_size("tile", tile)

    def _suitable_tile(self) -> tuple[int, int]:
        if self.views[0].logits.device.type != "cpu":
            return GPU_TILE
        return CPU_TILE if torch.get_num_threads() > 1 else SERIAL_TILE

    def axes(self, view: WindowView) -> tuple[AxisTaps, AxisTaps]:
        """Tap tables of a view's rows and columns."""
        double = view.logits.dtype == torch.float64
        tables = (
            axis_taps(
                view.image_size[axis],
                view.window[axis],
                view.stride,
                view.patch_size,
                self.size[axis],
                flip=view.flip and axis == 1,
                dtype=torch.float64 if double else torch.float32,
            )
            for axis in (0, 1)
        )
        return tuple(tables)

    def labels(self) -> Tensor:
        """(H, W) class of each pixel: uint8, int16 from 257 classes, int32 from 32768 up.

        The first class wins ties and NaN counts as largest.
        """
        view = self.views[0]
        if len(self.views) == 1 and view.window == view.image_size == self.size and not view.flip:
            # One window that is the image, at its own size: nothing to average or resize.
            padded = tuple(side * view.patch_size for side in view.logits.shape[2:])
            return upsample_argmax(view.logits, padded, (0, 0, *self.size))[0]
        return self._evaluate(labels=True, probabilities=None)[0]

    def probabilities(self, top1: bool = False) -> Tensor:
        """(K, H, W) softmax averaged over views, or its (H, W) largest if `top1`."""
        return self._evaluate(labels=False, probabilities="top1" if top1 else "all")[1]

    def labels_and_probabilities(self, top1: bool = False) -> tuple[Tensor, Tensor]:
        """Both `labels()` and `probabilities(top1)`, evaluated once."""
        return self._evaluate(labels=True, probabilities="top1" if top1 else "all")

    def _plans(self) -> Iterator[_Plan]:
        device = self.views[0].logits.device
        for view in self.views:
            rows, columns = self.axes(view)
            yield _Plan(
                _stack(view),
                _blocks(rows, self.tile[0], device),
                _blocks(columns, self.tile[1], device),
            )

    def _evaluate(
        self, labels: bool, probabilities: str | None
    ) -> tuple[Tensor | None, Tensor | None]:
        logits = self.views[0].logits
        # Autocast would round the weights to bfloat16; the official code stays in float32 here.
        with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
            plans = list(self._plans())
            chosen = values = None
            if labels:
                chosen = logits.new_empty(self.size, dtype=label_dtype(self.n_cls))
            if probabilities is not None:
                shape = self.size if probabilities == "top1" else (self.n_cls, *self.size)
                values = plans[0].grid.new_empty(shape)
            for part in self._tiles(plans, prune=values is None and len(plans) == 1):
                rows, columns, scores, classes = part
                if values is not None and probabilities == "top1":
                    values[rows, columns] = scores.amax(1)
                elif values is not None:
                    values[:, rows, columns] = scores.transpose(0, 1)
                if chosen is not None:
                    winner = _argmax(scores)
                    chosen[rows, columns] = winner if classes is None else classes[winner]
        return chosen, values

    def _tiles(
        self, plans: list[_Plan], prune: bool
    ) -> Iterator[tuple[slice, slice, Tensor, Tensor | None]]:
        """Yield (rows, columns, scores (y, k, x), classes that k counts or None for all).

        Scores are averaged probabilities; with `prune` (one view), logits of the candidates.
        """
        for y in range(len(plans[0].rows)):
            strips = [plan.grid.index_select(0, plan.rows[y].patches) for plan in plans]
            for x in range(len(plans[0].columns)):
                scores = classes = None
                for plan, strip in zip(plans, strips, strict=True):
                    row, column = plan.rows[y], plan.columns[x]
                    patches = strip.index_select(2, column.patches)
                    if prune:
                        classes = _candidates(patches)
                        if classes is not None:
                            patches = patches.index_select(1, classes)
                        scores = _combine(patches, row.weight, column.weight)
                        continue
                    view = _combine(patches, row.weight, column.weight).softmax(1)
                    scores = view if scores is None else scores.add_(view)
                if not prune:
                    scores.div_(len(plans))
                yield slice(row.start, row.stop), slice(column.start, column.stop), scores, classes
