"""Triton kernels of the cross-entropy of upsampled patch logits; used by one file alone.

Notation and mathematics: ops/upsample_cross_entropy_triton.py. Its three kernels:

    loss      a program per block of pixels: L and four patches -> loss, or its sum over the block
    ratio     a program per block of pixels: r = A 2^-L, so that the next one takes no power for it
    corners   a program per few cells of a row and block of classes: what they add to their corners
"""

from segmenter_fast.ops._log_softmax_triton import SAFE
from segmenter_fast.ops._triton import Config, Kernel, load_as, tl, triton
from segmenter_fast.ops._upsampling_triton import between, cell_of, first_pixel, weight_of


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
    picked = between(between(a, b, wx), between(c, d, wx), wy)
    lse = load_as(lse_ptr + pixel, valid, 0.0, DTYPE)
    if SMOOTH:
        a = load_as(mean_ptr + upper + x0, known, 0.0, DTYPE)
        b = load_as(mean_ptr + upper + x1, known, 0.0, DTYPE)
        c = load_as(mean_ptr + lower + x0, known, 0.0, DTYPE)
        d = load_as(mean_ptr + lower + x1, known, 0.0, DTYPE)
        mean = between(between(a, b, wx), between(c, d, wx), wy)
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
                    # u to the bit as where L was summed: it may be huge, and u - L small.
                    fx = weight_of(at, x, w, W, DTYPE)[:, None]
                    u = between(
                        between(a, b, fx), between(c, d, fx), weight_of(row + i, y, h, H, DTYPE)
                    )
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


LOSS = Kernel(_loss_kernel, {"default": (Config({"BLOCK": 512}),)})
RATIO = Kernel(_ratio_kernel, {"default": (Config({"BLOCK": 1024}),)})
_NARROW, _WIDE = Config({"CELLS": 4, "BLOCK_K": 32}), Config({"CELLS": 4, "BLOCK_K": 64})
# On sm_86 and sm_89 the wide one spills registers.
CORNERS = Kernel(_corners_kernel, {"default": (_NARROW, _WIDE), 86: (_NARROW,), 89: (_NARROW,)})
