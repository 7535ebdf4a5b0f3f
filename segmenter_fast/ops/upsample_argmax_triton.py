"""Upsample + argmax on a GPU: labels straight from patch logits.

    label(Y, X) = argmax_k z_k(Y, X)          z as in ops/upsample.py

Two kernels. The first looks at a tile's patches only. Inside a cell of the patch grid every z_k is
a convex combination of four corners, so with

    least = max_k min_corners l_k          no label's logit is below it anywhere in the cell

a class whose corners all lie below `least` cannot win in that cell. It writes, for each tile, the
classes that may win in any of its cells, in order: often a handful of the 150. The second kernel
reads that list, interpolates those classes, and keeps the largest. Along a column of pixels in a
cell z_k is linear, v + d y, so the corners are read and blended once for all rows of the tile.

A tile with a NaN or an infinity among its patches is marked, and goes through all classes with the
rule of `torch.argmax`: NaN counts as the largest value. The first class wins ties everywhere.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from segmenter_fast.ops._triton import (
    Config,
    Kernel,
    Operation,
    accumulator,
    check_device,
    launch,
    load_as,
    tl,
    triton,
)
from segmenter_fast.ops._upsampling_triton import (
    between,
    cell_of,
    check_floating,
    first_pixel,
    make_axis,
    power_of_2_cells,
    weight_of,
)
from segmenter_fast.ops.upsample import label_dtype
from segmenter_fast.ops.upsample_argmax import upsample_argmax_reference

EVERY_CLASS = tl.constexpr(-1)
"""In place of a list's length: no class was ruled out, and comparisons must mind NaN."""


# --------------------------------------------------------------------------- kernels
@triton.jit
def _candidates_kernel(
    logits_ptr,  # (B, K, h, w)
    list_ptr,  # (B, cells, tiles, K) int32, the classes that may win in a tile
    count_ptr,  # (B, cells, tiles) int32, how many, or EVERY_CLASS
    stride_b,
    stride_k,
    stride_h,
    stride_w,
    K,
    h,
    w,
    W,
    left,
    right,
    first_cell,
    cells,
    tiles,
    DTYPE: tl.constexpr,
    EPS: tl.constexpr,
    TINY: tl.constexpr,
    CELLS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0)
    tile = pid % tiles
    cell_y = pid // tiles % cells
    image = pid // tiles // cells
    y = first_cell + cell_y
    x = left + tile * BLOCK_X
    x_last = tl.minimum(x + BLOCK_X, right) - 1
    cell_x = cell_of(x, w, W) + tl.arange(0, CELLS)
    in_tile = cell_x <= cell_of(x_last, w, W)
    x0 = tl.minimum(tl.maximum(cell_x, 0), w - 1)
    x1 = tl.minimum(tl.maximum(cell_x, 0) + 1, w - 1)
    patches = logits_ptr + image.to(tl.int64) * stride_b
    upper = patches + tl.maximum(y, 0).to(tl.int64) * stride_h
    lower = patches + tl.minimum(tl.maximum(y, 0) + 1, h - 1).to(tl.int64) * stride_h
    k_lanes = tl.arange(0, BLOCK_K)

    least = tl.full([CELLS], -float("inf"), DTYPE)
    finite = tl.full([BLOCK_K, CELLS], 1, tl.int32)
    for k0 in range(0, K, BLOCK_K):
        k = (k0 + k_lanes)[:, None]
        mask = (k < K) & in_tile[None, :]
        at = k.to(tl.int64) * stride_k
        a = load_as(upper + at + (x0 * stride_w)[None, :], mask, 0.0, DTYPE)
        b = load_as(upper + at + (x1 * stride_w)[None, :], mask, 0.0, DTYPE)
        c = load_as(lower + at + (x0 * stride_w)[None, :], mask, 0.0, DTYPE)
        d = load_as(lower + at + (x1 * stride_w)[None, :], mask, 0.0, DTYPE)
        # Of infinities of one sign the sum is infinite, of both and of NaN it is NaN; times 0 each
        # of them is NaN. Large finite numbers may overflow, which only costs time.
        finite &= (((a + b) + (c + d)) * 0.0 == 0.0).to(tl.int32)
        smallest = tl.minimum(tl.minimum(a, b), tl.minimum(c, d))
        least = tl.maximum(least, tl.max(tl.where(mask, smallest, -float("inf")), 0))
    # A class that may tie after rounding is kept: csrc/cell.h, keep_ties.
    least -= 16.0 * (EPS * tl.abs(least) + TINY)

    count = 0
    list_ptr += pid.to(tl.int64) * K
    for k0 in range(0, K, BLOCK_K):
        k = (k0 + k_lanes)[:, None]
        mask = (k < K) & in_tile[None, :]
        at = k.to(tl.int64) * stride_k
        a = load_as(upper + at + (x0 * stride_w)[None, :], mask, 0.0, DTYPE)
        b = load_as(upper + at + (x1 * stride_w)[None, :], mask, 0.0, DTYPE)
        c = load_as(lower + at + (x0 * stride_w)[None, :], mask, 0.0, DTYPE)
        d = load_as(lower + at + (x1 * stride_w)[None, :], mask, 0.0, DTYPE)
        largest = tl.maximum(tl.maximum(a, b), tl.maximum(c, d))
        kept = tl.max((mask & (largest >= least[None, :])).to(tl.int32), 1)
        position = count + tl.cumsum(kept, 0) - kept
        tl.store(list_ptr + position, k0 + k_lanes, mask=kept != 0)
        count += tl.sum(kept, 0)
    all_finite = tl.min(tl.min(finite, 1), 0)
    tl.store(count_ptr + pid, tl.where(all_finite != 0, count, EVERY_CLASS))


