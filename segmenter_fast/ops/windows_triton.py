"""Sliding windows, scales and flips on a GPU, evaluated without a full-size intermediate.

With S a view's patch logits as one grid (i, j) of all windows, and TY, TX the taps of its two axes
(ops/window_geometry.py), the work is done one axis after the other, for a strip of output rows:

    V_k(y, j) = sum_i TY(y, i) S_k(i, j)
    z_k(y, x) = sum_j TX(x, j) V_k(y, j)

Labels of a single view are argmax_k z_k. For the rest a second kernel turns z into a softmax over
the classes and adds it to those of the other views, (rows, W, K) of the strip; where all classes
fit in a block, which they do up to 256, z is made once per pixel, otherwise once each for its
maximum, its sum of powers and its powers. How many rows a strip has is set by memory alone, so
nothing waits for the GPU; tap tables are moved to it once per geometry.

The first class wins ties and NaN counts as largest, as in torch.argmax. No gradient.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from segmenter_fast.ops._triton import Operation, accumulator, check_device, launch, next_power_of_2
from segmenter_fast.ops._windows_triton import LABELS, ROWS, SOFTMAX
from segmenter_fast.ops.upsample import label_dtype, upcast
from segmenter_fast.ops.window_geometry import WindowView, axis_taps

STRIP_BYTES = 1 << 26
"""Memory of a strip: combined rows and, beyond a single view's labels, probabilities."""
MOST_CLASSES_AT_ONCE = 256


