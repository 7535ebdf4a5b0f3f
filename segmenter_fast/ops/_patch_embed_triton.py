"""Triton kernels of the patch embedding; used by one file alone.

Notation and mathematics: ops/patch_embed_triton.py. The three kernels:

    embed            a program per block of the result: z, extra tokens among the rows
    weight_gradient  a program per block of the weight and part of the patches: its share of dW
    image_gradient   a program per block of patches and of their pixels: dV, put where V came from

V is never in memory: its columns k are channel, row and column in a patch, or row, column and
channel where the channels of a pixel lie side by side, so that neighbouring columns are neighbours
in the image and are read together. Pixels that are of the operands' type go into the product as
they were loaded; others are converted and normalised on the way, in registers.
"""

from segmenter_fast.ops._triton import (
    Config,
    Kernel,
    dot,
    load_as,
    round_as,
    store_as,
    tl,
    triton,
)


@triton.jit
def column(
    k, stride_c, stride_h, stride_w, C: tl.constexpr, P: tl.constexpr, LAST: tl.constexpr
):  # fmt: skip
    """Channel, row and column in the patch of V's column k, and its offset from the corner."""
    if LAST:
        # The offset is not put together from column and channel, so that the compiler sees that
        # neighbours are neighbours.
        row, within = k // (P * C), k % (P * C)
        return within % C, row, within // C, row.to(tl.int64) * stride_h + within
    channel, row, col = k // (P * P), k // P % P, k % P
    offset = channel.to(tl.int64) * stride_c + row.to(tl.int64) * stride_h
    return channel, row, col, offset + col.to(tl.int64) * stride_w


@triton.jit
def corner(token, stride_h, stride_w, columns, P: tl.constexpr):
    """Row and column of a patch's first pixel, and its offset in the image."""
    y, x = token // columns * P, token % columns * P
    return y, x, y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w


@triton.jit
def patches(
    image_ptrs, affine_ptr, sizes_ptr, image, y0, x0, exists, k, stride_c, stride_h, stride_w, H, W,
    DTYPE: tl.constexpr, OPERAND: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    LAST: tl.constexpr, AFFINE: tl.constexpr, SIZES: tl.constexpr,
):  # fmt: skip
    """Columns k of V for patches whose first pixels are at `image_ptrs`, 0 where none `exists`."""
    channel, row, col, offset = column(k, stride_c, stride_h, stride_w, C, P, LAST)
    y, x = y0[:, None] + row[None, :], x0[:, None] + col[None, :]
    inside = exists[:, None] & (k < C * P * P)[None, :] & (y < H) & (x < W)
    pointers = image_ptrs[:, None] + offset[None, :]
    if not (AFFINE or SIZES or image_ptrs.dtype.element_ty != OPERAND):
        return tl.load(pointers, mask=inside, other=0.0)
    v = load_as(pointers, inside, 0, DTYPE)
    if AFFINE:
        scale = tl.load(affine_ptr + channel, mask=k < C * P * P, other=0.0)
        shift = tl.load(affine_ptr + C + channel, mask=k < C * P * P, other=0.0)
        v = v * scale[None, :] + shift[None, :]
    if SIZES:
        # Not in the mask of the load, which would no longer read several pixels at once.
        bottom = tl.load(sizes_ptr + 2 * image, mask=exists, other=0)
        right = tl.load(sizes_ptr + 2 * image + 1, mask=exists, other=0)
        inside = inside & (y < bottom[:, None]) & (x < right[:, None])
    if AFFINE or SIZES:
        v = tl.where(inside, v, 0.0)
    return round_as(v, OPERAND)


