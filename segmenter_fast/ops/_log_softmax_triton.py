"""Normalised patch logits and the log-sum-exp of each pixel, in Triton and base 2.

    u_k(i, j) = log2 softmax_k l(i, j)            patches
    L(Y, X)   = log2 sum_k 2^(u_k(Y, X))          pixels, u upsampled as in ops/upsample.py

A pixel's logits may be shifted by any number without changing its softmax, and upsampling patches
that are shifted by c(i, j) shifts the pixels by the upsampled c. So reading u in place of l changes
no probability. And it helps: log-sum-exp is convex, the patches' is 0, so L <= 0 everywhere between
them. No power overflows, and no running maximum is needed.

Along a column of pixels in a cell u_k is linear, so its powers are a geometric progression:

    2^(u + s y) = 2^(u + s j) (2^(4 s))^q         row y = 4 q + j

Of 16 rows four take a power of their own, the others one multiplication by g^q, g = 2^(4 s). That
needs 2^u to be a number that float32 can hold: SAFE says how small u may be. Where a patch has a
smaller one, or a NaN or an infinity, the program takes its time: largest u first, then the sum.
The choice is made in the kernel, from the smallest u of the patches in reach.

What is lost: between patches that differ by S bits u and L are as large as S, and both are rounded
to their size, so that 2^(u - L) has a relative error of some S eps. PyTorch's logits have that too,
but its probabilities still add up to 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from segmenter_fast.ops._triton import (
    Config,
    Kernel,
    accumulator,
    launch,
    load_as,
    next_power_of_2,
    tl,
    triton,
)
from segmenter_fast.ops._upsampling_triton import (
    between,
    cell_of,
    first_pixel,
    make_axis,
    weight_of,
)

SAFE = tl.constexpr(-100.0)
"""Powers of two down to here, and their reciprocals, are far from the ends of float32's range."""


