"""Triton kernels of the window evaluator; used by one file alone.

Notation and mathematics: ops/windows_triton.py. The three kernels:

    rows            a program per output row, block of the grid's columns and of classes: V
    window_labels   a program per output row and block of pixels: argmax_k z
    window_softmax  a program per output row and block of pixels: adds to the mean softmax_k z
"""

from segmenter_fast.ops._triton import Config, Kernel, load_as, tl, triton


@triton.jit
def _rows_kernel(
    logits_ptr,  # (windows, K, h, w)
    start_ptr,  # (H + 1,) TY
    index_ptr,  # (entries,)
    weight_ptr,  # (entries,)
    rows_ptr,  # (strip, J, K) V, contiguous
    stride_b,
    stride_k,
    stride_y,
    stride_x,
    K,
    h,
    w,
    window_columns,
    J,
    first,
    tiles,
    DTYPE: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    j = tl.program_id(0) % tiles * BLOCK_J + tl.arange(0, BLOCK_J)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (j < J)[:, None] & (k < K)[None, :]
    at = (j // w).to(tl.int64) * stride_b + (j % w).to(tl.int64) * stride_x
    logits = logits_ptr + at[:, None] + k.to(tl.int64)[None, :] * stride_k
    total = tl.zeros([BLOCK_J, BLOCK_K], DTYPE)
    for entry in range(tl.load(start_ptr + first + row), tl.load(start_ptr + first + row + 1)):
        i = tl.load(index_ptr + entry)
        window = (i // h).to(tl.int64) * window_columns * stride_b
        s = load_as(logits + window + (i % h).to(tl.int64) * stride_y, mask, 0.0, DTYPE)
        total += s * tl.load(weight_ptr + entry)
    tl.store(rows_ptr + (row * J + j)[:, None] * K + k[None, :], total, mask=mask)


@triton.jit
def combine(rows_ptr, index_ptr, weight_ptr, begin, end, most, k, K, DTYPE: tl.constexpr):
    """Logits z (pixels, classes) from a row of V, of pixels whose taps are begin to end."""
    total = tl.zeros([begin.shape[0], k.shape[0]], DTYPE)
    for tap in range(most):
        entry = begin + tap
        j = tl.load(index_ptr + entry, mask=entry < end, other=0)
        weight = load_as(weight_ptr + entry, entry < end, 0.0, DTYPE)
        mask = (entry < end)[:, None] & (k < K)[None, :]
        v = load_as(rows_ptr + j.to(tl.int64)[:, None] * K + k[None, :], mask, 0.0, DTYPE)
        total += v * weight[:, None]
    return total


@triton.jit
def _window_labels_kernel(
    rows_ptr,  # (strip, J, K) V
    start_ptr,  # (W + 1,) TX
    index_ptr,  # (entries,)
    weight_ptr,  # (entries,)
    labels_ptr,  # (H, W)
    K,
    J,
    W,
    most,
    first,
    tiles,
    DTYPE: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    x = tl.program_id(0) % tiles * BLOCK_X + tl.arange(0, BLOCK_X)
    begin = tl.load(start_ptr + x, mask=x < W, other=0)
    end = tl.load(start_ptr + x + 1, mask=x < W, other=0)
    best = tl.full([BLOCK_X], -float("inf"), DTYPE)
    label = tl.zeros([BLOCK_X], tl.int32)
    first_nan = tl.zeros([BLOCK_X], tl.int32) + K
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        z = combine(rows_ptr + row * J * K, index_ptr, weight_ptr, begin, end, most, k, K, DTYPE)
        kept = (k < K)[None, :]
        number = tl.where(kept & (z == z), z, -float("inf"))
        largest = tl.max(number, 1)
        where_largest = tl.where(kept & (z == largest[:, None]), k[None, :], K)
        k_largest = tl.min(where_largest, 1)
        # K if all of these are NaN; the first of them is found below.
        better = (largest > best) & (k_largest < K)
        label = tl.where(better, k_largest, label)
        best = tl.where(better, largest, best)
        is_nan = kept & (z != z)
        first_nan = tl.minimum(first_nan, tl.min(tl.where(is_nan, k[None, :], K), 1))
    label = tl.where(first_nan < K, first_nan, label)
    out = labels_ptr + (first + row) * W + x
    tl.store(out, label.to(labels_ptr.dtype.element_ty), mask=x < W)


@triton.jit
def _window_softmax_kernel(
    rows_ptr,  # (strip, J, K) V
    start_ptr,  # (W + 1,) TX
    index_ptr,  # (entries,)
    weight_ptr,  # (entries,)
    p_ptr,  # (strip, W, K), added to unless FIRST
    K,
    J,
    W,
    most,
    views,
    tiles,
    DTYPE: tl.constexpr,
    FIRST: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    x = tl.program_id(0) % tiles * BLOCK_X + tl.arange(0, BLOCK_X)
    begin = tl.load(start_ptr + x, mask=x < W, other=0)
    end = tl.load(start_ptr + x + 1, mask=x < W, other=0)
    rows_ptr += row * J * K
    p_ptrs = p_ptr + (row * W + x)[:, None] * K
    if AT_ONCE:
        k = tl.arange(0, BLOCK_K)
        z = combine(rows_ptr, index_ptr, weight_ptr, begin, end, most, k, K, DTYPE)
        z = tl.where((k < K)[None, :], z, -float("inf"))
        e = tl.exp(z - tl.max(z, 1)[:, None])
        p = e / (tl.sum(e, 1) * views)[:, None]
        mask = (x < W)[:, None] & (k < K)[None, :]
        if not FIRST:
            p += tl.load(p_ptrs + k[None, :], mask=mask, other=0.0)
        tl.store(p_ptrs + k[None, :], p, mask=mask)
    else:
        largest = tl.full([BLOCK_X], -float("inf"), DTYPE)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            z = combine(rows_ptr, index_ptr, weight_ptr, begin, end, most, k, K, DTYPE)
            z = tl.where((k < K)[None, :], z, -float("inf"))
            largest = tl.maximum(largest, tl.max(z, 1))
        total = tl.zeros([BLOCK_X], DTYPE)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            z = combine(rows_ptr, index_ptr, weight_ptr, begin, end, most, k, K, DTYPE)
            e = tl.exp(z - largest[:, None])
            total += tl.sum(tl.where((k < K)[None, :], e, 0.0), 1)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            z = combine(rows_ptr, index_ptr, weight_ptr, begin, end, most, k, K, DTYPE)
            p = tl.exp(z - largest[:, None]) / (total * views)[:, None]
            mask = (x < W)[:, None] & (k < K)[None, :]
            if not FIRST:
                p += tl.load(p_ptrs + k[None, :], mask=mask, other=0.0)
            tl.store(p_ptrs + k[None, :], p, mask=mask)


ROWS = Kernel(
    _rows_kernel,
    {"default": (Config({"BLOCK_J": 16, "BLOCK_K": 64}), Config({"BLOCK_J": 8, "BLOCK_K": 128}))},
)
LABELS = Kernel(
    _window_labels_kernel,
    {"default": (Config({"BLOCK_X": 32, "BLOCK_K": 32}), Config({"BLOCK_X": 64, "BLOCK_K": 32}))},
)
SOFTMAX = Kernel(
    _window_softmax_kernel, {"default": (Config({"BLOCK_X": 8}), Config({"BLOCK_X": 16}))}
)