@triton.jit
def _embed_kernel(
    images_ptr,  # (B, C, H, W) after strides
    weight_ptr,  # (D, C P P)
    bias_ptr,  # (D,)
    pos_ptr,  # (E + N, D)
    tokens_ptr,  # (E, D), if EXTRA
    affine_ptr,  # (2, C) scale and shift, if AFFINE
    sizes_ptr,  # (B, 2), if SIZES
    out_ptr,  # (B, E + N, D)
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    ROWS,  # B (E + N)
    T,  # E + N
    D,
    H,
    W,
    columns,
    blocks,
    DTYPE: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    EXTRA: tl.constexpr,
    LAST: tl.constexpr,
    AFFINE: tl.constexpr,
    SIZES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Programs that follow each other share patches, which one of them brings into the cache.
    n, d = tl.arange(0, BLOCK_N), tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    row0 = tl.program_id(0) // blocks * BLOCK_N
    # An extra token is a row like others, with no pixels.
    image, token = (row0 + n) // T, (row0 + n) % T
    exists = (row0 + n < ROWS) & (token >= EXTRA)
    y0, x0, offset = corner(token - EXTRA, stride_h, stride_w, columns, P)
    image_ptrs = images_ptr + image.to(tl.int64) * stride_b + offset
    total = tl.zeros([BLOCK_N, BLOCK_D], DTYPE)
    lanes = tl.arange(0, BLOCK_K)
    weight_ptrs = weight_ptr + d[:, None] * (C * P * P) + lanes[None, :]
    for start in range(0, C * P * P, BLOCK_K):
        k = start + lanes
        v = patches(
            image_ptrs, affine_ptr, sizes_ptr, image, y0, x0, exists, k,
            stride_c, stride_h, stride_w, H, W,
            DTYPE, weight_ptr.dtype.element_ty, C, P, LAST, AFFINE, SIZES,
        )  # fmt: skip
        mask = (d < D)[:, None] & (k < C * P * P)[None, :]
        w = tl.load(weight_ptrs + start, mask=mask, other=0.0)
        total = dot(v, tl.trans(w), total)
    mask = (row0 + n < ROWS)[:, None] & (d < D)[None, :]
    total += load_as(bias_ptr + d, d < D, 0.0, DTYPE)[None, :]
    at = token[:, None] * D + d[None, :]
    if EXTRA:
        first = (token < EXTRA)[:, None]
        total = tl.where(first, load_as(tokens_ptr + at, mask & first, 0.0, DTYPE), total)
    total += load_as(pos_ptr + at, mask, 0.0, DTYPE)
    store_as(out_ptr + row0.to(tl.int64) * D + n[:, None] * D + d[None, :], total, mask)


@triton.jit
def _weight_gradient_kernel(
    upstream_ptr,  # (B, E + N, D)
    images_ptr,  # (B, C, H, W) after strides
    affine_ptr,  # (2, C) scale and shift, if AFFINE
    sizes_ptr,  # (B, 2), if SIZES
    sums_ptr,  # (parts, D, C P P) each part's share
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    B,
    N,
    D,
    H,
    W,
    columns,
    blocks,
    k_blocks,
    share,
    DTYPE: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    EXTRA: tl.constexpr,
    LAST: tl.constexpr,
    AFFINE: tl.constexpr,
    SIZES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Blocks of patches outside and images inside: positions are worked out once for all images."""
    k = tl.program_id(0) % k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.program_id(0) // k_blocks % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    part = tl.program_id(0) // k_blocks // blocks
    total = tl.zeros([BLOCK_D, BLOCK_K], DTYPE)
    for n0 in range(part * share, tl.minimum(part * share + share, N), BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        exists = n < N
        y0, x0, offset = corner(n, stride_h, stride_w, columns, P)
        image_ptrs = images_ptr + offset
        upstream_ptrs = upstream_ptr + (EXTRA + n)[:, None] * D + d[None, :]
        mask = exists[:, None] & (d < D)[None, :]
        for b in range(B):
            v = patches(
                image_ptrs, affine_ptr, sizes_ptr, tl.full([BLOCK_N], 0, tl.int32) + b,
                y0, x0, exists, k, stride_c, stride_h, stride_w, H, W,
                DTYPE, upstream_ptr.dtype.element_ty, C, P, LAST, AFFINE, SIZES,
            )  # fmt: skip
            u = tl.load(upstream_ptrs, mask=mask, other=0.0)
            total = dot(tl.trans(u), v, total)
            image_ptrs += stride_b
            upstream_ptrs += (EXTRA + N) * D
    at = (part * D + d).to(tl.int64)[:, None] * (C * P * P) + k[None, :]
    tl.store(sums_ptr + at, total, mask=(d < D)[:, None] & (k < C * P * P)[None, :])


@triton.jit
def _image_gradient_kernel(
    upstream_ptr,  # (B, E + N, D)
    weight_ptr,  # (D, C P P)
    affine_ptr,  # (2, C) scale and shift, if AFFINE
    sizes_ptr,  # (B, 2), if SIZES
    out_ptr,  # (B, C, H, W) after strides
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    B,
    N,
    D,
    H,
    W,
    columns,
    blocks,
    DTYPE: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    EXTRA: tl.constexpr,
    LAST: tl.constexpr,
    AFFINE: tl.constexpr,
    SIZES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    k = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    row = tl.program_id(0) // blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    image, n = row // N, row % N
    exists, kept = row < B * N, k < C * P * P
    total = tl.zeros([BLOCK_N, BLOCK_K], DTYPE)
    lanes = tl.arange(0, BLOCK_D)
    upstream_row = image.to(tl.int64) * (EXTRA + N) + EXTRA + n
    upstream_ptrs = upstream_ptr + upstream_row[:, None] * D + lanes[None, :]
    weight_ptrs = weight_ptr + lanes[:, None] * (C * P * P) + k[None, :]
    for start in range(0, D, BLOCK_D):
        d = start + lanes
        u = tl.load(upstream_ptrs + start, mask=exists[:, None] & (d < D)[None, :], other=0.0)
        w = tl.load(weight_ptrs, mask=(d < D)[:, None] & kept[None, :], other=0.0)
        total = dot(u, w, total)
        weight_ptrs += BLOCK_D * C * P * P
    channel, row_in, col, offset = column(k, stride_c, stride_h, stride_w, C, P, LAST)
    y0, x0, corner_offset = corner(n, stride_h, stride_w, columns, P)
    y, x = y0[:, None] + row_in[None, :], x0[:, None] + col[None, :]
    if AFFINE:
        total *= tl.load(affine_ptr + channel, mask=kept, other=0.0)[None, :]
    if SIZES:
        bottom = tl.load(sizes_ptr + 2 * image, mask=exists, other=0)
        right = tl.load(sizes_ptr + 2 * image + 1, mask=exists, other=0)
        total = tl.where((y < bottom[:, None]) & (x < right[:, None]), total, 0.0)
    mask = exists[:, None] & kept[None, :] & (y < H) & (x < W)
    out = out_ptr + (image.to(tl.int64) * stride_b + corner_offset)[:, None] + offset[None, :]
    store_as(out, total, mask)


# By whether the operands have 16 bits: those go to the tensor cores. float32 goes to the ordinary
# units, with smaller blocks. Chosen by what the compilers say: as much of a multiprocessor's
# registers and shared memory (99 KiB on sm_86 and sm_89) as there is without spilling.
_LARGE = {"BLOCK_N": 128, "BLOCK_D": 128, "BLOCK_K": 64}
_SMALL = {"BLOCK_N": 64, "BLOCK_D": 64, "BLOCK_K": 64}
_LARGE_PATCHES = Config(_LARGE, num_warps=8, num_stages=3)
_SMALL_BLOCKS = Config(_SMALL, num_stages=3)
_TENSOR_CORES = {
    **dict.fromkeys((80, 86, 89, 90, 100), (_LARGE_PATCHES, _SMALL_BLOCKS)),
    "default": (_SMALL_BLOCKS,),
}
_WEIGHT = Config({"BLOCK_N": 64, "BLOCK_D": 128, "BLOCK_K": 128}, num_warps=8, num_stages=3)
_IMAGE = Config({"BLOCK_N": 128, "BLOCK_D": 64, "BLOCK_K": 128}, num_warps=8, num_stages=3)
_FLOAT = {
    "default": (
        Config({"BLOCK_N": 64, "BLOCK_D": 64, "BLOCK_K": 16}, num_warps=8),
        Config({"BLOCK_N": 32, "BLOCK_D": 32, "BLOCK_K": 16}),
    )
}

EMBED = {
    "loaded": Kernel(_embed_kernel, _TENSOR_CORES, matrix=True),
    "computed": Kernel(_embed_kernel, _TENSOR_CORES, matrix=True, register_operands=True),
    "wide": Kernel(_embed_kernel, _FLOAT),
}
WEIGHT_GRADIENT = {
    True: Kernel(
        _weight_gradient_kernel,
        {
            **dict.fromkeys((80, 86, 89, 90, 100), (_WEIGHT, _SMALL_BLOCKS)),
            "default": (_SMALL_BLOCKS,),
        },
        matrix=True,
    ),
    False: Kernel(
        _weight_gradient_kernel,
        {
            "default": (
                Config({"BLOCK_N": 16, "BLOCK_D": 64, "BLOCK_K": 64}, num_warps=8),
                Config({"BLOCK_N": 16, "BLOCK_D": 32, "BLOCK_K": 32}),
            )
        },
    ),
}
IMAGE_GRADIENT = {
    True: Kernel(
        _image_gradient_kernel,
        {
            **dict.fromkeys((80, 86, 89, 90, 100), (_IMAGE, _SMALL_BLOCKS)),
            "default": (_SMALL_BLOCKS,),
        },
        matrix=True,
    ),
    False: Kernel(
        _image_gradient_kernel,
        {
            "default": (
                Config({"BLOCK_N": 64, "BLOCK_D": 16, "BLOCK_K": 64}, num_warps=8),
                Config({"BLOCK_N": 32, "BLOCK_D": 16, "BLOCK_K": 32}),
            )
        },
    ),
}
