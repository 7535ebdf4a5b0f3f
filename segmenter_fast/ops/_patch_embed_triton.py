"""Triton kernels of the patch embedding; used by one file alone.

Notation and mathematics: ops/patch_embed_triton.py. The three kernels:

    embed            a program per block of patches and of z's columns; extra tokens shared out
    weight_gradient  a program per block of the weight and part of the patches: its share of dW
    image_gradient   a program per block of patches and of their pixels: dV, put where V came from

V is never in memory: its columns k are channel, row and column in a patch, or row, column and
channel where the channels of a pixel lie side by side, so that neighbouring columns are neighbours
in the image and are read together. Pixels that are of the operands' type go into the product as
they were loaded; others are converted and normalised on the way, in registers. Offsets inside an
image have 32 bits, which take half the registers; those of images have 64.
"""

from dataclasses import replace

from segmenter_fast.ops._triton import (
    ARCHITECTURES,
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
        return within % C, row, within // C, row * stride_h + within
    channel, row, col = k // (P * P), k // P % P, k % P
    return channel, row, col, channel * stride_c + row * stride_h + col * stride_w


@triton.jit
def corner(token, stride_h, stride_w, columns, P: tl.constexpr):
    """Row and column of a patch's first pixel, and its offset in the image."""
    y, x = token // columns * P, token % columns * P
    return y, x, y * stride_h + x * stride_w


@triton.jit
def patches(
    images_ptr, affine_ptr, sizes_ptr, image, y0, x0, at, exists, k,
    stride_c, stride_h, stride_w, H, W,
    DTYPE: tl.constexpr, OPERAND: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    LAST: tl.constexpr, AFFINE: tl.constexpr, SIZES: tl.constexpr,
):  # fmt: skip
    """Columns k of V for patches whose first pixels are at offset `at`, 0 where none `exists`."""
    channel, row, col, offset = column(k, stride_c, stride_h, stride_w, C, P, LAST)
    y, x = y0[:, None] + row[None, :], x0[:, None] + col[None, :]
    inside = exists[:, None] & (k < C * P * P)[None, :] & (y < H) & (x < W)
    pointers = images_ptr + (at[:, None] + offset[None, :])
    if not (AFFINE or SIZES or images_ptr.dtype.element_ty != OPERAND):
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
    # Programs that follow each other share patches, which one of them brings into the cache.
    n, d = tl.arange(0, BLOCK_N), tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    patch = tl.program_id(0) // blocks * BLOCK_N + n
    image, token = patch // N, patch % N
    exists = patch < B * N
    y0, x0, offset = corner(token, stride_h, stride_w, columns, P)
    image_ptrs = (images_ptr + image.to(tl.int64) * stride_b)[:, None]
    total = tl.zeros([BLOCK_N, BLOCK_D], DTYPE)
    lanes = tl.arange(0, BLOCK_K)
    weight_ptrs = weight_ptr + d[:, None] * (C * P * P) + lanes[None, :]
    for start in range(0, C * P * P, BLOCK_K):
        k = start + lanes
        v = patches(
            image_ptrs, affine_ptr, sizes_ptr, image, y0, x0, offset, exists, k,
            stride_c, stride_h, stride_w, H, W,
            DTYPE, weight_ptr.dtype.element_ty, C, P, LAST, AFFINE, SIZES,
        )  # fmt: skip
        mask = (d < D)[:, None] & (k < C * P * P)[None, :]
        w = tl.load(weight_ptrs + start, mask=mask, other=0.0)
        total = dot(v, tl.trans(w), total)
    mask = exists[:, None] & (d < D)[None, :]
    at = (token[:, None] + EXTRA) * D + d[None, :]
    total += load_as(bias_ptr + d, d < D, 0.0, DTYPE)[None, :]
    total += load_as(pos_ptr + at, mask, 0.0, DTYPE)
    out_ptrs = out_ptr + image.to(tl.int64)[:, None] * ((EXTRA + N) * D)
    store_as(out_ptrs + at, total, mask)
    # Extra tokens, which have no pixels, are shared out.
    for row in range(tl.program_id(0) // blocks, B * EXTRA, tl.num_programs(0) // blocks):
        own = row % EXTRA * D + d
        z = load_as(tokens_ptr + own, d < D, 0.0, DTYPE)
        z += load_as(pos_ptr + own, d < D, 0.0, DTYPE)
        start_of_image = tl.cast(row // EXTRA, tl.int64) * ((EXTRA + N) * D)
        store_as(out_ptr + start_of_image + own, z, d < D)


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
        image_ptr = images_ptr
        upstream_ptrs = upstream_ptr + (EXTRA + n)[:, None] * D + d[None, :]
        mask = exists[:, None] & (d < D)[None, :]
        for b in range(B):
            v = patches(
                image_ptr, affine_ptr, sizes_ptr, tl.full([BLOCK_N], 0, tl.int32) + b,
                y0, x0, offset, exists, k, stride_c, stride_h, stride_w, H, W,
                DTYPE, upstream_ptr.dtype.element_ty, C, P, LAST, AFFINE, SIZES,
            )  # fmt: skip
            u = tl.load(upstream_ptrs, mask=mask, other=0.0)
            total = dot(tl.trans(u), v, total)
            image_ptr += stride_b
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
    out = (out_ptr + image.to(tl.int64) * stride_b)[:, None]
    store_as(out + (corner_offset[:, None] + offset[None, :]), total, mask)


# By whether the operands have 16 bits: those go to the tensor cores. float32 goes to the ordinary
# units, with smaller blocks. Chosen by what the compilers say: as much of a multiprocessor's
# registers and shared memory (99 KiB on sm_86 and sm_89) as there is without spilling, and two
# programs on a multiprocessor where 128 registers do. Pixels that are computed take more of them.
_EMBED = Config({"BLOCK_N": 128, "BLOCK_D": 128, "BLOCK_K": 64}, num_warps=8, num_stages=3)
_EMBED_90 = replace(_EMBED, maxnreg=128)
_WEIGHT = Config({"BLOCK_N": 64, "BLOCK_D": 128, "BLOCK_K": 128}, num_warps=8, num_stages=3)
_WEIGHT_COMPUTED = replace(_WEIGHT, blocks={"BLOCK_N": 32, "BLOCK_D": 128, "BLOCK_K": 128})
_IMAGE = Config({"BLOCK_N": 128, "BLOCK_D": 64, "BLOCK_K": 128}, num_warps=8, num_stages=3)
_SMALL = Config({"BLOCK_N": 64, "BLOCK_D": 64, "BLOCK_K": 64}, num_stages=3)
_SMALL_COMPUTED = Config({"BLOCK_N": 32, "BLOCK_D": 64, "BLOCK_K": 64}, num_stages=3)


def _table(preferred: Config, small: Config) -> dict[int | str, tuple[Config, ...]]:
    return {**dict.fromkeys(ARCHITECTURES, (preferred, small)), "default": (small,)}


EMBED = {
    "loaded": Kernel(
        _embed_kernel, {**_table(_EMBED, _SMALL), 90: (_EMBED_90, _EMBED, _SMALL)}, matrix=True
    ),
    "computed": Kernel(_embed_kernel, _table(_EMBED, _SMALL), matrix=True, register_operands=True),
    "wide": Kernel(
        _embed_kernel,
        {
            "default": (
                Config({"BLOCK_N": 64, "BLOCK_D": 64, "BLOCK_K": 16}, num_warps=8),
                Config({"BLOCK_N": 32, "BLOCK_D": 32, "BLOCK_K": 16}),
            )
        },
    ),
}
# The pixels are the product's right side here, which goes through shared memory in any case.
WEIGHT_GRADIENT = {
    "loaded": Kernel(_weight_gradient_kernel, _table(_WEIGHT, _SMALL), matrix=True),
    "computed": Kernel(
        _weight_gradient_kernel, _table(_WEIGHT_COMPUTED, _SMALL_COMPUTED), matrix=True
    ),
    "wide": Kernel(
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
    True: Kernel(_image_gradient_kernel, _table(_IMAGE, _SMALL), matrix=True),
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
