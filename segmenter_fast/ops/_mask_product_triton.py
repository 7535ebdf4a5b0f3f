"""Triton kernels of the mask product; used by one file alone.

Notation and mathematics: ops/mask_product_triton.py. The three kernels:

    mask           a program per block of patches: y; for the gradient m, 1/|p|, 1/|c|, mean and r
                   too. Classes beyond one block have programs of their own, which stop at m
    mask_gradient  a program per few patches: G, A and the sums over its patches
    product        a program per block of the result: G c - A p, and with G transposed the other

Operands of the products are as they were loaded, so that Hopper's matrix instructions read them
from shared memory: from registers older compilers get them wrong.
"""

from segmenter_fast.ops._triton import Config, Kernel, dot, load_as, store_as, tl, triton


@triton.jit
def cosines(
    p_ptr, c_ptr, p_stride_n, p_stride_d, c_stride_k, c_stride_d, patches, classes, D,
    DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Cosines m (BLOCK_N, BLOCK_K), 1/|p| (BLOCK_N,) and 1/|c| (BLOCK_K,); NaN outside."""
    product = tl.zeros([BLOCK_N, BLOCK_K], DTYPE)
    p_square = tl.zeros([BLOCK_N], DTYPE)
    c_square = tl.zeros([BLOCK_K], DTYPE)
    n = tl.arange(0, BLOCK_N)[:, None]
    k = tl.arange(0, BLOCK_K)[:, None]
    lanes = tl.arange(0, BLOCK_D)[None, :]
    p_ptrs = p_ptr + n.to(tl.int64) * p_stride_n + lanes.to(tl.int64) * p_stride_d
    c_ptrs = c_ptr + k.to(tl.int64) * c_stride_k + lanes.to(tl.int64) * c_stride_d
    for d in range(0, D, BLOCK_D):
        p = tl.load(p_ptrs, mask=(n < patches) & (lanes < D - d), other=0.0)
        c = tl.load(c_ptrs, mask=(k < classes) & (lanes < D - d), other=0.0)
        product = dot(p, tl.trans(c), product)
        p, c = p.to(DTYPE), c.to(DTYPE)
        p_square += tl.sum(p * p, 1)
        c_square += tl.sum(c * c, 1)
        p_ptrs += BLOCK_D * p_stride_d
        c_ptrs += BLOCK_D * c_stride_d
    # Not rsqrt, which is coarse in float64.
    by_p, by_c = 1.0 / tl.sqrt(p_square), 1.0 / tl.sqrt(c_square)
    return product * by_p[:, None] * by_c[None, :], by_p, by_c


@triton.jit
def _mask_kernel(
    p_ptr,  # (B, N, D)
    c_ptr,  # (B, K, D)
    weight_ptr,  # (K,)
    bias_ptr,  # (K,)
    y_ptr,  # (B, N, K), contiguous, if NORM
    m_ptr,  # (B, N, K) m, if KEEP
    by_p_ptr,  # (B, N) 1 / |p|, if KEEP
    by_c_ptr,  # (B, K) 1 / |c|, if KEEP
    mean_ptr,  # (B, N) mean of m, if KEEP and NORM
    r_ptr,  # (B, N) r, if KEEP and NORM
    p_stride_b,
    p_stride_n,
    p_stride_d,
    c_stride_b,
    c_stride_k,
    c_stride_d,
    N,
    K,
    D,
    blocks,
    DTYPE: tl.constexpr,
    EPS: tl.constexpr,
    KEEP: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # 64-bit offsets of the block; inside it 32 bits do, and take half the registers.
    image = (tl.program_id(0) // blocks).to(tl.int64)
    n0 = tl.program_id(0) % blocks * BLOCK_N
    k0 = tl.program_id(1) * BLOCK_K
    row = image * N + n0
    n, k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    patch, kept = n < N - n0, k < K - k0
    m, by_p, by_c = cosines(
        p_ptr + image * p_stride_b + n0.to(tl.int64) * p_stride_n,
        c_ptr + image * c_stride_b + k0.to(tl.int64) * c_stride_k,
        p_stride_n, p_stride_d, c_stride_k, c_stride_d, N - n0, K - k0, D,
        DTYPE, BLOCK_N, BLOCK_K, BLOCK_D,
    )  # fmt: skip
    at = n[:, None] * K + k[None, :]
    mask = patch[:, None] & kept[None, :]
    if NORM:
        mean = tl.sum(tl.where(kept[None, :], m, 0.0), 1) / K
        centred = tl.where(kept[None, :], m - mean[:, None], 0.0)
        variance = tl.sum(centred * centred, 1) / K
        r = 1.0 / tl.sqrt(variance + tl.full([1], EPS, DTYPE))
        weight = load_as(weight_ptr + k, kept, 0.0, DTYPE)[None, :]
        bias = load_as(bias_ptr + k, kept, 0.0, DTYPE)[None, :]
        store_as(y_ptr + row * K + at, centred * r[:, None] * weight + bias, mask)
        if KEEP:
            tl.store(mean_ptr + row + n, mean, mask=patch)
            tl.store(r_ptr + row + n, r, mask=patch)
    if KEEP:
        # Last, when fewer registers are in use.
        tl.store(m_ptr + row * K + k0 + at, m, mask=mask)
        if k0 == 0:
            tl.store(by_p_ptr + row + n, by_p, mask=patch)
        if n0 == 0:
            tl.store(by_c_ptr + image * K + k0 + k, by_c, mask=kept)


@triton.jit
def _mask_gradient_kernel(
    upstream_ptr,  # (B, N, K), contiguous
    m_ptr,  # (B, N, K)
    by_p_ptr,  # (B, N) 1 / |p|
    by_c_ptr,  # (B, K) 1 / |c|
    mean_ptr,  # (B, N)
    r_ptr,  # (B, N)
    weight_ptr,  # (K,)
    g_ptr,  # (B, N, K) G
    a_ptr,  # (B, N) A
    sums_ptr,  # (B, blocks, 3, K) a block's part of dg, db and B
    N,
    K,
    blocks,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    image = (tl.program_id(0) // blocks).to(tl.int64)
    n0 = tl.program_id(0) % blocks * BLOCK_N
    row = image * N + n0
    n = tl.arange(0, BLOCK_N)
    patch = n < N - n0
    by_p = load_as(by_p_ptr + row + n, patch, 0.0, DTYPE)
    mean = load_as(mean_ptr + row + n, patch, 0.0, DTYPE)[:, None]
    r = load_as(r_ptr + row + n, patch, 0.0, DTYPE)[:, None]
    u_ptr, own_m_ptr, own_g_ptr = upstream_ptr + row * K, m_ptr + row * K, g_ptr + row * K
    mean_ug = tl.zeros([BLOCK_N], DTYPE)
    mean_ugx = tl.zeros([BLOCK_N], DTYPE)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        mask = patch[:, None] & (k < K)[None, :]
        at = n[:, None] * K + k[None, :]
        weight = load_as(weight_ptr + k, k < K, 0.0, DTYPE)[None, :]
        ug = load_as(u_ptr + at, mask, 0.0, DTYPE) * weight
        x = (load_as(own_m_ptr + at, mask, 0.0, DTYPE) - mean) * r
        mean_ug += tl.sum(ug, 1)
        mean_ugx += tl.sum(tl.where(mask, ug * x, 0.0), 1)
    mean_ug, mean_ugx = mean_ug[:, None] / K, mean_ugx[:, None] / K
    a = tl.zeros([BLOCK_N], DTYPE)
    sums = sums_ptr + tl.program_id(0).to(tl.int64) * 3 * K
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        mask = patch[:, None] & (k < K)[None, :]
        at = n[:, None] * K + k[None, :]
        weight = load_as(weight_ptr + k, k < K, 0.0, DTYPE)[None, :]
        by_c = load_as(by_c_ptr + image * K + k, k < K, 0.0, DTYPE)
        u = load_as(u_ptr + at, mask, 0.0, DTYPE)
        m = load_as(own_m_ptr + at, mask, 0.0, DTYPE)
        x = (m - mean) * r
        dm = tl.where(mask, r * (u * weight - mean_ug - x * mean_ugx), 0.0)
        store_as(own_g_ptr + at, dm * by_p[:, None] * by_c[None, :], mask)
        share = tl.where(mask, dm * m, 0.0)
        a += tl.sum(share, 1)
        tl.store(sums + k, tl.sum(tl.where(mask, u * x, 0.0), 0), mask=k < K)
        tl.store(sums + K + k, tl.sum(u, 0), mask=k < K)
        tl.store(sums + 2 * K + k, tl.sum(share, 0) * by_c * by_c, mask=k < K)
    tl.store(a_ptr + row + n, a * by_p * by_p, mask=patch)


@triton.jit
def _product_kernel(
    g_ptr,  # (B, rows, inner) after strides: G, or its transpose
    v_ptr,  # (B, inner, D) the other side's vectors
    scale_ptr,  # (B, rows)
    own_ptr,  # (B, rows, D)
    out_ptr,  # (B, rows, D), contiguous
    g_stride_b,
    g_stride_row,
    g_stride_inner,
    v_stride_b,
    v_stride_inner,
    v_stride_d,
    own_stride_b,
    own_stride_row,
    own_stride_d,
    ROWS,
    INNER,
    D,
    blocks,
    DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write G v - scale own."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    row0 = tl.program_id(0) % blocks * BLOCK_ROWS
    d0 = tl.program_id(1) * BLOCK_D
    rows, lanes = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_D)
    row, d = (row0 + rows).to(tl.int64), (d0 + lanes).to(tl.int64)
    total = tl.zeros([BLOCK_ROWS, BLOCK_D], DTYPE)
    g_ptrs = g_ptr + image * g_stride_b + row[:, None] * g_stride_row
    v_ptrs = v_ptr + image * v_stride_b + d[None, :] * v_stride_d
    for start in range(0, INNER, BLOCK_INNER):
        inner = (start + tl.arange(0, BLOCK_INNER)).to(tl.int64)
        g_mask = (row < ROWS)[:, None] & (inner < INNER)[None, :]
        g = tl.load(g_ptrs + inner[None, :] * g_stride_inner, mask=g_mask, other=0.0)
        v_mask = (inner < INNER)[:, None] & (d < D)[None, :]
        v = tl.load(v_ptrs + inner[:, None] * v_stride_inner, mask=v_mask, other=0.0)
        total = dot(g, v, total)
    mask = (row < ROWS)[:, None] & (d < D)[None, :]
    scale = load_as(scale_ptr + image * ROWS + row, row < ROWS, 0.0, DTYPE)
    own_ptrs = own_ptr + image * own_stride_b + row[:, None] * own_stride_row
    own = load_as(own_ptrs + d[None, :] * own_stride_d, mask, 0.0, DTYPE)
    out = out_ptr + (image * ROWS + row0) * D + d0
    store_as(out + rows[:, None] * D + lanes[None, :], total - scale[:, None] * own, mask)


# By whether the vectors have 16 bits: those go to the tensor cores. float32 goes to the ordinary
# units, with smaller blocks. Chosen by what the compilers say: as much of a multiprocessor's
# registers and shared memory (99 KiB on sm_86 and sm_89) as there is without spilling. The matrix
# instructions of Hopper and Blackwell take no fewer than 64 patches.
_MASK_80 = Config({"BLOCK_N": 32, "BLOCK_D": 64}, num_warps=8, num_stages=3)
_MASK_86 = Config({"BLOCK_N": 64, "BLOCK_D": 64}, num_warps=16)
_PRODUCT = Config({"BLOCK_ROWS": 128, "BLOCK_INNER": 64, "BLOCK_D": 128}, num_warps=8, num_stages=3)
_SMALL_PRODUCT = Config({"BLOCK_ROWS": 64, "BLOCK_INNER": 64, "BLOCK_D": 64}, num_stages=3)

MASK = {
    True: Kernel(
        _mask_kernel,
        {
            80: (_MASK_80, _MASK_86),
            86: (_MASK_86, _MASK_80),
            89: (_MASK_86, _MASK_80),
            90: (
                Config({"BLOCK_N": 64, "BLOCK_D": 64}, num_warps=8, num_stages=4),
                Config({"BLOCK_N": 64, "BLOCK_D": 64}, num_warps=8),
            ),
            100: (Config({"BLOCK_N": 64, "BLOCK_D": 64}, num_warps=8, num_stages=3),),
            "default": (Config({"BLOCK_N": 32, "BLOCK_D": 64}, num_warps=8),),
        },
        matrix=True,
    ),
    False: Kernel(
        _mask_kernel,
        {
            "default": (
                Config({"BLOCK_N": 32, "BLOCK_D": 16}, num_warps=8),
                Config({"BLOCK_N": 16, "BLOCK_D": 16}, num_warps=8),
            )
        },
    ),
}
MASK_GRADIENT = Kernel(
    _mask_gradient_kernel,
    {
        "default": (
            Config({"BLOCK_N": 16, "BLOCK_K": 64}, num_warps=8),
            Config({"BLOCK_N": 8, "BLOCK_K": 64}),
        )
    },
)
PRODUCT = {
    True: Kernel(
        _product_kernel,
        {
            **dict.fromkeys((80, 86, 89, 90, 100), (_PRODUCT, _SMALL_PRODUCT)),
            "default": (_SMALL_PRODUCT,),
        },
        matrix=True,
    ),
    False: Kernel(
        _product_kernel,
        {
            "default": (
                Config({"BLOCK_ROWS": 64, "BLOCK_INNER": 16, "BLOCK_D": 64}, num_warps=8),
                Config({"BLOCK_ROWS": 32, "BLOCK_INNER": 16, "BLOCK_D": 32}),
            )
        },
    ),
}
