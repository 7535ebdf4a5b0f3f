"""Triton kernels of attention; used by one file alone.

Notation and mathematics: ops/attention_triton.py. A program owns a block of rows of one head, and
walks over the columns. The three kernels:

    attention              rows are queries, columns keys: y, and e for the gradient
    attention_of_queries   rows are queries, columns keys: dq, and delta for the next
    attention_of_keys      rows are keys, columns queries: dk and dv

Tails are peeled off. Whole blocks of columns need no mask; the columns left over are walked in
blocks of 16, masked. Of the rows' blocks only a head's last one is not whole; if few rows are left
in it, it runs on a small block. So 1,025 tokens cost little more than 1,024.

Products take transposes of loaded blocks only, never of computed ones, which older compilers
miscompile for sm_90 (flash-linear-attention#826).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

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

COLUMNS_LEFT = tl.constexpr(16)
"""Columns per block in a tail: as few as a matrix instruction takes."""


# --------------------------------------------------------------------------- pieces
@triton.jit
def load_block(
    ptr, stride_n, stride_d, left,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows (ROWS, BLOCK_D) of one head as they are stored; zeros beyond `left` rows and D."""
    n, d = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    ptrs = ptr + n * stride_n + d * stride_d
    if MASKED:
        return tl.load(ptrs, mask=(n < left) & (d < D), other=0.0)
    if BLOCK_D != D:
        return tl.load(ptrs, mask=(n >= 0) & (d < D), other=0.0)
    return tl.load(ptrs)


@triton.jit
def keep_at(seed, head, query, key, THRESHOLD: tl.constexpr):
    """Whether dropout leaves the weight of (query, key): 31 random bits, by Philox, against p.

    Every pass draws them anew from the position alone, whatever its blocks.
    """
    zero = (query + key) * 0
    bits, _, _, _ = tl.philox(seed, query + zero, key + zero, head + zero, zero, 7)
    return (bits >> 1).to(tl.int32) >= THRESHOLD


