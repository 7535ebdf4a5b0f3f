"""Sliding windows, scales and flips, evaluated from patch logits without a full-size intermediate.

With S the patch logits of all windows of a view as one grid, and TY, TX the taps of its two axes
(ops/window_geometry.py),

    z_k(y, x) = sum_ij TY(y, i) TX(x, j) S_k(i, j)             weights >= 0, every row sums to 1
    p_k(y, x) = 1/V sum_v exp(z_vk) / sum_c exp(z_vc)          over the V views
    label(y, x) = argmax_k p_k(y, x)                           of z_k directly when V = 1

Backend "native" has two compiled kernels. Labels of a single view are an argmax of convex
combinations, so classes are pruned exactly, block by block, as in ops/upsample_argmax.py. The rest
works row by row of the output: the grid's rows are combined once for all columns, and then each
pixel takes its taps along x, exponentials, and its share of the mean. "triton" goes the same way by
strips of rows (ops/windows_triton.py). Elsewhere PyTorch evaluates a tile of the output at a time
with two small matrix products. Memory is that of the patch logits plus K x row, K x strip or K x
tile. No gradient.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from segmenter_fast.backend import native_module, resolve_backend
from segmenter_fast.ops.upsample import dtype_name, label_dtype, upcast
from segmenter_fast.ops.window_geometry import (
    AxisTaps,
    WindowView,
    axis_taps,
    check_size,
)
from segmenter_fast.ops.windows_triton import evaluate_windows

TILE = (128, 1024)
"""Rows and columns of output that PyTorch evaluates at once: 79 MB of logits at K = 150."""
PROBABILITIES = ("none", "top1", "all")


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


# --------------------------------------------------------------------------------- compiled kernels
def _native_view(logits: Tensor, taps: Sequence[Tensor], windows: Sequence[int]):
    """`_C.WindowView`; the caller keeps the tensors alive."""
    addresses = [table.data_ptr() for table in taps]
    return native_module().WindowView(
        logits.data_ptr(),
        windows,
        logits.shape[2:],
        logits.stride(),
        addresses[:3],
        addresses[3:],
    )


@torch.library.custom_op("segmenter_fast::window_labels", mutates_args=(), device_types="cpu")
def _window_labels_op(
    logits: Tensor, taps: Sequence[Tensor], windows: Sequence[int], size: Sequence[int]
) -> Tensor:
    """(H, W) labels of one view; taps are start, index and weight of y, then of x."""
    n_cls = logits.shape[1]
    labels = torch.empty(*size, dtype=label_dtype(n_cls))
    native_module().window_labels(
        _native_view(logits, taps, windows),
        dtype_name(logits),
        n_cls,
        size,
        torch.get_num_threads(),
        labels.data_ptr(),
        dtype_name(labels),
    )
    return labels


@_window_labels_op.register_fake
def _(logits, taps, windows, size) -> Tensor:
    return logits.new_empty(size, dtype=label_dtype(logits.shape[1]))


@torch.library.custom_op(
    "segmenter_fast::window_probabilities", mutates_args=(), device_types="cpu"
)
def _window_probabilities_op(
    logits: Sequence[Tensor],
    taps: Sequence[Tensor],
    windows: Sequence[int],
    size: Sequence[int],
    with_labels: bool,
    probabilities: str,
) -> tuple[Tensor, Tensor]:
    """(labels, probabilities), empty where not wanted; 6 taps and (rows, columns) for each view."""
    first = logits[0]
    n_cls = first.shape[1]
    labels = torch.empty(size if with_labels else 0, dtype=label_dtype(n_cls))
    shape = {"none": (0,), "top1": tuple(size), "all": (n_cls, *size)}[probabilities]
    values = first.new_empty(shape)
    views = [
        _native_view(view, taps[6 * i : 6 * i + 6], windows[2 * i : 2 * i + 2])
        for i, view in enumerate(logits)
    ]
    native_module().window_probabilities(
        views,
        dtype_name(first),
        n_cls,
        size,
        torch.get_num_threads(),
        labels.data_ptr() if with_labels else 0,
        dtype_name(labels),
        values.data_ptr() if probabilities == "top1" else 0,
        values.data_ptr() if probabilities == "all" else 0,
    )
    return labels, values


@_window_probabilities_op.register_fake
def _(logits, taps, windows, size, with_labels, probabilities) -> tuple[Tensor, Tensor]:
    n_cls = logits[0].shape[1]
    labels = logits[0].new_empty(size if with_labels else 0, dtype=label_dtype(n_cls))
    shape = {"none": (0,), "top1": tuple(size), "all": (n_cls, *size)}[probabilities]
    return labels, logits[0].new_empty(shape)


# --------------------------------------------------------------------------------- tiles in PyTorch
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


# --------------------------------------------------------------------------------------- evaluation
class WindowLogits:
    """Patch logits of every view of an image, read at each output pixel.

    Args:
        views: one or more WindowView with the same K, dtype and device.
        size: (H, W) of the output in pixels.
        backend: see `segmenter_fast.backend`; "reference" evaluates tiles in PyTorch.
        tile: rows and columns of output that PyTorch evaluates at once. NaN and infinity spread
            over every tile that reads them; the compiled kernels confine them to pixels.

    Raises:
        ValueError: no views, views that do not agree, a size or tile that is not positive.
        BackendError: the backend named cannot run on the views' device.

    Source: official segm/model/utils.py, inference and merge_windows.
    """

    def __init__(
        self,
        views: Sequence[WindowView],
        size: tuple[int, int],
        backend: str = "auto",
        tile: tuple[int, int] = TILE,
    ):
        if not views:
            raise ValueError("views is empty: at least one is needed")
        kinds = {(v.logits.shape[1], v.logits.dtype, v.logits.device) for v in views}
        if len(kinds) > 1:
            raise ValueError(f"views differ in (classes, dtype, device): {sorted(map(str, kinds))}")
        self.views = tuple(views)
        self.size = check_size("size", size)
        self.n_cls = views[0].logits.shape[1]
        self.backend = resolve_backend(backend, views[0].logits.device)
        self.tile = check_size("tile", tile)

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

        The first class wins ties and NaN counts as largest. (Of the reference: ties that are still
        ties after its matrix products, which may round equal rows differently.)
        """
        return self._evaluate(True, "none")[0]

    def probabilities(self, top1: bool = False) -> Tensor:
        """(K, H, W) softmax averaged over views, or its (H, W) largest if `top1`."""
        return self._evaluate(False, "top1" if top1 else "all")[1]

    def labels_and_probabilities(self, top1: bool = False) -> tuple[Tensor, Tensor]:
        """Both `labels()` and `probabilities(top1)`, evaluated once."""
        return self._evaluate(True, "top1" if top1 else "all")

    def _evaluate(self, labels: bool, probabilities: str) -> tuple[Tensor | None, Tensor | None]:
        device = self.views[0].logits.device
        # Autocast would round the weights to bfloat16; the official code stays in float32 here.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            if self.backend == "native":
                return self._evaluate_native(labels, probabilities)
            if self.backend == "triton":
                return evaluate_windows(self.views, self.size, labels, probabilities)
            return self._evaluate_tiles(labels, probabilities)

    def _evaluate_native(self, labels: bool, probabilities: str) -> tuple[Tensor, Tensor | None]:
        logits = [upcast(view.logits) for view in self.views]
        taps = [table for view in self.views for axis in self.axes(view) for table in axis[:3]]
        windows = [len(anchors) for view in self.views for anchors in view.anchors]
        if probabilities == "none" and len(logits) == 1:
            label = torch.ops.segmenter_fast.window_labels(logits[0], taps, windows, self.size)
            return label, None
        return torch.ops.segmenter_fast.window_probabilities(
            logits, taps, windows, self.size, labels, probabilities
        )

    def _evaluate_tiles(
        self, labels: bool, probabilities: str
    ) -> tuple[Tensor | None, Tensor | None]:
        plans = list(self._plans())
        grid = plans[0].grid
        chosen = values = None
        if labels:
            chosen = grid.new_empty(self.size, dtype=label_dtype(self.n_cls))
        if probabilities != "none":
            values = grid.new_empty(
                self.size if probabilities == "top1" else (self.n_cls, *self.size)
            )
        for rows, columns, scores in self._tiles(plans):
            if probabilities == "top1":
                values[rows, columns] = scores.amax(1)
            elif probabilities == "all":
                values[:, rows, columns] = scores.transpose(0, 1)
            if labels:
                chosen[rows, columns] = scores.argmax(1).to(chosen.dtype)
        return chosen, values

    def _plans(self) -> Iterator[_Plan]:
        device = self.views[0].logits.device
        for view in self.views:
            rows, columns = self.axes(view)
            yield _Plan(
                _stack(view),
                _blocks(rows, self.tile[0], device),
                _blocks(columns, self.tile[1], device),
            )

    @staticmethod
    def _tiles(plans: list[_Plan]) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield (rows, columns, probabilities averaged over views (y, k, x))."""
        for y in range(len(plans[0].rows)):
            strips = [plan.grid.index_select(0, plan.rows[y].patches) for plan in plans]
            for x in range(len(plans[0].columns)):
                scores = None
                for plan, strip in zip(plans, strips, strict=True):
                    row, column = plan.rows[y], plan.columns[x]
                    patches = strip.index_select(2, column.patches)
                    view = _combine(patches, row.weight, column.weight).softmax(1)
                    scores = view if scores is None else scores.add_(view)
                yield (
                    slice(row.start, row.stop),
                    slice(column.start, column.stop),
                    scores.div_(len(plans)),
                )
