"""Triton kernels of the probabilities of upsampled patch logits; used by one file alone.

Notation and mathematics: ops/upsample_probabilities_triton.py. The three kernels:

    fill         a program per row of cells, tile of columns and few classes: L -> p
    expectation  a program per tile of rows and columns: the upstream gradient -> s
    corners      a program per cell and block of classes: what dz adds to the cell's corners
"""

from segmenter_fast.ops._triton import Config, Kernel, load_as, tl, triton
from segmenter_fast.ops._upsampling_triton import between, cell_of, first_pixel, weight_of


@triton.jit
def _fill_kernel(
    u_ptr,  # (B, h, w, K)
    lse_ptr,  # (B, height, width)
    p_ptr,  # (B, K, height, width)
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
    cells,
    tiles,
    DTYPE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    pid = tl.program_id(0)
    tile = pid % tiles
    cell_y = pid // tiles % cells
    image = (pid // tiles // cells).to(tl.int64)
    height, width = bottom - top, right - left
    y = first_y + cell_y
    start = tl.maximum(first_pixel(y, h, H), top)
    stop = tl.where(cell_y == cells - 1, bottom, tl.minimum(first_pixel(y + 1, h, H), bottom))
    column = left + tile * BLOCK_X + tl.arange(0, BLOCK_X)
    inside = column < right
    x = cell_of(column, w, W)
    fx = weight_of(column, x, w, W, DTYPE)[None, :]
    x0, x1 = tl.minimum(tl.maximum(x, 0), w - 1), tl.minimum(tl.maximum(x, 0) + 1, w - 1)
    upper = (image * h + tl.maximum(y, 0)) * w
    lower = (image * h + tl.minimum(tl.maximum(y, 0) + 1, h - 1)) * w
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (k < K)[:, None] & inside[None, :]
    a = load_as(u_ptr + ((upper + x0) * K)[None, :] + k[:, None], mask, 0.0, DTYPE)
    b = load_as(u_ptr + ((upper + x1) * K)[None, :] + k[:, None], mask, 0.0, DTYPE)
    above = between(a, b, fx)
    a = load_as(u_ptr + ((lower + x0) * K)[None, :] + k[:, None], mask, 0.0, DTYPE)
    b = load_as(u_ptr + ((lower + x1) * K)[None, :] + k[:, None], mask, 0.0, DTYPE)
    below = between(a, b, fx)
    out = p_ptr + (image * K + k)[:, None] * height * width + (column - left)[None, :]
    for row in range(start, stop):
        at = (row - top).to(tl.int64) * width
        lse = load_as(lse_ptr + image * height * width + at + column - left, inside, 0.0, DTYPE)
        u = between(above, below, weight_of(row, y, h, H, DTYPE))
        tl.store(out + at, tl.exp2(u - lse[None, :]), mask=mask)


@triton.jit
def _expectation_kernel(
    u_ptr,  # (B, h, w, K)
    lse_ptr,  # (B, height, width)
    g_ptr,  # (B, K, height, width)
    s_ptr,  # (B, height, width)
    stride_b,
    stride_k,
    stride_y,
    stride_x,
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
    cells,
    tiles,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    pid = tl.program_id(0)
    tile = pid % tiles
    cell_y = pid // tiles % cells
    image = (pid // tiles // cells).to(tl.int64)
    height, width = bottom - top, right - left
    y = first_y + cell_y
    start = tl.maximum(first_pixel(y, h, H), top) + tl.program_id(1) * ROWS
    stop = tl.where(cell_y == cells - 1, bottom, tl.minimum(first_pixel(y + 1, h, H), bottom))
    row = start + tl.arange(0, ROWS)
    column = left + tile * BLOCK_X + tl.arange(0, BLOCK_X)
    inside = column < right
    x = cell_of(column, w, W)
    fx = weight_of(column, x, w, W, DTYPE)[None, :]
    fy = weight_of(row, y, h, H, DTYPE)[:, None, None]
    x0, x1 = tl.minimum(tl.maximum(x, 0), w - 1), tl.minimum(tl.maximum(x, 0) + 1, w - 1)
    upper = (image * h + tl.maximum(y, 0)) * w
    lower = (image * h + tl.minimum(tl.maximum(y, 0) + 1, h - 1)) * w
    pixels = (row < stop)[:, None] & inside[None, :]
    at = (image * height + row - top)[:, None] * width + (column - left)[None, :]
    lse = load_as(lse_ptr + at, pixels, 0.0, DTYPE)
    g_at = image * stride_b + (row - top).to(tl.int64)[:, None] * stride_y
    g_at += (column - left).to(tl.int64)[None, :] * stride_x
    s = tl.zeros([ROWS, BLOCK_X], DTYPE)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        mask = (k < K)[:, None] & inside[None, :]
        a = load_as(u_ptr + ((upper + x0) * K)[None, :] + k[:, None], mask, 0.0, DTYPE)
        b = load_as(u_ptr + ((upper + x1) * K)[None, :] + k[:, None], mask, 0.0, DTYPE)
        above = between(a, b, fx)
        a = load_as(u_ptr + ((lower + x0) * K)[None, :] + k[:, None], mask, 0.0, DTYPE)
        b = load_as(u_ptr + ((lower + x1) * K)[None, :] + k[:, None], mask, 0.0, DTYPE)
        below = between(a, b, fx)
        u = between(above[None, :, :], below[None, :, :], fy)
        every = pixels[:, None, :] & (k < K)[None, :, None]
        g_ptrs = g_ptr + g_at[:, None, :] + k.to(tl.int64)[None, :, None] * stride_k
        g = load_as(g_ptrs, every, 0.0, DTYPE)
        s += tl.sum(tl.where(every, g * tl.exp2(u - lse[:, None, :]), 0.0), 1)
    tl.store(s_ptr + at, s, mask=pixels)


@triton.jit
def _probability_corners_kernel(
    u_ptr,  # (B, h, w, K)
    lse_ptr,  # (B, height, width)
    g_ptr,  # (B, K, height, width)
    s_ptr,  # (B, height, width)
    corners_ptr,  # (B, cells_y, cells_x, 4, K)
    stride_b,
    stride_k,
    stride_y,
    stride_x,
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
    chunks,
    DTYPE: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0)
    cell_x = pid % cells_x
    cell_y = pid // cells_x % cells_y
    image = (pid // cells_x // cells_y).to(tl.int64)
    height, width = bottom - top, right - left
    y, x = first_y + cell_y, first_x + cell_x
    start_y = tl.maximum(first_pixel(y, h, H), top)
    stop_y = tl.where(cell_y == cells_y - 1, bottom, tl.minimum(first_pixel(y + 1, h, H), bottom))
    start_x = tl.maximum(first_pixel(x, w, W), left)
    stop_x = tl.where(cell_x == cells_x - 1, right, tl.minimum(first_pixel(x + 1, w, W), right))
    x0, x1 = tl.maximum(x, 0), tl.minimum(tl.maximum(x, 0) + 1, w - 1)
    upper = (image * h + tl.maximum(y, 0)) * w
    lower = (image * h + tl.minimum(tl.maximum(y, 0) + 1, h - 1)) * w
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    k_mask = k < K
    a = load_as(u_ptr + (upper + x0) * K + k, k_mask, 0.0, DTYPE)[:, None]
    b = load_as(u_ptr + (upper + x1) * K + k, k_mask, 0.0, DTYPE)[:, None]
    c = load_as(u_ptr + (lower + x0) * K + k, k_mask, 0.0, DTYPE)[:, None]
    d = load_as(u_ptr + (lower + x1) * K + k, k_mask, 0.0, DTYPE)[:, None]
    g_at = g_ptr + image * stride_b + k.to(tl.int64)[:, None] * stride_k
    # Sums over the cell's pixels of dz, fy dz, fx dz and fy fx dz.
    s_1 = tl.zeros([BLOCK_K], DTYPE)
    s_y = tl.zeros([BLOCK_K], DTYPE)
    s_x = tl.zeros([BLOCK_K], DTYPE)
    s_yx = tl.zeros([BLOCK_K], DTYPE)
    for chunk in range(chunks):
        column = start_x + chunk * PIXELS + tl.arange(0, PIXELS)
        inside = column < stop_x
        mask = k_mask[:, None] & inside[None, :]
        fx = weight_of(column, x, w, W, DTYPE)[None, :]
        above, below = between(a, b, fx), between(c, d, fx)
        total = tl.zeros([BLOCK_K, PIXELS], DTYPE)
        total_y = tl.zeros([BLOCK_K, PIXELS], DTYPE)
        for row in range(start_y, stop_y):
            fy = weight_of(row, y, h, H, DTYPE)
            at = (image * height + row - top) * width + column - left
            lse = load_as(lse_ptr + at, inside, 0.0, DTYPE)[None, :]
            s = load_as(s_ptr + at, inside, 0.0, DTYPE)[None, :]
            g_row = (row - top).to(tl.int64) * stride_y
            g_ptrs = g_at + g_row + (column - left).to(tl.int64)[None, :] * stride_x
            g = load_as(g_ptrs, mask, 0.0, DTYPE)
            dz = tl.where(mask, tl.exp2(between(above, below, fy) - lse) * (g - s), 0.0)
            total += dz
            total_y += dz * fy
        s_1 += tl.sum(total, 1)
        s_y += tl.sum(total_y, 1)
        s_x += tl.sum(total * fx, 1)
        s_yx += tl.sum(total_y * fx, 1)
    out = corners_ptr + ((image * cells_y + cell_y) * cells_x + cell_x) * 4 * K + k
    tl.store(out, s_1 - s_y - s_x + s_yx, mask=k_mask)
    tl.store(out + K, s_x - s_yx, mask=k_mask)
    tl.store(out + 2 * K, s_y - s_yx, mask=k_mask)
    tl.store(out + 3 * K, s_yx, mask=k_mask)


FILL = Kernel(
    _fill_kernel,
    {
        "default": (
            Config({"BLOCK_K": 8, "BLOCK_X": 128}),
            Config({"BLOCK_K": 4, "BLOCK_X": 256}),
        )
    },
)
EXPECTATION = Kernel(
    _expectation_kernel, {"default": (Config({"ROWS": 4, "BLOCK_K": 4, "BLOCK_X": 128}),)}
)
PROBABILITY_CORNERS = Kernel(
    _probability_corners_kernel, {"default": (Config({"BLOCK_K": 64}), Config({"BLOCK_K": 32}, 2))}
)