@triton.jit
def place_of(blocks, H, BLOCK: tl.constexpr):
    """Image, head, their number, and first row of this program, the rows of a head together."""
    pid = tl.program_id(0)
    head = pid // blocks
    return (head // H).to(tl.int64), (head % H).to(tl.int64), head, pid % blocks * BLOCK


# --------------------------------------------------------------------------- forward
@triton.jit
def forward_step(
    q, k_ptr, v_ptr, key0, left, stride_n, stride_d, m, total, acc, seed, head, query,
    DTYPE: tl.constexpr, SCALE: tl.constexpr, THRESHOLD: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys: the running maximum, the sum and the weighted values."""
    scale = tl.full([1, 1], SCALE, DTYPE)
    k = load_block(k_ptr, stride_n, stride_d, left, COLUMNS, D, BLOCK_D, MASKED)
    s = dot(q, tl.trans(k), tl.zeros([ROWS, COLUMNS], DTYPE))
    if MASKED:
        s = tl.where(tl.arange(0, COLUMNS)[None, :] < left, s, float("-inf"))
    highest = tl.maximum(m, tl.max(s, 1) * SCALE)
    p = tl.exp2(s * scale - highest[:, None])
    shrink = tl.exp2(m - highest)
    total = total * shrink + tl.sum(p, 1)
    if THRESHOLD > 0:
        key = key0 + tl.arange(0, COLUMNS)[None, :]
        p = tl.where(keep_at(seed, head, query[:, None], key, THRESHOLD), p, 0.0)
    v = load_block(v_ptr, stride_n, stride_d, left, COLUMNS, D, BLOCK_D, MASKED)
    return highest, total, dot(round_as(p, v.dtype), v, acc * shrink[:, None])


@triton.jit
def forward_rows(
    q_ptr, k_ptr, v_ptr, y_ptr, e_ptr, seed, head, row0, N, stride_n, stride_d, stride_y,
    DTYPE: tl.constexpr, SCALE: tl.constexpr, THRESHOLD: tl.constexpr, INVERSE: tl.constexpr,
    D: tl.constexpr, KEEP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, ROWS)
    query = row0 + rows
    q = load_block(q_ptr, stride_n, stride_d, N - row0, ROWS, D, BLOCK_D, True)
    m = tl.full([ROWS], float("-inf"), DTYPE)
    total = tl.zeros([ROWS], DTYPE)
    acc = tl.zeros([ROWS, BLOCK_D], DTYPE)
    whole = N // COLUMNS * COLUMNS
    for key0 in range(0, whole, COLUMNS):
        m, total, acc = forward_step(
            q, k_ptr, v_ptr, key0, COLUMNS, stride_n, stride_d, m, total, acc, seed, head, query,
            DTYPE, SCALE, THRESHOLD, D, ROWS, COLUMNS, BLOCK_D, False,
        )  # fmt: skip
        k_ptr += COLUMNS * stride_n
        v_ptr += COLUMNS * stride_n
    for key0 in range(whole, N, COLUMNS_LEFT):
        m, total, acc = forward_step(
            q, k_ptr, v_ptr, key0, N - key0, stride_n, stride_d, m, total, acc, seed, head, query,
            DTYPE, SCALE, THRESHOLD, D, ROWS, COLUMNS_LEFT, BLOCK_D, True,
        )  # fmt: skip
        k_ptr += COLUMNS_LEFT * stride_n
        v_ptr += COLUMNS_LEFT * stride_n
    # A product is cheaper than a division of every element.
    acc *= (tl.full([ROWS], INVERSE, DTYPE) / total)[:, None]
    d = tl.arange(0, BLOCK_D)
    mask = (query < N)[:, None] & (d < D)[None, :]
    store_as(y_ptr + rows[:, None] * stride_y + d[None, :], acc, mask)
    if KEEP:
        tl.store(e_ptr + rows, m + tl.log2(total), mask=query < N)


@triton.jit
def _attention_kernel(
    qkv_ptr,  # (B, N, 3, H, D)
    seed_ptr,  # (1,) int64, if THRESHOLD
    y_ptr,  # (B, N, H, D), contiguous
    e_ptr,  # (B, H, N), if KEEP
    stride_b,
    stride_n,
    stride_which,
    stride_h,
    stride_d,
    N,
    H,
    blocks,
    DTYPE: tl.constexpr,
    SCALE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    INVERSE: tl.constexpr,
    D: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_LEFT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    image, h, head, row0 = place_of(blocks, H, ROWS)
    seed = tl.load(seed_ptr) if THRESHOLD > 0 else 0
    k_ptr = qkv_ptr + image * stride_b + h * stride_h + stride_which
    q_ptr = k_ptr - stride_which + row0.to(tl.int64) * stride_n
    v_ptr = k_ptr + stride_which
    y_ptr += ((image * N + row0) * H + h) * D
    e_ptr += head.to(tl.int64) * N + row0
    if N - row0 <= ROWS_LEFT:
        forward_rows(
            q_ptr, k_ptr, v_ptr, y_ptr, e_ptr, seed, head, row0, N, stride_n, stride_d, H * D,
            DTYPE, SCALE, THRESHOLD, INVERSE, D, KEEP, ROWS_LEFT, COLUMNS, BLOCK_D,
        )  # fmt: skip
    else:
        forward_rows(
            q_ptr, k_ptr, v_ptr, y_ptr, e_ptr, seed, head, row0, N, stride_n, stride_d, H * D,
            DTYPE, SCALE, THRESHOLD, INVERSE, D, KEEP, ROWS, COLUMNS, BLOCK_D,
        )  # fmt: skip


# --------------------------------------------------------------------------- gradient of queries
@triton.jit
def queries_step(
    q, u, e, delta, k_ptr, v_ptr, key0, left, stride_n, stride_d, dq, seed, head, query,
    DTYPE: tl.constexpr, SCALE: tl.constexpr, THRESHOLD: tl.constexpr, INVERSE: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    scale = tl.full([1, 1], SCALE, DTYPE)
    k = load_block(k_ptr, stride_n, stride_d, left, COLUMNS, D, BLOCK_D, MASKED)
    s = dot(q, tl.trans(k), tl.zeros([ROWS, COLUMNS], DTYPE))
    if MASKED:
        s = tl.where(tl.arange(0, COLUMNS)[None, :] < left, s, float("-inf"))
    p = tl.exp2(s * scale - e[:, None])
    v = load_block(v_ptr, stride_n, stride_d, left, COLUMNS, D, BLOCK_D, MASKED)
    dp = dot(u, tl.trans(v), tl.zeros([ROWS, COLUMNS], DTYPE))
    if THRESHOLD > 0:
        key = key0 + tl.arange(0, COLUMNS)[None, :]
        kept = keep_at(seed, head, query[:, None], key, THRESHOLD)
        dp = tl.where(kept, dp * tl.full([1, 1], INVERSE, DTYPE), 0.0)
    return dot(round_as(p * (dp - delta[:, None]), k.dtype), k, dq)


@triton.jit
def queries_rows(
    q_ptr, k_ptr, v_ptr, y_ptr, u_ptr, e_ptr, g_ptr, delta_ptr, seed, head, row0, N,
    stride_n, stride_d, stride_y,
    DTYPE: tl.constexpr, SCALE: tl.constexpr, THRESHOLD: tl.constexpr, INVERSE: tl.constexpr,
    ROOT: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    query, left = row0 + rows, N - row0
    mask = (query < N)[:, None] & (d < D)[None, :]
    q = load_block(q_ptr, stride_n, stride_d, left, ROWS, D, BLOCK_D, True)
    u = load_block(u_ptr, stride_y, 1, left, ROWS, D, BLOCK_D, True)
    at = rows[:, None] * stride_y + d[None, :]
    y = load_as(y_ptr + at, mask, 0.0, DTYPE)
    delta = tl.sum(load_as(u_ptr + at, mask, 0.0, DTYPE) * y, 1)
    tl.store(delta_ptr + rows, delta, mask=query < N)
    e = load_as(e_ptr + rows, query < N, float("inf"), DTYPE)
    dq = tl.zeros([ROWS, BLOCK_D], DTYPE)
    whole = N // COLUMNS * COLUMNS
    for key0 in range(0, whole, COLUMNS):
        dq = queries_step(
            q, u, e, delta, k_ptr, v_ptr, key0, COLUMNS, stride_n, stride_d, dq, seed, head, query,
            DTYPE, SCALE, THRESHOLD, INVERSE, D, ROWS, COLUMNS, BLOCK_D, False,
        )  # fmt: skip
        k_ptr += COLUMNS * stride_n
        v_ptr += COLUMNS * stride_n
    for key0 in range(whole, N, COLUMNS_LEFT):
        dq = queries_step(
            q, u, e, delta, k_ptr, v_ptr, key0, N - key0, stride_n, stride_d, dq, seed, head, query,
            DTYPE, SCALE, THRESHOLD, INVERSE, D, ROWS, COLUMNS_LEFT, BLOCK_D, True,
        )  # fmt: skip
        k_ptr += COLUMNS_LEFT * stride_n
        v_ptr += COLUMNS_LEFT * stride_n
    dq *= tl.full([1, 1], ROOT, DTYPE)
    store_as(g_ptr + rows[:, None] * (3 * stride_y) + d[None, :], dq, mask)


@triton.jit
def _attention_of_queries_kernel(
    qkv_ptr,  # (B, N, 3, H, D)
    seed_ptr,  # (1,) int64, if THRESHOLD
    y_ptr,  # (B, N, H, D), contiguous
    u_ptr,  # (B, N, H, D) upstream gradient, contiguous
    e_ptr,  # (B, H, N)
    g_ptr,  # (B, N, 3, H, D), contiguous; its queries are written
    delta_ptr,  # (B, H, N)
    stride_b,
    stride_n,
    stride_which,
    stride_h,
    stride_d,
    N,
    H,
    blocks,
    DTYPE: tl.constexpr,
    SCALE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    INVERSE: tl.constexpr,
    ROOT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_LEFT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    image, h, head, row0 = place_of(blocks, H, ROWS)
    seed = tl.load(seed_ptr) if THRESHOLD > 0 else 0
    k_ptr = qkv_ptr + image * stride_b + h * stride_h + stride_which
    q_ptr = k_ptr - stride_which + row0.to(tl.int64) * stride_n
    v_ptr = k_ptr + stride_which
    own = image * N + row0
    y_ptr += (own * H + h) * D
    u_ptr += (own * H + h) * D
    g_ptr += (own * 3 * H + h) * D
    e_ptr += head.to(tl.int64) * N + row0
    delta_ptr += head.to(tl.int64) * N + row0
    if N - row0 <= ROWS_LEFT:
        queries_rows(
            q_ptr, k_ptr, v_ptr, y_ptr, u_ptr, e_ptr, g_ptr, delta_ptr, seed, head, row0, N,
            stride_n, stride_d, H * D,
            DTYPE, SCALE, THRESHOLD, INVERSE, ROOT, D, ROWS_LEFT, COLUMNS, BLOCK_D,
        )  # fmt: skip
    else:
        queries_rows(
            q_ptr, k_ptr, v_ptr, y_ptr, u_ptr, e_ptr, g_ptr, delta_ptr, seed, head, row0, N,
            stride_n, stride_d, H * D,
            DTYPE, SCALE, THRESHOLD, INVERSE, ROOT, D, ROWS, COLUMNS, BLOCK_D,
        )  # fmt: skip


# --------------------------------------------------------------------------- gradient of the rest
@triton.jit
def keys_step(
    k, v, q_ptr, u_ptr, e_ptr, delta_ptr, query0, left, stride_n, stride_d, stride_y,
    dk, dv, seed, head, key,
    DTYPE: tl.constexpr, SCALE: tl.constexpr, THRESHOLD: tl.constexpr, INVERSE: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """One block of queries, transposed: rows are keys."""
    scale = tl.full([1, 1], SCALE, DTYPE)
    columns = tl.arange(0, COLUMNS)
    q = load_block(q_ptr, stride_n, stride_d, left, COLUMNS, D, BLOCK_D, MASKED)
    # Queries that do not exist have e = infinity, hence no weight.
    e = load_as(e_ptr + columns, columns < left, float("inf"), DTYPE)
    delta = load_as(delta_ptr + columns, columns < left, 0.0, DTYPE)
    s = dot(k, tl.trans(q), tl.zeros([ROWS, COLUMNS], DTYPE))
    p = tl.exp2(s * scale - e[None, :])
    u = load_block(u_ptr, stride_y, 1, left, COLUMNS, D, BLOCK_D, MASKED)
    dp = dot(v, tl.trans(u), tl.zeros([ROWS, COLUMNS], DTYPE))
    kept_p = p
    if THRESHOLD > 0:
        kept = keep_at(seed, head, query0 + columns[None, :], key[:, None], THRESHOLD)
        kept_p = tl.where(kept, p, 0.0)
        dp = tl.where(kept, dp * tl.full([1, 1], INVERSE, DTYPE), 0.0)
    dv = dot(round_as(kept_p, u.dtype), u, dv)
    return dot(round_as(p * (dp - delta[None, :]), q.dtype), q, dk), dv


@triton.jit
def keys_rows(
    q_ptr, k_ptr, v_ptr, u_ptr, e_ptr, delta_ptr, g_ptr, seed, head, row0, N,
    stride_n, stride_d, stride_y,
    DTYPE: tl.constexpr, SCALE: tl.constexpr, THRESHOLD: tl.constexpr, INVERSE: tl.constexpr,
    ROOT: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    key, left = row0 + rows, N - row0
    k = load_block(k_ptr, stride_n, stride_d, left, ROWS, D, BLOCK_D, True)
    v = load_block(v_ptr, stride_n, stride_d, left, ROWS, D, BLOCK_D, True)
    dk = tl.zeros([ROWS, BLOCK_D], DTYPE)
    dv = tl.zeros([ROWS, BLOCK_D], DTYPE)
    whole = N // COLUMNS * COLUMNS
    for query0 in range(0, whole, COLUMNS):
        dk, dv = keys_step(
            k, v, q_ptr, u_ptr, e_ptr, delta_ptr, query0, COLUMNS, stride_n, stride_d, stride_y,
            dk, dv, seed, head, key,
            DTYPE, SCALE, THRESHOLD, INVERSE, D, ROWS, COLUMNS, BLOCK_D, False,
        )  # fmt: skip
        q_ptr += COLUMNS * stride_n
        u_ptr += COLUMNS * stride_y
        e_ptr += COLUMNS
        delta_ptr += COLUMNS
    for query0 in range(whole, N, COLUMNS_LEFT):
        dk, dv = keys_step(
            k, v, q_ptr, u_ptr, e_ptr, delta_ptr, query0, N - query0, stride_n, stride_d, stride_y,
            dk, dv, seed, head, key,
            DTYPE, SCALE, THRESHOLD, INVERSE, D, ROWS, COLUMNS_LEFT, BLOCK_D, True,
        )  # fmt: skip
        q_ptr += COLUMNS_LEFT * stride_n
        u_ptr += COLUMNS_LEFT * stride_y
        e_ptr += COLUMNS_LEFT
        delta_ptr += COLUMNS_LEFT
    mask = (key < N)[:, None] & (d < D)[None, :]
    at = rows[:, None] * (3 * stride_y) + d[None, :]
    store_as(g_ptr + stride_y + at, dk * tl.full([1, 1], ROOT, DTYPE), mask)
    store_as(g_ptr + 2 * stride_y + at, dv * tl.full([1, 1], INVERSE, DTYPE), mask)


@triton.jit
def _attention_of_keys_kernel(
    qkv_ptr,  # (B, N, 3, H, D)
    seed_ptr,  # (1,) int64, if THRESHOLD
    u_ptr,  # (B, N, H, D) upstream gradient, contiguous
    e_ptr,  # (B, H, N)
    delta_ptr,  # (B, H, N)
    g_ptr,  # (B, N, 3, H, D), contiguous; its keys and values are written
    stride_b,
    stride_n,
    stride_which,
    stride_h,
    stride_d,
    N,
    H,
    blocks,
    DTYPE: tl.constexpr,
    SCALE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    INVERSE: tl.constexpr,
    ROOT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_LEFT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    image, h, head, row0 = place_of(blocks, H, ROWS)
    seed = tl.load(seed_ptr) if THRESHOLD > 0 else 0
    q_ptr = qkv_ptr + image * stride_b + h * stride_h
    k_ptr = q_ptr + stride_which + row0.to(tl.int64) * stride_n
    v_ptr = k_ptr + stride_which
    u_ptr += (image * N * H + h) * D
    g_ptr += ((image * N + row0) * 3 * H + h) * D
    e_ptr += head.to(tl.int64) * N
    delta_ptr += head.to(tl.int64) * N
    if N - row0 <= ROWS_LEFT:
        keys_rows(
            q_ptr, k_ptr, v_ptr, u_ptr, e_ptr, delta_ptr, g_ptr, seed, head, row0, N,
            stride_n, stride_d, H * D,
            DTYPE, SCALE, THRESHOLD, INVERSE, ROOT, D, ROWS_LEFT, COLUMNS, BLOCK_D,
        )  # fmt: skip
    else:
        keys_rows(
            q_ptr, k_ptr, v_ptr, u_ptr, e_ptr, delta_ptr, g_ptr, seed, head, row0, N,
            stride_n, stride_d, H * D,
            DTYPE, SCALE, THRESHOLD, INVERSE, ROOT, D, ROWS, COLUMNS, BLOCK_D,
        )  # fmt: skip


# --------------------------------------------------------------------------- configurations
def _config(rows: int, columns: int, warps: int) -> Config:
    blocks = {"ROWS": rows, "ROWS_LEFT": 32 if rows > 32 else 16, "COLUMNS": columns}
    return Config(blocks, num_warps=warps)


_Configs = Mapping[int | str, Sequence[Config]]


def _table(
    function: Any, narrow: _Configs, wide: _Configs, precise: _Configs
) -> dict[tuple[bool, bool], Kernel]:
    """Kernels by (16 bits?, more than 64 channels?)."""
    return {
        (True, False): Kernel(function, narrow, matrix=True, register_operands=True),
        (True, True): Kernel(function, wide, matrix=True, register_operands=True),
        (False, False): Kernel(function, precise),
        (False, True): Kernel(function, {"default": (_config(16, 16, 4),)}),
    }


# As many rows as registers hold without spilling on every kind of GPU, dropout or not. float32 goes
# to the ordinary units, with smaller blocks.
FORWARD = _table(
    _attention_kernel,
    {"default": (_config(128, 64, 8), _config(64, 64, 4))},
    {"default": (_config(128, 64, 8), _config(64, 32, 4))},
    {"default": (_config(32, 32, 4),)},
)
QUERIES = _table(
    _attention_of_queries_kernel,
    {"default": (_config(128, 64, 8), _config(64, 64, 4))},
    {"default": (_config(64, 32, 8),)},
    {"default": (_config(32, 32, 4),)},
)
KEYS = _table(
    _attention_of_keys_kernel,
    {"default": (_config(128, 64, 8), _config(64, 32, 4))},
    {"default": (_config(64, 32, 8),)},
    {"default": (_config(32, 16, 4),)},
)


def choose(table: dict[tuple[bool, bool], Kernel], dtype: torch.dtype, channels: int) -> Kernel:
    """The kernel of a table for this type and number of channels."""
    return table[dtype in (torch.float16, torch.bfloat16), channels > 64]