# --------------------------------------------------------------------------- launches
class _View(NamedTuple):
    """A view as the kernels take it; taps are start, index and weight of y, then of x."""

    logits: Tensor  # (windows, K, h, w)
    taps: Sequence[Tensor]
    window_columns: int
    most: int  # taps that a column has at most

    @property
    def columns(self) -> int:
        """J, columns of patches of all windows."""
        return self.window_columns * self.logits.shape[3]

    def combine_rows(self, first: int, rows: int) -> Tensor:
        """V of a strip, (rows, J, K)."""
        n_cls, h, w = self.logits.shape[1:]
        out = self.logits.new_empty((rows, self.columns, n_cls), dtype=self.taps[2].dtype)
        config = ROWS.config(out)
        tiles = -(-self.columns // config["BLOCK_J"])
        launch(
            ROWS,
            (rows * tiles, -(-n_cls // config["BLOCK_K"])),
            config,
            *(self.logits, *self.taps[:3], out, *self.logits.stride(), n_cls, h, w),
            *(self.window_columns, self.columns, first, tiles),
            DTYPE=accumulator(self.logits.dtype),
        )
        return out

    def write_labels(self, combined: Tensor, first: int, labels: Tensor) -> None:
        """Labels of a strip into (H, W) `labels`."""
        rows, columns, n_cls = combined.shape
        config = LABELS.config(combined)
        tiles = -(-labels.shape[1] // config["BLOCK_X"])
        launch(
            LABELS,
            (rows * tiles,),
            config,
            *(combined, *self.taps[3:], labels, n_cls, columns, labels.shape[1], self.most),
            *(first, tiles),
            DTYPE=accumulator(combined.dtype),
        )

    def add_softmax(self, combined: Tensor, p: Tensor, views: int, first_view: bool) -> None:
        """Add the softmax of a strip, divided by `views`, to `p` (rows, W, K)."""
        rows, columns, n_cls = combined.shape
        config = SOFTMAX.config(combined)
        tiles = -(-p.shape[1] // config["BLOCK_X"])
        launch(
            SOFTMAX,
            (rows * tiles,),
            config,
            *(combined, *self.taps[3:], p, n_cls, columns, p.shape[1], self.most, views, tiles),
            DTYPE=accumulator(combined.dtype),
            FIRST=first_view,
            AT_ONCE=n_cls <= MOST_CLASSES_AT_ONCE,
            BLOCK_K=next_power_of_2(min(n_cls, MOST_CLASSES_AT_ONCE)),
        )


def _strips(height: int, bytes_per_row: int) -> range:
    """First rows of strips that keep to STRIP_BYTES."""
    return range(0, height, max(1, STRIP_BYTES // bytes_per_row))


@functools.lru_cache(maxsize=64)
def _taps_on(device: torch.device, *geometry: Any) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
    taps = axis_taps(*geometry)
    tables = (taps.start.to(device), taps.index.to(device), taps.weight.to(device))
    return tables, int(taps.start.diff().max())


def taps_of(view: WindowView, size: tuple[int, int]) -> tuple[list[Tensor], int]:
    """Six tap tables of a view on its device, rows first, and the most taps of a column."""
    dtype = torch.float64 if view.logits.dtype == torch.float64 else torch.float32
    tables: list[Tensor] = []
    for axis in (0, 1):
        side = (view.image_size[axis], view.window[axis], view.stride, view.patch_size, size[axis])
        of_axis, most = _taps_on(view.logits.device, *side, view.flip and axis == 1, dtype)
        tables += of_axis
    return tables, most


# --------------------------------------------------------------------------- operators
@torch.library.custom_op(
    "segmenter_fast::window_labels_triton", mutates_args=(), device_types=("cpu", "cuda")
)
def _window_labels_op(
    logits: Tensor,
    taps: Sequence[Tensor],
    window_columns: int,
    most: int,
    size: Sequence[int],
) -> Tensor:
    """(H, W) labels of one view; taps are start, index and weight of y, then of x."""
    check_device(logits)
    view = _View(logits, taps, window_columns, most)
    n_cls = logits.shape[1]
    labels = torch.empty(*size, dtype=label_dtype(n_cls), device=logits.device)
    strips = _strips(size[0], view.columns * n_cls * taps[2].element_size())
    for first in strips:
        combined = view.combine_rows(first, min(strips.step, size[0] - first))
        view.write_labels(combined, first, labels)
    return labels


@_window_labels_op.register_fake
def _(
    logits: Tensor,
    taps: Sequence[Tensor],
    window_columns: int,
    most: int,
    size: Sequence[int],
) -> Tensor:
    return logits.new_empty(size, dtype=label_dtype(logits.shape[1]))


@torch.library.custom_op(
    "segmenter_fast::window_probabilities_triton",
    mutates_args=(),
    device_types=("cpu", "cuda"),
)
def _window_probabilities_op(
    logits: Sequence[Tensor],
    taps: Sequence[Tensor],
    window_columns: Sequence[int],
    most: Sequence[int],
    size: Sequence[int],
    with_labels: bool,
    probabilities: str,
) -> tuple[Tensor, Tensor]:
    """(labels, probabilities), empty where not wanted; six taps for each view."""
    check_device(logits[0])
    views = [
        _View(one, taps[6 * i : 6 * i + 6], window_columns[i], most[i])
        for i, one in enumerate(logits)
    ]
    labels, values = _empty(logits[0], size, with_labels, probabilities)
    n_cls = logits[0].shape[1]
    columns = size[1] + max(view.columns for view in views)
    strips = _strips(size[0], columns * n_cls * values.element_size())
    for first in strips:
        rows = slice(first, min(first + strips.step, size[0]))
        p = values.new_empty((rows.stop - first, size[1], n_cls))
        for i, view in enumerate(views):
            view.add_softmax(view.combine_rows(first, len(p)), p, len(views), i == 0)
        if with_labels:
            labels[rows] = p.argmax(-1).to(labels.dtype)
        if probabilities == "top1":
            values[rows] = p.amax(-1)
        elif probabilities == "all":
            values[:, rows] = p.permute(2, 0, 1)
    return labels, values


def _empty(
    logits: Tensor, size: Sequence[int], with_labels: bool, probabilities: str
) -> tuple[Tensor, Tensor]:
    n_cls = logits.shape[1]
    shape = {"none": (0,), "top1": tuple(size), "all": (n_cls, *size)}[probabilities]
    labels = logits.new_empty(size if with_labels else (0,), dtype=label_dtype(n_cls))
    return labels, upcast(logits.new_empty(0)).new_empty(shape)


@_window_probabilities_op.register_fake
def _(
    logits: Sequence[Tensor],
    taps: Sequence[Tensor],
    window_columns: Sequence[int],
    most: Sequence[int],
    size: Sequence[int],
    with_labels: bool,
    probabilities: str,
) -> tuple[Tensor, Tensor]:
    return _empty(logits[0], size, with_labels, probabilities)


def evaluate_windows(
    views: Sequence[WindowView], size: tuple[int, int], labels: bool, probabilities: str
) -> tuple[Tensor, Tensor | None]:
    """What `WindowLogits` asks of a backend: labels and "none", "top1" or "all" probabilities."""
    taps, most = zip(*(taps_of(view, size) for view in views), strict=True)
    columns = [len(view.anchors[1]) for view in views]
    ops = torch.ops.segmenter_fast
    if probabilities == "none" and len(views) == 1:
        (view,) = views
        return ops.window_labels_triton(view.logits, taps[0], columns[0], most[0], size), None
    return ops.window_probabilities_triton(
        [view.logits for view in views],
        [table for tables in taps for table in tables],
        columns,
        most,
        size,
        labels,
        probabilities,
    )


# --------------------------------------------------------------------------- declarations
def _make_views(
    dtype: torch.dtype,
    n_cls: int,
    image: tuple[int, int],
    window: int,
    stride: int,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> dict[str, Any]:
    views = []
    for scale in scales:
        shape = tuple(max(window, round(side * scale)) for side in image)
        counts = [-(-(side - window) // stride) + 1 for side in shape]
        grid = -(-window // 16)
        for mirrored in (False, True) if flip else (False,):
            logits = torch.randn(counts[0] * counts[1], n_cls, grid, grid).to(dtype)
            views.append(WindowView(logits, shape, (window, window), stride, 16, mirrored))
    return {"views": views, "size": image}


def _labels_reference(views: Sequence[WindowView], size: tuple[int, int]) -> Tensor:
    from segmenter_fast.ops.windows import window_logits_reference

    return (
        window_logits_reference(views[0], size).argmax(0).to(label_dtype(views[0].logits.shape[1]))
    )


def _probabilities_reference(views: Sequence[WindowView], size: tuple[int, int]) -> Tensor:
    from segmenter_fast.ops.windows import window_probabilities_reference

    return window_probabilities_reference(views, size)


def _work(inputs: Mapping[str, Any], outputs: int) -> tuple[float, float]:
    views, (height, width) = inputs["views"], inputs["size"]
    read = sum(view.logits.nbytes for view in views)
    n_cls = views[0].logits.shape[1]
    # The rows' sum is shared by a row; along it a pixel and class takes two multiply-adds at least.
    return 4 * len(views) * height * width * n_cls, read + outputs * height * width


OPERATIONS = (
    Operation(
        name="window_labels_triton",
        make_inputs=_make_views,
        run=lambda views, size: evaluate_windows(views, size, True, "none")[0],
        reference=_labels_reference,
        case={"n_cls": 150, "image": (512, 683), "window": 512, "stride": 512},
        checks=({"n_cls": 19, "image": (70, 101), "window": 48, "stride": 31},),
        toy={"n_cls": 5, "image": (7, 20), "window": 16, "stride": 16},
        work=lambda inputs: _work(inputs, 1),
        verdict="labels",
    ),
    Operation(
        name="window_probabilities_triton",
        make_inputs=_make_views,
        run=lambda views, size: evaluate_windows(views, size, False, "all")[1],
        reference=_probabilities_reference,
        case={
            **{"n_cls": 150, "image": (512, 683), "window": 512, "stride": 512},
            **{"scales": (0.75, 1.0, 1.25), "flip": True},
        },
        checks=(
            {
                **{"n_cls": 19, "image": (40, 61), "window": 32, "stride": 20},
                **{"scales": (1.0, 1.3), "flip": True},
            },
        ),
        toy={"n_cls": 5, "image": (7, 20), "window": 16, "stride": 16, "flip": True},
        work=lambda inputs: _work(inputs, 4 * inputs["views"][0].logits.shape[1]),
    ),
)