# --------------------------------------------------------------------------- kernels
@triton.jit
def _normalise_kernel(
    logits_ptr,  # (B, K, h, w)
    u_ptr,  # (B, h, w, K), contiguous
    lowest_ptr,  # (B, h, w) smallest u of the patch; -inf if one is NaN
    stride_b,
    stride_k,
    stride_h,
    stride_w,
    patches,
    K,
    h,
    w,
    DTYPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    patch = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = patch < patches
    at = patch // w // h * stride_b + patch // w % h * stride_h + patch % w * stride_w
    lanes = tl.arange(0, BLOCK_K)[None, :]
    log2_e = tl.full([1, 1], 1.4426950408889634, DTYPE)

    largest = tl.full([BLOCK_P], -float("inf"), DTYPE)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + lanes
        mask = inside[:, None] & (k < K)
        x = load_as(
            logits_ptr + at[:, None] + k.to(tl.int64) * stride_k, mask, -float("inf"), DTYPE
        )
        largest = tl.maximum(largest, tl.max(x * log2_e, 1))
    total = tl.zeros([BLOCK_P], DTYPE)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + lanes
        mask = inside[:, None] & (k < K)
        x = load_as(
            logits_ptr + at[:, None] + k.to(tl.int64) * stride_k, mask, -float("inf"), DTYPE
        )
        power = tl.exp2(x * log2_e - largest[:, None])
        total += tl.sum(tl.where(mask, power, 0.0), 1)
    shift = largest + tl.log2(total)
    lowest = tl.full([BLOCK_P], float("inf"), DTYPE)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + lanes
        mask = inside[:, None] & (k < K)
        x_ptr = logits_ptr + at[:, None] + k.to(tl.int64) * stride_k
        x = load_as(x_ptr, mask, 0.0, DTYPE)
        u = x * log2_e - shift[:, None]
        tl.store(u_ptr + patch[:, None] * K + k, u, mask=mask)
        number = tl.where(u == u, u, -float("inf"))
        lowest = tl.minimum(lowest, tl.min(tl.where(mask, number, float("inf")), 1))
    tl.store(lowest_ptr + patch, lowest, mask=inside)


@triton.jit
def powers(g, GROUPS: tl.constexpr):
    """(GROUPS, X) of 1, g, g^2, g^3 for g (X,); the choices are made when this is compiled."""
    q = tl.arange(0, GROUPS)[:, None]
    g = g[None, :]
    square = g * g
    return tl.where(q == 0, 1.0, tl.where(q == 1, g, tl.where(q == 2, square, square * g)))


@triton.jit
def _log_sum_exp_kernel(
    u_ptr,  # (B, h, w, K)
    lowest_ptr,  # (B, h, w)
    lse_ptr,  # (B, height, width)
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
    GROUPS: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    pid = tl.program_id(0)
    tile = pid % tiles
    cell_y = pid // tiles % cells
    image = (pid // tiles // cells).to(tl.int64)
    y = first_cell + cell_y
    start = tl.maximum(first_pixel(y, h, H), top) + tl.program_id(1) * (4 * GROUPS)
    stop = tl.where(cell_y == cells - 1, bottom, tl.minimum(first_pixel(y + 1, h, H), bottom))
    q = tl.arange(0, GROUPS)[:, None, None]
    j = tl.arange(0, 4)[None, :, None]
    row = start + 4 * q + j
    column = left + tile * BLOCK_X + tl.arange(0, BLOCK_X)
    inside = column < right
    cell_x = cell_of(column, w, W)
    x0 = tl.minimum(tl.maximum(cell_x, 0), w - 1).to(tl.int64)
    x1 = tl.minimum(tl.maximum(cell_x, 0) + 1, w - 1).to(tl.int64)
    wx = weight_of(column, cell_x, w, W, DTYPE)
    upper = (image * h + tl.maximum(y, 0)) * w
    lower = (image * h + tl.minimum(tl.maximum(y, 0) + 1, h - 1)) * w
    lowest = tl.minimum(
        tl.minimum(
            load_as(lowest_ptr + upper + x0, inside, 0.0, DTYPE),
            load_as(lowest_ptr + upper + x1, inside, 0.0, DTYPE),
        ),
        tl.minimum(
            load_as(lowest_ptr + lower + x0, inside, 0.0, DTYPE),
            load_as(lowest_ptr + lower + x1, inside, 0.0, DTYPE),
        ),
    )
    a_ptr = u_ptr + (upper + x0) * K
    b_ptr = u_ptr + (upper + x1) * K
    c_ptr = u_ptr + (lower + x0) * K
    d_ptr = u_ptr + (lower + x1) * K
    total = tl.zeros([GROUPS, 4, BLOCK_X], DTYPE)
    if tl.min(lowest, 0) > SAFE:
        # The weight of row 4 q + j is w0 + (4 q + j) step; in cell -1 both are 0.
        w0 = weight_of(start, y, h, H, DTYPE)
        step = tl.where(y < 0, 0, h).to(DTYPE) / H
        four = tl.arange(0, 4)[:, None].to(DTYPE)
        for k in range(K):
            a = load_as(a_ptr + k, inside, 0.0, DTYPE)
            b = load_as(b_ptr + k, inside, 0.0, DTYPE)
            c = load_as(c_ptr + k, inside, 0.0, DTYPE)
            d = load_as(d_ptr + k, inside, 0.0, DTYPE)
            above = a + (b - a) * wx
            slope = c + (d - c) * wx - above
            s = slope * step
            e = tl.exp2((above + slope * w0)[None, :] + s[None, :] * four)
            total += e[None, :, :] * powers(tl.exp2(4.0 * s), GROUPS)[:, None, :]
        lse = tl.log2(total)
    else:
        wy = weight_of(row, y, h, H, DTYPE)
        largest = tl.full([GROUPS, 4, BLOCK_X], -float("inf"), DTYPE)
        for k in range(K):
            a = load_as(a_ptr + k, inside, 0.0, DTYPE)
            b = load_as(b_ptr + k, inside, 0.0, DTYPE)
            c = load_as(c_ptr + k, inside, 0.0, DTYPE)
            d = load_as(d_ptr + k, inside, 0.0, DTYPE)
            above, below = between(a, b, wx)[None, None, :], between(c, d, wx)[None, None, :]
            largest = tl.maximum(largest, between(above, below, wy))
        for k in range(K):
            a = load_as(a_ptr + k, inside, 0.0, DTYPE)
            b = load_as(b_ptr + k, inside, 0.0, DTYPE)
            c = load_as(c_ptr + k, inside, 0.0, DTYPE)
            d = load_as(d_ptr + k, inside, 0.0, DTYPE)
            above, below = between(a, b, wx)[None, None, :], between(c, d, wx)[None, None, :]
            total += tl.exp2(between(above, below, wy) - largest)
        lse = largest + tl.log2(total)
    width = right - left
    out = (image * (bottom - top) + row - top) * width + (column - left)[None, None, :]
    tl.store(lse_ptr + out, lse, mask=(row < stop) & inside[None, None, :])


_NORMALISE = Kernel(_normalise_kernel, {"default": (Config({"BLOCK_P": 16, "BLOCK_K": 32}),)})
_LOG_SUM_EXP = Kernel(
    _log_sum_exp_kernel, {"default": (Config({"BLOCK_X": 128}), Config({"BLOCK_X": 64}, 2))}
)


# --------------------------------------------------------------------------- launches
def log2_softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Patch logits less their log-sum-exp, in base 2: u_k = log2 softmax_k l.

    Args:
        logits: (B, K, h, w) floating point, any strides.

    Returns:
        u: (B, h, w, K) float32, or float64 for float64 logits, contiguous.
        lowest: (B, h, w) smallest u of each patch, -inf where one is NaN.
    """
    batch, n_cls, h, w = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    u = torch.empty((batch, h, w, n_cls), dtype=dtype, device=logits.device)
    lowest = torch.empty((batch, h, w), dtype=dtype, device=logits.device)
    config = _NORMALISE.config(logits)
    patches = batch * h * w
    launch(
        _NORMALISE,
        (-(-patches // config["BLOCK_P"]),),
        config,
        *(logits, u, lowest, *logits.stride(), patches, n_cls, h, w),
        DTYPE=accumulator(logits.dtype),
    )
    return u, lowest


def log_sum_exp(u: Tensor, lowest: Tensor, size: Sequence[int], crop: Sequence[int]) -> Tensor:
    """L = log2 sum_k 2^u_k at each pixel.

    Args:
        u, lowest: of `log2_softmax`.
        size: (H, W) the full output, in pixels.
        crop: (top, left, height, width) in pixels.

    Returns:
        (B, height, width), dtype of u.
    """
    batch, h, w, n_cls = u.shape
    top, left, height, width = crop
    rows = make_axis(h, size[0], top, height)
    make_axis(w, size[1], left, width)
    lse = u.new_empty((batch, height, width))
    config = _LOG_SUM_EXP.config(u)
    groups = min(4, next_power_of_2(-(-rows.longest // 4)))
    tiles = -(-width // config["BLOCK_X"])
    launch(
        _LOG_SUM_EXP,
        (batch * rows.cells * tiles, -(-rows.longest // (4 * groups))),
        config,
        *(u, lowest, lse, n_cls, h, w, *size, top, top + height, left, left + width),
        *(rows.first, rows.cells, tiles),
        DTYPE=accumulator(u.dtype),
        GROUPS=groups,
    )
    return lse
