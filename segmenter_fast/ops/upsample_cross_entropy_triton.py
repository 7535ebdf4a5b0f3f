"""Cross-entropy of upsampled patch logits on a GPU, forward and backward.

With u and L of ops/_log_softmax_triton.py (base 2), t a pixel's label, w the class weights, W their
sum, s the label smoothing and K classes, the pixel's loss is, in base 2 as well,

    (1 - s) w_t (L - u_t) + s/K (W L - M)          M = sum_c w_c u_c, upsampled from the patches

u_t and M are read at four patches, so after L nothing needs the other classes. Forward keeps L,
one number per pixel. Backward, with U the pixel's upstream gradient (for "mean" over the weights'
sum)

    A = U ((1 - s) w_t + s/K W)          r = A 2^-L          b = U (1 - s) w_t
    dloss/dz_k = r 2^u_k - b [k = t] - U s/K w_k

goes cell by cell. Along a row of a cell u_k = u + d x is linear, so that sum_x r_x 2^u_k is a
polynomial in g = 2^d, and the same sum weighted by x is g times its derivative: Horner's rule takes
two multiply-adds per pixel and class. Both sums make the cell's four corners:

    sum over pixels of (1-fy)(1-fx) v, (1-fy) fx v, fy (1-fx) v, fy fx v          v = dloss/dz_k

The labels' part visits only those blocks of classes that some label of the cell falls in. Cells in
reach of a patch with u below SAFE, of a NaN or of an infinity take a power per pixel instead.
ops/_cell_gradient_triton.py adds the corners up. Nothing has the size of z.

A label outside [0, K) that is not ignore_index makes the loss and the gradients it reaches NaN.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from segmenter_fast.ops._cell_gradient_triton import empty_corners, gather_corners
from segmenter_fast.ops._log_softmax_triton import SAFE, log2_softmax, log_sum_exp
from segmenter_fast.ops._triton import (
    Config,
    Kernel,
    Operation,
    accumulator,
    check_device,
    launch,
    load_as,
    next_power_of_2,
    tl,
    triton,
)
from segmenter_fast.ops._upsampling_triton import (
    cell_of,
    check_floating,
    first_pixel,
    make_axis,
    weight_of,
)
from segmenter_fast.ops.upsample import upcast
from segmenter_fast.ops.upsample_cross_entropy import upsample_cross_entropy_reference


# --------------------------------------------------------------------------- kernels
@triton.jit
def _loss_kernel(
    u_ptr,  # (B, h, w, K)
    mean_ptr,  # (B, h, w) M of the patches, if SMOOTH
    lse_ptr,  # (B, height, width)
    target_ptr,  # (B, height, width), contiguous
    weight_ptr,  # (K,), if WEIGHTED
    losses_ptr,  # (B, height, width) in nats, if PER_PIXEL
    sums_ptr,  # (2, programs) sums of losses in bits and of weights, unless PER_PIXEL
    smoothing_ptr,  # (2,) s and s/K W
    pixels,
    K,
    h,
    w,
    H,
    W,
    top,
    left,
    height,
    width,
    ignore_index,
    DTYPE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SMOOTH: tl.constexpr,
    PER_PIXEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    image = pixel // width // height
    row = (pixel // width % height).to(tl.int32) + top
    column = (pixel % width).to(tl.int32) + left
    y, x = cell_of(row, h, H), cell_of(column, w, W)
    wy, wx = weight_of(row, y, h, H, DTYPE), weight_of(column, x, w, W, DTYPE)
    y0, x0 = tl.maximum(y, 0), tl.maximum(x, 0)
    y0, x0 = tl.minimum(y0, h - 1), tl.minimum(x0, w - 1)
    y1, x1 = tl.minimum(y0 + 1, h - 1), tl.minimum(x0 + 1, w - 1)
    upper, lower = (image * h + y0) * w, (image * h + y1) * w

    label = tl.load(target_ptr + pixel, mask=inside, other=0).to(tl.int64)
    valid = inside & (label != ignore_index)
    wrong = valid & ((label < 0) | (label >= K))
    known = valid & (label >= 0) & (label < K)
    weight = tl.full([BLOCK], 1.0, DTYPE)
    if WEIGHTED:
        weight = load_as(weight_ptr + label, known, 0.0, DTYPE)
    a = load_as(u_ptr + (upper + x0) * K + label, known, 0.0, DTYPE)
    b = load_as(u_ptr + (upper + x1) * K + label, known, 0.0, DTYPE)
    c = load_as(u_ptr + (lower + x0) * K + label, known, 0.0, DTYPE)
    d = load_as(u_ptr + (lower + x1) * K + label, known, 0.0, DTYPE)
    picked = (a * (1.0 - wx) + b * wx) * (1.0 - wy) + (c * (1.0 - wx) + d * wx) * wy
    lse = load_as(lse_ptr + pixel, valid, 0.0, DTYPE)
    if SMOOTH:
        a = load_as(mean_ptr + upper + x0, known, 0.0, DTYPE)
        b = load_as(mean_ptr + upper + x1, known, 0.0, DTYPE)
        c = load_as(mean_ptr + lower + x0, known, 0.0, DTYPE)
        d = load_as(mean_ptr + lower + x1, known, 0.0, DTYPE)
        mean = (a * (1.0 - wx) + b * wx) * (1.0 - wy) + (c * (1.0 - wx) + d * wx) * wy
        smoothing = load_as(smoothing_ptr, True, 0.0, DTYPE)
        uniform = load_as(smoothing_ptr + 1, True, 0.0, DTYPE)
        loss = (1.0 - smoothing) * weight * (lse - picked) + uniform * lse - smoothing * mean
    else:
        loss = weight * (lse - picked)
    loss = tl.where(valid, loss, 0.0)
    loss = tl.where(wrong, float("nan"), loss)
    if PER_PIXEL:
        nats = tl.full([BLOCK], 0.6931471805599453, DTYPE)
        tl.store(losses_ptr + pixel, loss * nats, mask=inside)
    else:
        tl.store(sums_ptr + tl.program_id(0), tl.sum(loss, 0))
        weights = tl.sum(tl.where(known, weight, 0.0), 0)
        tl.store(sums_ptr + tl.num_programs(0) + tl.program_id(0), weights)


@triton.jit
def upstream_of(
    upstream_ptr, smoothing_ptr, weight_ptr, pixel, label, mask, K,
    DTYPE: tl.constexpr, WEIGHTED: tl.constexpr, SMOOTH: tl.constexpr, PER_PIXEL: tl.constexpr,
):  # fmt: skip
    """(U, A, b) of pixels, 0 where `mask` is not set, NaN where the label is none."""
    known = mask & (label >= 0) & (label < K)
    if PER_PIXEL:
        upstream = load_as(upstream_ptr + pixel, mask, 0.0, DTYPE)
    else:
        upstream = tl.where(mask, load_as(upstream_ptr, True, 0.0, DTYPE), 0.0)
    upstream = tl.where(mask & (known == 0), float("nan"), upstream)
    b = upstream
    if WEIGHTED:
        b *= load_as(weight_ptr + label, known, 1.0, DTYPE)
    a = b
    if SMOOTH:
        b *= 1.0 - load_as(smoothing_ptr, True, 0.0, DTYPE)
        a = b + upstream * load_as(smoothing_ptr + 1, True, 0.0, DTYPE)
    return upstream, a, b


@triton.jit
def _ratio_kernel(
    lse_ptr,  # (B, height, width)
    target_ptr,  # (B, height, width)
    weight_ptr,  # (K,)
    upstream_ptr,  # (1,), or (B, height, width) if PER_PIXEL
    smoothing_ptr,  # (2,)
    ratio_ptr,  # (B, height, width) r = A 2^-L
    pixels,
    K,
    ignore_index,
    DTYPE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SMOOTH: tl.constexpr,
    PER_PIXEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < pixels
    label = tl.load(target_ptr + pixel, mask=inside, other=0).to(tl.int64)
    valid = inside & (label != ignore_index)
    _, a, _ = upstream_of(
        upstream_ptr, smoothing_ptr, weight_ptr, pixel, label, valid, K,
        DTYPE, WEIGHTED, SMOOTH, PER_PIXEL,
    )  # fmt: skip
    lse = load_as(lse_ptr + pixel, valid, 0.0, DTYPE)
    # Where A is 0 r is 0, whatever L is: such a pixel asks for nothing.
    tl.store(ratio_ptr + pixel, tl.where(a == 0.0, 0.0, a * tl.exp2(-lse)), mask=inside)


@triton.jit
def _corners_kernel(
    u_ptr,  # (B, h, w, K)
    lowest_ptr,  # (B, h, w)
    lse_ptr,  # (B, height, width)
    ratio_ptr,  # (B, height, width)
    target_ptr,  # (B, height, width)
    weight_ptr,  # (K,)
    upstream_ptr,  # (1,), or (B, height, width) if PER_PIXEL
    smoothing_ptr,  # (2,)
    corners_ptr,  # (B, cells_y, cells_x, 4, K)
    K,
    h,
    w,
    H,
    W,
    top,
    bottom,
    left,
    right,
    first_y,
    cells_y,
    first_x,
    cells_x,
    tiles,
    chunks,
    ignore_index,
    DTYPE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SMOOTH: tl.constexpr,
    PER_PIXEL: tl.constexpr,
    PIXELS: tl.constexpr,
    CELLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0)
    tile = pid % tiles
    cell_y = pid // tiles % cells_y
    image = (pid // tiles // cells_y).to(tl.int64)
    width = right - left
    # The cell's rows, and per cell of the tile its columns, patches and weights.
    y = first_y + cell_y
    row = tl.maximum(first_pixel(y, h, H), top)
    row_stop = tl.where(cell_y == cells_y - 1, bottom, tl.minimum(first_pixel(y + 1, h, H), bottom))
    cell_x = tile * CELLS + tl.arange(0, CELLS)
    here = cell_x < cells_x
    x = first_x + tl.minimum(cell_x, cells_x - 1)
    start = tl.maximum(first_pixel(x, w, W), left)
    stop = tl.where(x == first_x + cells_x - 1, right, tl.minimum(first_pixel(x + 1, w, W), right))
    stop = tl.where(here, stop, start)
    y0, x0 = tl.minimum(tl.maximum(y, 0), h - 1), tl.minimum(tl.maximum(x, 0), w - 1)
    y1, x1 = tl.minimum(y0 + 1, h - 1), tl.minimum(x0 + 1, w - 1)
    upper, lower = (image * h + y0) * w, (image * h + y1) * w
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    k_mask = here[:, None] & (k < K)[None, :]
    a = load_as(u_ptr + ((upper + x0) * K)[:, None] + k[None, :], k_mask, 0.0, DTYPE)
    b = load_as(u_ptr + ((upper + x1) * K)[:, None] + k[None, :], k_mask, 0.0, DTYPE)
    c = load_as(u_ptr + ((lower + x0) * K)[:, None] + k[None, :], k_mask, 0.0, DTYPE)
    d = load_as(u_ptr + ((lower + x1) * K)[:, None] + k[None, :], k_mask, 0.0, DTYPE)
    lowest = tl.minimum(
        tl.minimum(
            load_as(lowest_ptr + upper + x0, here, 0.0, DTYPE),
            load_as(lowest_ptr + upper + x1, here, 0.0, DTYPE),
        ),
        tl.minimum(
            load_as(lowest_ptr + lower + x0, here, 0.0, DTYPE),
            load_as(lowest_ptr + lower + x1, here, 0.0, DTYPE),
        ),
    )
    # fx of column `start` and its step; in cell -1 both are 0, and so is the slope.
    fx0 = weight_of(start, x, w, W, DTYPE)[:, None]
    fx_step = (tl.where(x < 0, 0, w).to(DTYPE) / W)[:, None]
    fy0 = weight_of(row, y, h, H, DTYPE)
    fy_step = tl.where(y < 0, 0, h).to(DTYPE) / H

    # Sums over the cell's pixels of v, fy v, fx v and fy fx v.
    s_1 = tl.zeros([CELLS, BLOCK_K], DTYPE)
    s_y = tl.zeros([CELLS, BLOCK_K], DTYPE)
    s_x = tl.zeros([CELLS, BLOCK_K], DTYPE)
    s_yx = tl.zeros([CELLS, BLOCK_K], DTYPE)
    lanes = tl.arange(0, PIXELS)[None, :]
    k_first = tl.program_id(1) * BLOCK_K
    hits = tl.zeros([CELLS, PIXELS], tl.int32)
    safe = tl.min(lowest, 0) > SAFE
    for i in range(row_stop - row):
        fy = fy0 + fy_step * i
        at_row = (image * (bottom - top) + row + i - top) * width - left
        above = a + (c - a) * fy
        slope = b + (d - b) * fy - above
        if safe:
            at_start = above + slope * fx0
            per_pixel = slope * fx_step
            g = tl.exp2(per_pixel)
            for chunk in range(chunks):
                first = start + chunk * PIXELS
                polynomial = tl.zeros([CELLS, BLOCK_K], DTYPE)
                derivative = tl.zeros([CELLS, BLOCK_K], DTYPE)
                for n in tl.static_range(PIXELS):
                    at = first + (PIXELS - 1 - n)
                    r = load_as(ratio_ptr + at_row + at, at < stop, 0.0, DTYPE)
                    derivative = derivative * g + polynomial
                    polynomial = polynomial * g + r[:, None]
                e = tl.exp2(at_start + per_pixel * (chunk * PIXELS))
                e = tl.where((first < stop)[:, None], e, 0.0)
                v = polynomial * e
                fx = fx0 + fx_step * (chunk * PIXELS)
                v_x = v * fx + (derivative * g) * (e * fx_step)
                s_1 += v
                s_y += v * fy
                s_x += v_x
                s_yx += v_x * fy
        else:
            for chunk in range(chunks):
                for n in range(PIXELS):
                    at = start + chunk * PIXELS + n
                    mask = at < stop
                    label = tl.load(target_ptr + at_row + at, mask=mask, other=0).to(tl.int64)
                    _, share, _ = upstream_of(
                        upstream_ptr, smoothing_ptr, weight_ptr, at_row + at, label,
                        mask & (label != ignore_index), K, DTYPE, WEIGHTED, SMOOTH, PER_PIXEL,
                    )  # fmt: skip
                    lse = load_as(lse_ptr + at_row + at, mask, 0.0, DTYPE)
                    fx = fx0 + fx_step * (chunk * PIXELS + n)
                    over, under = a * (1.0 - fx) + b * fx, c * (1.0 - fx) + d * fx
                    u = over * (1.0 - fy) + under * fy
                    v = tl.where(mask[:, None], share[:, None] * tl.exp2(u - lse[:, None]), 0.0)
                    s_1 += v
                    s_y += v * fy
                    s_x += v * fx
                    s_yx += v * fx * fy
        for chunk in range(chunks):
            at = (start + chunk * PIXELS)[:, None] + lanes
            label = tl.load(target_ptr + at_row + at, mask=at < stop[:, None], other=-1).to(
                tl.int64
            )
            hits |= ((label >= k_first) & (label < k_first + BLOCK_K)).to(tl.int32)
    # What the labels take away.
    if tl.max(tl.max(hits, 1), 0) > 0:
        for i in range(row_stop - row):
            fy = fy0 + fy_step * i
            at_row = (image * (bottom - top) + row + i - top) * width - left
            v = tl.zeros([CELLS, BLOCK_K], DTYPE)
            v_x = tl.zeros([CELLS, BLOCK_K], DTYPE)
            for chunk in range(chunks):
                for n in range(PIXELS):
                    at = start + chunk * PIXELS + n
                    mask = at < stop
                    label = tl.load(target_ptr + at_row + at, mask=mask, other=0).to(tl.int64)
                    _, _, share = upstream_of(
                        upstream_ptr, smoothing_ptr, weight_ptr, at_row + at, label,
                        mask & (label != ignore_index), K, DTYPE, WEIGHTED, SMOOTH, PER_PIXEL,
                    )  # fmt: skip
                    taken = tl.where(label[:, None] == k[None, :], share[:, None], 0.0)
                    v += taken
                    v_x += taken * (fx0 + fx_step * (chunk * PIXELS + n))
            s_1 -= v
            s_y -= v * fy
            s_x -= v_x
            s_yx -= v_x * fy
    if SMOOTH:
        # U s/K w_k: the same four sums of U, once for all classes.
        u_1 = tl.zeros([CELLS], DTYPE)
        u_y = tl.zeros([CELLS], DTYPE)
        u_x = tl.zeros([CELLS], DTYPE)
        u_yx = tl.zeros([CELLS], DTYPE)
        for i in range(row_stop - row):
            fy = fy0 + fy_step * i
            at_row = (image * (bottom - top) + row + i - top) * width - left
            for chunk in range(chunks):
                at = (start + chunk * PIXELS)[:, None] + lanes
                mask = at < stop[:, None]
                label = tl.load(target_ptr + at_row + at, mask=mask, other=0).to(tl.int64)
                upstream, _, _ = upstream_of(
                    upstream_ptr, smoothing_ptr, weight_ptr, at_row + at, label,
                    mask & (label != ignore_index), K, DTYPE, WEIGHTED, SMOOTH, PER_PIXEL,
                )  # fmt: skip
                fx = fx0 + fx_step * (chunk * PIXELS + lanes)
                u_1 += tl.sum(upstream, 1)
                u_y += tl.sum(upstream, 1) * fy
                u_x += tl.sum(upstream * fx, 1)
                u_yx += tl.sum(upstream * fx, 1) * fy
        share = tl.zeros([BLOCK_K], DTYPE) + load_as(smoothing_ptr, True, 0.0, DTYPE) / K
        if WEIGHTED:
            share *= load_as(weight_ptr + k, k < K, 0.0, DTYPE)
        s_1 -= u_1[:, None] * share[None, :]
        s_y -= u_y[:, None] * share[None, :]
        s_x -= u_x[:, None] * share[None, :]
        s_yx -= u_yx[:, None] * share[None, :]
    cell = (image * cells_y + cell_y) * cells_x + cell_x
    out = corners_ptr + (cell * 4 * K)[:, None] + k[None, :]
    tl.store(out, s_1 - s_y - s_x + s_yx, mask=k_mask)
    tl.store(out + K, s_x - s_yx, mask=k_mask)
    tl.store(out + 2 * K, s_y - s_yx, mask=k_mask)
    tl.store(out + 3 * K, s_yx, mask=k_mask)


_LOSS = Kernel(_loss_kernel, {"default": (Config({"BLOCK": 512}),)})
_RATIO = Kernel(_ratio_kernel, {"default": (Config({"BLOCK": 1024}),)})
_CORNERS = Kernel(
    _corners_kernel,
    {"default": (Config({"CELLS": 4, "BLOCK_K": 32}), Config({"CELLS": 4, "BLOCK_K": 64}))},
)


# --------------------------------------------------------------------------- launches
class _Problem:
    """What every launch needs of one call, prepared once.

    Args:
        logits: (B, K, h, w).
        target: (B, height, width).
        weight: (K,) or None.
        size, crop, label_smoothing, ignore_index: as for `upsample_cross_entropy`.
    """

    def __init__(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        size: Sequence[int],
        crop: Sequence[int],
        label_smoothing: float,
        ignore_index: int,
    ):
        check_device(logits)
        check_floating(logits)
        self.size, self.crop, self.ignore_index = size, crop, ignore_index
        self.batch, self.n_cls, h, w = logits.shape
        self.rows = make_axis(h, size[0], crop[0], crop[2])
        self.columns = make_axis(w, size[1], crop[1], crop[3])
        self.u, self.lowest = log2_softmax(logits)
        self.target = target.contiguous()
        self.weight = None if weight is None else weight.to(self.u.dtype).contiguous()
        self.smoothing = None
        if label_smoothing:
            # A fill, since a copy from the host would wait for the GPU.
            self.smoothing = self.u.new_full((2,), label_smoothing)
            if self.weight is not None:
                self.smoothing[1] *= self.weight.mean()

    @property
    def options(self) -> dict[str, Any]:
        """Constexpr arguments that the kernels share."""
        return {
            "DTYPE": accumulator(self.u.dtype),
            "WEIGHTED": self.weight is not None,
            "SMOOTH": self.smoothing is not None,
        }

    def or_any(self, tensor: Tensor | None) -> Tensor:
        """A kernel's argument that it will not read if it is None."""
        return self.u if tensor is None else tensor

    def loss(self, lse: Tensor, per_pixel: bool) -> tuple[Tensor, Tensor]:
        """The losses (B, height, width), or their sum and that of the weights."""
        pixels = lse.numel()
        config = _LOSS.config(lse)
        programs = -(-pixels // config["BLOCK"])
        out = torch.empty_like(lse) if per_pixel else lse.new_empty((2, programs))
        mean = None
        if self.smoothing is not None:
            mean = (self.u if self.weight is None else self.u * self.weight).mean(-1)
        (h, w), (top, left, height, width) = self.u.shape[1:3], self.crop
        launch(
            _LOSS,
            (programs,),
            config,
            *(self.u, self.or_any(mean), lse, self.target, self.or_any(self.weight), out, out),
            *(self.or_any(self.smoothing), pixels, self.n_cls, h, w, *self.size),
            *(top, left, height, width, self.ignore_index),
            **self.options,
            PER_PIXEL=per_pixel,
        )
        if per_pixel:
            return out, lse.new_empty(0)
        bits, weights = out.double().sum(1)
        return (bits * math.log(2)).to(lse.dtype), weights.to(lse.dtype)

    def gradient(self, lse: Tensor, upstream: Tensor, per_pixel: bool, gradient: Tensor) -> None:
        """Write the gradient of the logits for an upstream gradient (1,) or of every pixel."""
        ratio = torch.empty_like(lse)
        config = _RATIO.config(lse)
        pixels = lse.numel()
        options = {**self.options, "PER_PIXEL": per_pixel}
        weight, smoothing = self.or_any(self.weight), self.or_any(self.smoothing)
        launch(
            _RATIO,
            (-(-pixels // config["BLOCK"]),),
            config,
            *(lse, self.target, weight, upstream, smoothing, ratio),
            *(pixels, self.n_cls, self.ignore_index),
            **options,
        )
        rows, columns = self.rows, self.columns
        corners = empty_corners(self.u, self.batch, rows, columns, self.n_cls)
        config = _CORNERS.config(lse)
        block = min(16, next_power_of_2(columns.longest))
        tiles = -(-columns.cells // config["CELLS"])
        launch(
            _CORNERS,
            (self.batch * rows.cells * tiles, -(-self.n_cls // config["BLOCK_K"])),
            config,
            *(self.u, self.lowest, lse, ratio, self.target, weight, upstream, smoothing, corners),
            *(self.n_cls, *self.u.shape[1:3], *self.size, rows.start, rows.stop),
            *(columns.start, columns.stop, rows.first, rows.cells, columns.first, columns.cells),
            *(tiles, -(-columns.longest // block), self.ignore_index),
            **options,
            PIXELS=block,
        )
        gather_corners(corners, rows, columns, gradient)


# --------------------------------------------------------------------------- forward
@torch.library.custom_op(
    "segmenter_fast::upsample_cross_entropy_triton",
    mutates_args=(),
    device_types=("cpu", "cuda"),
)
def _upsample_cross_entropy_op(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    size: Sequence[int],
    crop: Sequence[int],
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, L of each pixel, and the sum of the weights for "mean" (else empty)."""
    problem = _Problem(logits, target, weight, size, crop, label_smoothing, ignore_index)
    lse = log_sum_exp(problem.u, problem.lowest, size, crop)
    loss, weights = problem.loss(lse, per_pixel=reduction == "none")
    if reduction == "mean":
        return loss / weights, lse, weights
    return loss, lse, lse.new_empty(0)


@_upsample_cross_entropy_op.register_fake
def _(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    size: Sequence[int],
    crop: Sequence[int],
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    like = upcast(logits)
    shape = (logits.shape[0], *crop[2:])
    return (
        like.new_empty(shape if reduction == "none" else ()),
        like.new_empty(shape),
        like.new_empty(() if reduction == "mean" else (0,)),
    )


# --------------------------------------------------------------------------- backward
@torch.library.custom_op(
    "segmenter_fast::upsample_cross_entropy_triton_backward",
    mutates_args=(),
    device_types=("cpu", "cuda"),
)
def _upsample_cross_entropy_backward_op(
    grad_loss: Tensor,
    lse: Tensor,
    weights: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    size: Sequence[int],
    crop: Sequence[int],
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    problem = _Problem(logits, target, weight, size, crop, label_smoothing, ignore_index)
    gradient = torch.empty_like(logits)
    upstream = grad_loss / weights if reduction == "mean" else grad_loss
    problem.gradient(lse, upstream.contiguous(), reduction == "none", gradient)
    return gradient


@_upsample_cross_entropy_backward_op.register_fake
def _(grad_loss: Tensor, lse: Tensor, weights: Tensor, logits: Tensor, *options) -> Tensor:
    return torch.empty_like(logits)


def _no_second_derivative(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError(
        "upsample_cross_entropy cannot be differentiated twice; use backend='reference' for that"
    )


_upsample_cross_entropy_backward_op.register_autograd(_no_second_derivative)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, target, weight, *ctx.options = inputs
    _, lse, weights = output
    ctx.mark_non_differentiable(lse, weights)
    ctx.save_for_backward(lse, weights, logits, target, weight)


def _backward(ctx: Any, grad_loss: Tensor, *unused: Tensor | None) -> tuple:
    gradient = torch.ops.segmenter_fast.upsample_cross_entropy_triton_backward(
        grad_loss, *ctx.saved_tensors, *ctx.options
    )
    return gradient, *[None] * 7


_upsample_cross_entropy_op.register_autograd(_backward, setup_context=_setup_context)
_upsample_cross_entropy_op.register_autocast("cuda", torch.float32)
_upsample_cross_entropy_op.register_autocast("cpu", torch.float32)


# --------------------------------------------------------------------------- declaration
def _make_inputs(
    dtype: torch.dtype,
    batch: int,
    n_cls: int,
    grid: tuple[int, int],
    size: tuple[int, int],
    crop: tuple[int, int, int, int] | None = None,
    weighted: bool = False,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> dict[str, Any]:
    crop = crop or (0, 0, *size)
    # Regions of one label, as in pictures, and void between them.
    coarse = torch.randint(0, n_cls, (batch, -(-crop[2] // 24), -(-crop[3] // 24)))
    target = coarse.repeat_interleave(24, 1).repeat_interleave(24, 2)[:, : crop[2], : crop[3]]
    target = target.masked_fill(torch.rand(target.shape) < 0.1, 255).to(torch.int16)
    return {
        "logits": torch.randn(batch, n_cls, *grid).to(dtype),
        "target": target.contiguous(),
        "weight": torch.rand(n_cls).add_(0.5) if weighted else None,
        "size": size,
        "crop": crop,
        "label_smoothing": label_smoothing,
        "ignore_index": 255,
        "reduction": reduction,
    }


def _run(**inputs: Any) -> Tensor:
    return torch.ops.segmenter_fast.upsample_cross_entropy_triton(*inputs.values())[0]


def _bytes(inputs: Mapping[str, Any]) -> int:
    logits, target = inputs["logits"], inputs["target"]
    return logits.numel() * logits.element_size() + target.numel() * target.element_size()


def _work(inputs: Mapping[str, Any]) -> tuple[float, float]:
    # A multiplication and an addition per pixel and class; logits and labels read once.
    n_cls, pixels = inputs["logits"].shape[1], inputs["target"].numel()
    return 2 * pixels * n_cls, _bytes(inputs)


def _backward_work(inputs: Mapping[str, Any]) -> tuple[float, float]:
    # Two multiply-adds per pixel and class; L, labels and logits read, the gradient written.
    logits, pixels = inputs["logits"], inputs["target"].numel()
    grid = logits.numel() * logits.element_size()
    return 4 * pixels * logits.shape[1], _bytes(inputs) + 4 * pixels + grid


OPERATION = Operation(
    name="upsample_cross_entropy_triton",
    make_inputs=_make_inputs,
    run=_run,
    reference=upsample_cross_entropy_reference,
    case={"batch": 32, "n_cls": 150, "grid": (32, 32), "size": (512, 512)},
    checks=(
        {"batch": 2, "n_cls": 19, "grid": (7, 5), "size": (113, 67), "crop": (3, 5, 101, 53)},
        {
            **{"batch": 1, "n_cls": 37, "grid": (3, 4), "size": (31, 29), "weighted": True},
            **{"label_smoothing": 0.1, "reduction": "none"},
        },
    ),
    work=_work,
    backward_work=_backward_work,
)
