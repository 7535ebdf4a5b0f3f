"""Triton kernels of the mask product; used by one file alone.

Notation and mathematics: ops/mask_product_triton.py. The three kernels:

    mask           a program per block of patches: y; for the gradient m, 1/|p| and 1/|c| as well
    mask_gradient  a program per few patches: G, A and the sums over its patches
    product        a program per block of the result: G c - A p, and with G transposed the other
"""

from segmenter_fast.ops._triton import Config, Kernel, dot, load_as, store_as, tl, triton


@triton.jit
def cosines(
    p_ptr, c_ptr, p_stride_n, p_stride_d, c_stride_k, c_stride_d, n, k, N, K, D,
    DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Cosines m (BLOCK_N, BLOCK_K), 1/|p| (BLOCK_N,) and 1/|c| (BLOCK_K,); NaN outside."""
    product = tl.zeros([BLOCK_N, BLOCK_K], DTYPE)
    p_square = tl.zeros([BLOCK_N], DTYPE)
    c_square = tl.zeros([BLOCK_K], DTYPE)
    p_ptrs = p_ptr + n.to(tl.int64)[:, None] * p_stride_n
    c_ptrs = c_ptr + k.to(tl.int64)[:, None] * c_stride_k
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)[None, :]
        p = tl.load(p_ptrs + d * p_stride_d, mask=(n < N)[:, None] & (d < D), other=0.0)
        c = tl.load(c_ptrs + d * c_stride_d, mask=(k < K)[:, None] & (d < D), other=0.0)
        product = dot(p, tl.trans(c), product)
        p, c = p.to(DTYPE), c.to(DTYPE)
        p_square += tl.sum(p * p, 1)
        c_square += tl.sum(c * c, 1)
    by_p, by_c = tl.rsqrt(p_square), tl.rsqrt(c_square)
    return product * by_p[:, None] * by_c[None, :], by_p, by_c


@triton.jit
def normalise(m, k, K, DTYPE: tl.constexpr, EPS: tl.constexpr):
    """Layer norm x, 0 beyond the classes, and r, as a column."""
    kept = (k < K)[None, :]
    mean = tl.sum(tl.where(kept, m, 0.0), 1)[:, None] / K
    centred = tl.where(kept, m - mean, 0.0)
    variance = tl.sum(centred * centred, 1)[:, None] / K
    r = tl.rsqrt(variance + tl.full([1, 1], EPS, DTYPE))
    return centred * r, r


@triton.jit
def _mask_kernel(
    p_ptr,  # (B, N, D)
    c_ptr,  # (B, K, D)
    weight_ptr,  # (K,)
    bias_ptr,  # (K,)
    y_ptr,  # (B, N, K), contiguous
    m_ptr,  # (B, N, K) m, if KEEP
    by_p_ptr,  # (B, N) 1 / |p|, if KEEP
    by_c_ptr,  # (B, K) 1 / |c|, if KEEP
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
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    image = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    m, by_p, by_c = cosines(
        p_ptr + image * p_stride_b, c_ptr + image * c_stride_b,
        p_stride_n, p_stride_d, c_stride_k, c_stride_d, n, k, N, K, D,
        DTYPE, BLOCK_N, BLOCK_K, BLOCK_D,
    )  # fmt: skip
    x, _ = normalise(m, k, K, DTYPE, EPS)
    weight = load_as(weight_ptr + k, k < K, 0.0, DTYPE)[None, :]
    bias = load_as(bias_ptr + k, k < K, 0.0, DTYPE)[None, :]
    kept = (n < N)[:, None] & (k < K)[None, :]
    at = (image * N + n)[:, None] * K + k[None, :]
    store_as(y_ptr + at, x * weight + bias, kept)
    if KEEP:
        tl.store(m_ptr + at, m, mask=kept)
        tl.store(by_p_ptr + image * N + n, by_p, mask=n < N)
        # The same from every program of the image.
        tl.store(by_c_ptr + image * K + k, by_c, mask=k < K)


@triton.jit
def _mask_gradient_kernel(
    upstream_ptr,  # (B, N, K), contiguous
    m_ptr,  # (B, N, K)
    by_p_ptr,  # (B, N) 1 / |p|
    by_c_ptr,  # (B, K) 1 / |c|
    weight_ptr,  # (K,)
    g_ptr,  # (B, N, K) G
    a_ptr,  # (B, N) A
    sums_ptr,  # (B, blocks, 3, K) a block's part of dg, db and B
    N,
    K,
    blocks,
    DTYPE: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    image = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    kept = (n < N)[:, None] & (k < K)[None, :]
    at = (image * N + n)[:, None] * K + k[None, :]
    m = load_as(m_ptr + at, kept, 0.0, DTYPE)
    u = load_as(upstream_ptr + at, kept, 0.0, DTYPE)
    by_p = load_as(by_p_ptr + image * N + n, n < N, 0.0, DTYPE)
    by_c = load_as(by_c_ptr + image * K + k, k < K, 0.0, DTYPE)
    x, r = normalise(m, k, K, DTYPE, EPS)
    sums = sums_ptr + tl.program_id(0).to(tl.int64) * 3 * K + k
    tl.store(sums, tl.sum(tl.where(kept, u * x, 0.0), 0), mask=k < K)
    tl.store(sums + K, tl.sum(u, 0), mask=k < K)
    ug = u * load_as(weight_ptr + k, k < K, 0.0, DTYPE)[None, :]
    mean = tl.sum(ug, 1)[:, None] / K
    mean_x = tl.sum(ug * x, 1)[:, None] / K
    dm = tl.where(kept, r * (ug - mean - x * mean_x), 0.0)
    share = tl.where(kept, dm * m, 0.0)
    tl.store(sums + 2 * K, tl.sum(share, 0) * by_c * by_c, mask=k < K)
    tl.store(a_ptr + image * N + n, tl.sum(share, 1) * by_p * by_p, mask=n < N)
    store_as(g_ptr + at, dm * by_p[:, None] * by_c[None, :], kept)


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
    row = tl.program_id(0) % blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_ROWS, BLOCK_D], DTYPE)
    g_ptrs = g_ptr + image * g_stride_b + row.to(tl.int64)[:, None] * g_stride_row
    v_ptrs = v_ptr + image * v_stride_b + d.to(tl.int64)[None, :] * v_stride_d
    for start in range(0, INNER, BLOCK_INNER):
        inner = (start + tl.arange(0, BLOCK_INNER)).to(tl.int64)
        g_mask = (row < ROWS)[:, None] & (inner < INNER)[None, :]
        g = tl.load(g_ptrs + inner[None, :] * g_stride_inner, mask=g_mask, other=0.0)
        v_mask = (inner < INNER)[:, None] & (d < D)[None, :]
        v = tl.load(v_ptrs + inner[:, None] * v_stride_inner, mask=v_mask, other=0.0)
        total = dot(g, v, total)
    mask = (row < ROWS)[:, None] & (d < D)[None, :]
    scale = load_as(scale_ptr + image * ROWS + row, row < ROWS, 0.0, DTYPE)
    own_ptrs = own_ptr + image * own_stride_b + row.to(tl.int64)[:, None] * own_stride_row
    own = load_as(own_ptrs + d.to(tl.int64)[None, :] * own_stride_d, mask, 0.0, DTYPE)
    out = out_ptr + (image * ROWS + row)[:, None] * D + d[None, :]
    store_as(out, total - scale[:, None] * own, mask)


# 16-bit vectors go to the tensor cores; float32 to the ordinary units, with smaller blocks. The
# matrix instructions of Hopper take no fewer than 64 patches; elsewhere fewer leave more registers.
MASK = {
    True: Kernel(
        _mask_kernel,
        {
            90: (Config({"BLOCK_N": 64, "BLOCK_D": 64}, num_warps=8),),
            "default": (Config({"BLOCK_N": 32, "BLOCK_D": 64}, num_warps=8),),
        },
        matrix=True,
    ),
    False: Kernel(
        _mask_kernel, {"default": (Config({"BLOCK_N": 16, "BLOCK_D": 16}, num_warps=8),)}
    ),
}
MASK_GRADIENT = Kernel(
    _mask_gradient_kernel,
    {"default": (Config({"BLOCK_N": 8}), Config({"BLOCK_N": 16}, num_warps=8))},
)
PRODUCT = {
    True: Kernel(
        _product_kernel,
        {"default": (Config({"BLOCK_ROWS": 64, "BLOCK_INNER": 64, "BLOCK_D": 64}, num_stages=3),)},
        matrix=True,
    ),
    False: Kernel(
        _product_kernel,
        {"default": (Config({"BLOCK_ROWS": 32, "BLOCK_INNER": 16, "BLOCK_D": 32}),)},
    ),
}
