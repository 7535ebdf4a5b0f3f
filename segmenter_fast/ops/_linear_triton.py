"""Triton kernel of a linear layer with what stands before and after it, and where it serves.

    y = x w^T + bias, where x may be normed first, and after which may come GELU, its gradient, or
    a scale per image and a residual

Used by layer_norm_linear, linear_residual and mlp, whose modules have the mathematics. A program
makes a block of the result. With a norm, it reads its rows once for their mean and deviation, and
norms them again as the product goes along: a few rows fit into the caches.

Loads are ordinary asynchronous copies. The tensor memory accelerator may do better on Hopper, where
it frees threads of computing addresses; that is for a measurement to say, as it takes descriptors
from the host or memory for them at each launch.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from segmenter_fast.ops._triton import (
    Config,
    Kernel,
    accumulator,
    dot,
    launch,
    load_as,
    round_as,
    store_as,
    tl,
    triton,
)
from segmenter_fast.ops.upsample import upcast

PLAIN, GELU, GELU_GRADIENT = 0, 1, 2
"""What follows the product."""

_GELU, _GELU_GRADIENT = tl.constexpr(GELU), tl.constexpr(GELU_GRADIENT)
_ROOT_HALF = tl.constexpr(math.sqrt(0.5))
_DENSITY_AT_0 = tl.constexpr(1.0 / math.sqrt(2.0 * math.pi))
_HALF_LOG2_E = tl.constexpr(0.5 * math.log2(math.e))


@triton.jit
def normal_cdf(x, EXACT: tl.constexpr):
    """Share of a normal distribution below x.

    The polynomial is 1/2 + x P(x^2), and 0 or 1 beyond 4.55. It was fitted by Lawson's iteration
    with its end held there: its largest error is 7.4e-5, of GELU 4.6e-5, which bfloat16 rounds
    away. It takes nine additions and multiplications, the error function sixty.
    """
    if EXACT:
        return 0.5 * (1.0 + tl.erf(x * tl.full([1, 1], _ROOT_HALF, x.dtype)))
    t = tl.minimum(tl.maximum(x, -4.55), 4.55)
    u = t * t
    p = u * 2.7619696460479126e-11 - 3.0803177786253855e-09
    p = p * u + 1.508224585222706e-07
    p = p * u - 4.2954898162861355e-06
    p = p * u + 7.972650928422809e-05
    p = p * u - 0.001026919111609459
    p = p * u + 0.009548480622470379
    p = p * u - 0.06592428684234619
    p = p * u + 0.3986791968345642
    return tl.minimum(tl.maximum(p * t + 0.5, 0.0), 1.0)


@triton.jit
def _linear_kernel(
    x_ptr,  # (M, K), contiguous
    w_ptr,  # (N, K)
    bias_ptr,  # (N,), if BIAS
    gamma_ptr,  # (K,), if NORM
    beta_ptr,  # (K,), if NORM
    extra_ptr,  # (M, N) contiguous: what GELU was taken of, if its gradient; or a residual, if ADD
    scale_ptr,  # (M / tokens,), if SCALE
    y_ptr,  # (M, N)
    z_ptr,  # (M, N), if KEEP: what GELU is taken of; or GELU itself, beside its gradient
    parts_ptr,  # (blocks of M, N) sums of y over rows, beside GELU's gradient
    stride_w_n,
    stride_w_k,
    M,
    N,
    tokens,
    K: tl.constexpr,
    DTYPE: tl.constexpr,
    EPS: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    AFTER: tl.constexpr,
    EXACT: tl.constexpr,
    SCALE: tl.constexpr,
    ADD: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    # GROUP blocks of rows with all columns, then the next: what they read stays in the L2 cache.
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP * blocks_n)
    inside = tl.program_id(0) % (GROUP * blocks_n)
    height = tl.minimum(blocks_m - group * GROUP, GROUP)
    block_m = group * GROUP + inside % height
    block_n = inside // height
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    row0 = block_m.to(tl.int64) * BLOCK_M
    n0 = block_n * BLOCK_N
    row, column = m < M - row0, n < N - n0
    x_ptrs = x_ptr + row0 * K + m[:, None] * K + k[None, :]
    w_ptr += n0.to(tl.int64) * stride_w_n
    w_ptrs = w_ptr + n[:, None] * stride_w_n + k[None, :] * stride_w_k

    if NORM:
        # Block by block, each about its own mean: squares of large numbers would cancel.
        mean = tl.zeros([BLOCK_M], DTYPE)
        squares = tl.zeros([BLOCK_M], DTYPE)
        for k0 in range(0, K, BLOCK_K):
            lanes = k[None, :] < K - k0
            x = load_as(x_ptrs + k0, row[:, None] & lanes, 0.0, DTYPE)
            count = tl.minimum(K - k0, BLOCK_K) * 1.0
            before = k0 * 1.0
            own = tl.sum(x, 1) / count
            centred = tl.where(lanes, x - own[:, None], 0.0)
            step = own - mean
            share = count / (before + count)
            mean += step * share
            squares += tl.sum(centred * centred, 1) + step * step * (before * share)
        r = 1.0 / tl.sqrt(squares / K + tl.full([1], EPS, DTYPE))

    y = tl.zeros([BLOCK_M, BLOCK_N], DTYPE)
    for k0 in range(0, K, BLOCK_K):
        lanes = k[None, :] < K - k0
        w = tl.load(w_ptrs, mask=column[:, None] & lanes, other=0.0)
        if NORM:
            x = load_as(x_ptrs, row[:, None] & lanes, 0.0, DTYPE)
            gamma = load_as(gamma_ptr + k0 + k, k < K - k0, 0.0, DTYPE)[None, :]
            beta = load_as(beta_ptr + k0 + k, k < K - k0, 0.0, DTYPE)[None, :]
            x = round_as((x - mean[:, None]) * r[:, None] * gamma + beta, w.dtype)
        else:
            x = tl.load(x_ptrs, mask=row[:, None] & lanes, other=0.0)
        y = dot(x, tl.trans(w), y)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_w_k

    mask = row[:, None] & column[None, :]
    at = m[:, None] * N + n[None, :]
    own0 = row0 * N + n0
    if BIAS:
        y += load_as(bias_ptr + n0 + n, column, 0.0, DTYPE)[None, :]
    if AFTER == _GELU:
        if KEEP:
            store_as(z_ptr + own0 + at, y, mask)
        y *= normal_cdf(y, EXACT)
    if AFTER == _GELU_GRADIENT:
        z = load_as(extra_ptr + own0 + at, mask, 0.0, DTYPE)
        cdf = normal_cdf(z, EXACT)
        store_as(z_ptr + own0 + at, z * cdf, mask)
        density = tl.exp2(z * z * tl.full([1, 1], -_HALF_LOG2_E, DTYPE))
        y *= cdf + z * density * tl.full([1, 1], _DENSITY_AT_0, DTYPE)
        tl.store(parts_ptr + block_m.to(tl.int64) * N + n0 + n, tl.sum(y, 0), mask=column)
    if SCALE:
        image = (row0 + m) // tokens
        y *= load_as(scale_ptr + image, row, 0.0, DTYPE)[:, None]
    if ADD:
        y += load_as(extra_ptr + own0 + at, mask, 0.0, DTYPE)
    store_as(y_ptr + own0 + at, y, mask)


def _config(m: int, n: int, k: int, warps: int, stages: int) -> Config:
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8}
    return Config(blocks, num_warps=warps, num_stages=stages)


# By whether the operands have 16 bits, and whether there is a norm, which is computed in registers.
_SMALL = _config(64, 64, 32, 4, 3)
_16_BIT = {
    **dict.fromkeys((80, 86, 89), (_config(128, 128, 32, 8, 3), _SMALL)),
    **dict.fromkeys((90, 100), (_config(128, 128, 64, 8, 3), _SMALL)),
    "default": (_SMALL,),
}
_32_BIT = {"default": (_config(32, 32, 16, 4, 2),)}
KERNELS = {
    (True, False): Kernel(_linear_kernel, _16_BIT, matrix=True),
    (True, True): Kernel(_linear_kernel, _16_BIT, matrix=True, register_operands=True),
    (False, False): Kernel(_linear_kernel, _32_BIT),
    (False, True): Kernel(_linear_kernel, _32_BIT),
}


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
    after: int = PLAIN,
    extra: Tensor | None = None,
    scale: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Product of a contiguous (M, K) tensor and an (N, K) weight, with its surroundings.

    Args:
        x: (M, K), of the weight's dtype, or of any with a norm.
        weight: (N, K), any strides.
        bias: (N,).
        norm: weight (K,) and bias (K,) of the layer norm before the product, and its eps.
        after: PLAIN, GELU, or GELU_GRADIENT, which multiplies by GELU's derivative at `extra`.
        extra: (M, N) contiguous; with PLAIN a residual, whose dtype the result takes.
        scale: one factor for each of as many equal groups of rows, before the residual.
        keep: with GELU also return what it is taken of.

    Returns:
        y (M, N); z (M, N), what GELU is taken of, or with GELU_GRADIENT GELU at `extra`; with
        GELU_GRADIENT sums of y over blocks of rows (blocks, N). What was not asked for is empty.
    """
    (rows, k), n = x.shape, weight.shape[0]
    residual = extra is not None and after == PLAIN
    gradient = after == GELU_GRADIENT
    kernel = KERNELS[weight.dtype in (torch.float16, torch.bfloat16), norm is not None]
    config = kernel.config(x)
    blocks_m, blocks_n = -(-rows // config["BLOCK_M"]), -(-n // config["BLOCK_N"])
    dtype = accumulator(weight.dtype)
    y = torch.empty((rows, n), dtype=extra.dtype if residual else weight.dtype, device=x.device)
    z = weight.new_empty((rows, n) if gradient or (keep and after == GELU) else (0,))
    parts = upcast(weight.new_empty(0)).new_empty((blocks_m, n) if gradient else (0,))
    gamma, beta, eps = (weight, weight, 0.0) if norm is None else norm
    launch(
        kernel,
        (blocks_m * blocks_n,),
        config,
        *(x, weight, weight if bias is None else bias.contiguous()),
        *(gamma.contiguous(), beta.contiguous()),
        *(weight if extra is None else extra, weight if scale is None else scale.contiguous()),
        *(y, z, parts, *weight.stride(), rows, n),
        rows if scale is None else rows // max(1, scale.numel()),
        K=k,
        DTYPE=dtype,
        EPS=eps,
        BIAS=bias is not None,
        NORM=norm is not None,
        AFTER=after,
        EXACT=weight.dtype != torch.bfloat16,
        SCALE=scale is not None,
        ADD=residual,
        KEEP=keep,
    )
    return y, z, parts


# --------------------------------------------------------------------------- what is fused where
@dataclass(frozen=True)
class Choice:
    """What an operation does in this kernel; the rest are kernels of their own.

    Args:
        norm: the layer norm before the product; else a Triton kernel writes it out.
        product: the product, with what follows it; else cuBLAS, and PyTorch for what follows.
        reason: "measured", or "by the floors": bytes saved against FLOP, for M rows of D channels
            on an H200 (4.3 TB/s, cuBLAS at 585 TFLOP/s and this kernel at 97 % of that).
    """

    norm: bool
    product: bool
    reason: str


CHOICES: dict[tuple[str, float], Choice] = {
    # A norm apart writes and reads 4 D bytes per token beside the 10 D that qkv cannot do without;
    # in the product it is done again for every block of columns. To 384 channels memory decides.
    ("layer_norm_linear", 384): Choice(True, True, "by the floors"),
    # At 768 the norm is 35 us beside 198, which normed operands in registers would make slower.
    ("layer_norm_linear", math.inf): Choice(False, False, "by the floors"),
    # Apart, the sum would read and write 12 D bytes per token, here 8 D: 66 us beside 90 at 768.
    ("linear_residual", math.inf): Choice(False, True, "by the floors"),
    ("mlp", 384): Choice(True, True, "by the floors"),
    # GELU apart moves 16 D bytes per token: 94 us beside 265 at 768, and again in the gradient.
    ("mlp", math.inf): Choice(False, True, "by the floors"),
}
"""By operation and largest number of channels, for 16-bit operands."""

APART = Choice(False, False, "cuBLAS multiplies float32 faster than a kernel without tensor cores")


def choose(operation: str, channels: int, dtype: torch.dtype) -> Choice:
    """The first entry of CHOICES that holds so many channels; APART for 32 and 64 bits."""
    if dtype not in (torch.float16, torch.bfloat16):
        return APART
    limit = min(most for name, most in CHOICES if name == operation and channels <= most)
    return CHOICES[operation, limit]