@triton.jit
def _labels_kernel(
    logits_ptr,  # (B, K, h, w)
    list_ptr,  # (B, cells, tiles, K) int32
    count_ptr,  # (B, cells, tiles) int32
    labels_ptr,  # (B, height, width), contiguous
    stride_b,
    stride_k,
    stride_h,
    stride_w,
    K,
    h,
    w,
    H,
    W,
    top,
    bottom,
    left,
    right,
    first_cell,
    cells,
    tiles,
    DTYPE: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    pid = tl.program_id(0)
    tile = pid % tiles
    cell_y = pid // tiles % cells
    image = (pid // tiles // cells).to(tl.int64)
    y = first_cell + cell_y
    # The cells at the ends of the crop take what is left of it.
    start = tl.maximum(first_pixel(y, h, H), top)
    stop = tl.minimum(first_pixel(y + 1, h, H), bottom)
    if cell_y == cells - 1:
        stop = bottom
    row = start + tl.program_id(1) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    column = left + tile * BLOCK_X + tl.arange(0, BLOCK_X)
    cell_x = cell_of(column, w, W)
    x0 = tl.minimum(tl.maximum(cell_x, 0), w - 1).to(tl.int64) * stride_w
    x1 = tl.minimum(tl.maximum(cell_x, 0) + 1, w - 1).to(tl.int64) * stride_w
    wx = weight_of(column, cell_x, w, W, DTYPE)
    wy = weight_of(row, y, h, H, DTYPE)
    patches = logits_ptr + image * stride_b
    upper = patches + tl.maximum(y, 0).to(tl.int64) * stride_h
    lower = patches + tl.minimum(tl.maximum(y, 0) + 1, h - 1).to(tl.int64) * stride_h
    in_row = column < right

    best = tl.full([BLOCK_Y, BLOCK_X], -float("inf"), DTYPE)
    label = tl.zeros([BLOCK_Y, BLOCK_X], tl.int32)
    count = tl.load(count_ptr + pid)
    if count == EVERY_CLASS:
        for k in range(K):
            a = load_as(upper + x0, in_row, 0.0, DTYPE)
            b = load_as(upper + x1, in_row, 0.0, DTYPE)
            c = load_as(lower + x0, in_row, 0.0, DTYPE)
            d = load_as(lower + x1, in_row, 0.0, DTYPE)
            above, below = between(a, b, wx)[None, :], between(c, d, wx)[None, :]
            value = between(above, below, wy[:, None])
            better = (value > best) | ((value != value) & (best == best))
            best = tl.where(better, value, best)
            label = tl.where(better, k, label)
            upper += stride_k
            lower += stride_k
    else:
        list_ptr += pid.to(tl.int64) * K
        for n in range(count):
            k = tl.load(list_ptr + n)
            at = k.to(tl.int64) * stride_k
            a = load_as(upper + at + x0, in_row, 0.0, DTYPE)
            b = load_as(upper + at + x1, in_row, 0.0, DTYPE)
            c = load_as(lower + at + x0, in_row, 0.0, DTYPE)
            d = load_as(lower + at + x1, in_row, 0.0, DTYPE)
            above = a + (b - a) * wx
            slope = c + (d - c) * wx - above
            value = above[None, :] + slope[None, :] * wy[:, None]
            better = value > best
            best = tl.where(better, value, best)
            label = tl.where(better, k, label)
    height, width = bottom - top, right - left
    out = labels_ptr + (image * height + row - top)[:, None] * width + (column - left)[None, :]
    mask = (row < stop)[:, None] & in_row[None, :]
    tl.store(out, label.to(labels_ptr.dtype.element_ty), mask=mask)


# As many columns as give a warp whole rows of memory, as many rows as a patch of 16 has.
_CANDIDATES = Kernel(_candidates_kernel, {"default": (Config({"BLOCK_K": 32}),)})
_LABELS = Kernel(
    _labels_kernel,
    {"default": (Config({"BLOCK_Y": 16, "BLOCK_X": 128}), Config({"BLOCK_Y": 8, "BLOCK_X": 128}))},
)


# --------------------------------------------------------------------------- operator
@torch.library.custom_op(
    "segmenter_fast::upsample_argmax_triton", mutates_args=(), device_types=("cpu", "cuda")
)
def _upsample_argmax_op(logits: Tensor, size: Sequence[int], crop: Sequence[int]) -> Tensor:
    check_device(logits)
    check_floating(logits)
    (batch, n_cls, h, w), (H, W) = logits.shape, size
    top, left, height, width = crop
    rows, columns = make_axis(h, H, top, height), make_axis(w, W, left, width)
    labels = logits.new_empty((batch, height, width), dtype=label_dtype(n_cls))
    config = _LABELS.config(logits)
    tiles = -(-width // config["BLOCK_X"])
    programs = batch * rows.cells * tiles
    candidates = logits.new_empty((programs, n_cls), dtype=torch.int32)
    counts = logits.new_empty((programs,), dtype=torch.int32)
    dtype = accumulator(logits.dtype)
    precision = torch.finfo(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    launch(
        _CANDIDATES,
        (programs,),
        _CANDIDATES.config(logits),
        *(logits, candidates, counts, *logits.stride()),
        *(n_cls, h, w, W, left, left + width, rows.first, rows.cells, tiles),
        DTYPE=dtype,
        EPS=precision.eps,
        TINY=precision.tiny,
        CELLS=power_of_2_cells(columns, config["BLOCK_X"]),
        BLOCK_X=config["BLOCK_X"],
    )
    launch(
        _LABELS,
        (programs, -(-rows.longest // config["BLOCK_Y"])),
        config,
        *(logits, candidates, counts, labels, *logits.stride()),
        *(n_cls, h, w, H, W, top, top + height, left, left + width),
        *(rows.first, rows.cells, tiles),
        DTYPE=dtype,
    )
    return labels


@_upsample_argmax_op.register_fake
def _(logits: Tensor, size: Sequence[int], crop: Sequence[int]) -> Tensor:
    shape = (logits.shape[0], crop[2], crop[3])
    return logits.new_empty(shape, dtype=label_dtype(logits.shape[1]))


# --------------------------------------------------------------------------- declaration
def _make_inputs(
    dtype: torch.dtype,
    batch: int,
    n_cls: int,
    grid: tuple[int, int],
    size: tuple[int, int],
    crop: tuple[int, int, int, int] | None = None,
    smooth: bool = False,
) -> dict[str, Any]:
    logits = torch.randn(batch, n_cls, *grid)
    if smooth:
        coarse = tuple(-(-side // 8) for side in grid)
        logits = torch.nn.functional.interpolate(
            logits[:, :, : coarse[0], : coarse[1]], grid, mode="bicubic"
        )
    return {"logits": logits.to(dtype), "size": size, "crop": crop or (0, 0, *size)}


def _work(inputs: Mapping[str, Any]) -> tuple[float, float]:
    # With pruning: per cell and class three comparisons; the logits once, the labels once.
    logits, (_, _, height, width) = inputs["logits"], inputs["crop"]
    pixels = logits.shape[0] * height * width
    return 3 * logits.numel(), logits.numel() * logits.element_size() + pixels


OPERATION = Operation(
    name="upsample_argmax_triton",
    make_inputs=_make_inputs,
    run=torch.ops.segmenter_fast.upsample_argmax_triton,
    reference=upsample_argmax_reference,
    case={"batch": 32, "n_cls": 150, "grid": (32, 32), "size": (512, 512), "smooth": True},
    checks=(
        {"batch": 2, "n_cls": 19, "grid": (7, 5), "size": (113, 67), "crop": (3, 5, 101, 53)},
        {"batch": 1, "n_cls": 300, "grid": (3, 4), "size": (31, 29)},
    ),
    toy={"batch": 1, "n_cls": 7, "grid": (2, 3), "size": (9, 14)},
    work=_work,
    verdict="labels",
    # Registered by a module that stands on this one.
    contestants={
        "CUDA C++": lambda **inputs: torch.ops.segmenter_fast.upsample_argmax_cuda(**inputs)
    },
)
