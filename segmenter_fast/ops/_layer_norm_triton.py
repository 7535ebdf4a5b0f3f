"""Triton kernels of the layer norm over channels, and how they are launched.

Notation and mathematics: ops/layer_norm_triton.py. A program holds whole rows, so the mean is known
before the squares are summed and nothing cancels. Used by every operation that begins with a norm.
"""

import torch
from torch import Tensor

from segmenter_fast.ops._triton import (
    Config,
    Kernel,
    accumulator,
    launch,
    load_as,
    next_power_of_2,
    store_as,
    tl,
    triton,
)
from segmenter_fast.ops.upsample import upcast

MOST_CHANNELS = 16384
"""What a program's block holds."""

PARTS = 256
"""Programs of the gradient, each with a part of the parameters' sums: two per multiprocessor."""


@triton.jit
def _layer_norm_kernel(
    x_ptr,  # (M, D), contiguous
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    y_ptr,  # (M, D)
    mean_ptr,  # (M,), if KEEP
    r_ptr,  # (M,), if KEEP
    M,
    D,
    DTYPE: tl.constexpr,
    EPS: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    mask = (row < M)[:, None] & (d < D)[None, :]
    at = row[:, None] * D + d[None, :]
    x = load_as(x_ptr + at, mask, 0.0, DTYPE)
    mean = tl.sum(x, 1) / D
    centred = tl.where(mask, x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / D
    r = 1.0 / tl.sqrt(variance + tl.full([1], EPS, DTYPE))
    weight = load_as(weight_ptr + d, d < D, 0.0, DTYPE)[None, :]
    bias = load_as(bias_ptr + d, d < D, 0.0, DTYPE)[None, :]
    store_as(y_ptr + at, centred * r[:, None] * weight + bias, mask)
    if KEEP:
        tl.store(mean_ptr + row, mean, mask=row < M)
        tl.store(r_ptr + row, r, mask=row < M)


@triton.jit
def _layer_norm_gradient_kernel(
    upstream_ptr,  # (M, D), contiguous
    x_ptr,  # (M, D), contiguous
    mean_ptr,  # (M,)
    r_ptr,  # (M,)
    weight_ptr,  # (D,)
    skip_ptr,  # (M, D), if ADD: what else reaches x
    dx_ptr,  # (M, D)
    parts_ptr,  # (programs, 2, D) sums for weight and bias
    M,
    D,
    blocks,
    DTYPE: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    d = tl.arange(0, BLOCK_D)
    weight = load_as(weight_ptr + d, d < D, 0.0, DTYPE)[None, :]
    of_weight = tl.zeros([BLOCK_D], DTYPE)
    of_bias = tl.zeros([BLOCK_D], DTYPE)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        row = block * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (row < M)[:, None] & (d < D)[None, :]
        at = row[:, None] * D + d[None, :]
        u = load_as(upstream_ptr + at, mask, 0.0, DTYPE)
        mean = load_as(mean_ptr + row, row < M, 0.0, DTYPE)[:, None]
        r = load_as(r_ptr + row, row < M, 0.0, DTYPE)[:, None]
        normed = tl.where(mask, (load_as(x_ptr + at, mask, 0.0, DTYPE) - mean) * r, 0.0)
        of_weight += tl.sum(u * normed, 0)
        of_bias += tl.sum(u, 0)
        ug = u * weight
        along = tl.sum(ug * normed, 1)[:, None] / D
        dx = r * (ug - tl.sum(ug, 1)[:, None] / D - normed * along)
        if ADD:
            dx += load_as(skip_ptr + at, mask, 0.0, DTYPE)
        store_as(dx_ptr + at, dx, mask)
    part = parts_ptr + tl.program_id(0).to(tl.int64) * 2 * D + d
    tl.store(part, of_weight, mask=d < D)
    tl.store(part + D, of_bias, mask=d < D)


FORWARD = Kernel(_layer_norm_kernel, {"default": (Config(num_warps=4), Config(num_warps=8))})
GRADIENT = Kernel(_layer_norm_gradient_kernel, {"default": (Config(num_warps=8),)})


def _blocks(channels: int, elements: int) -> dict[str, int]:
    block_d = next_power_of_2(channels)
    return {"BLOCK_M": max(1, elements // block_d), "BLOCK_D": block_d}


def normalise(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm of the rows of a contiguous (M, D) tensor, as `dtype`.

    Returns:
        The result, mean (M,) and 1 / deviation (M,); the latter two are empty unless kept.
    """
    rows, channels = x.shape
    y = x.new_empty(x.shape, dtype=dtype)
    mean, r = (upcast(x.new_empty(0)).new_empty(rows * keep) for _ in range(2))
    blocks = _blocks(channels, 2048)
    launch(
        FORWARD,
        (-(-rows // blocks["BLOCK_M"]),),
        FORWARD.config(x),
        *(x, weight.contiguous(), bias.contiguous(), y, mean, r, rows, channels),
        DTYPE=accumulator(x.dtype),
        EPS=eps,
        KEEP=keep,
        **blocks,
    )
    return y, mean, r


def normalise_gradient(
    upstream: Tensor,
    x: Tensor,
    mean: Tensor,
    r: Tensor,
    weight: Tensor,
    skip: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, to which `skip` is added, and of weight and bias.

    Args:
        upstream, x: (M, D) contiguous.
        mean, r: as `normalise` kept them.
        weight: (D,).
        skip: (M, D) contiguous, what reaches x on other ways.
    """
    rows, channels = x.shape
    dx = torch.empty_like(x)
    blocks = _blocks(channels, 4096)
    number = -(-rows // blocks["BLOCK_M"])
    parts = mean.new_zeros(min(PARTS, number), 2, channels)
    launch(
        GRADIENT,
        (parts.shape[0],),
        GRADIENT.config(x),
        *(upstream, x, mean, r, weight.contiguous(), upstream if skip is None else skip),
        *(dx, parts, rows, channels, number),
        DTYPE=accumulator(x.dtype),
        ADD=skip is not None,
        **blocks,
    )
    # In a fixed order, so every run gives the same bits.
    of_weight, of_bias = parts.sum(0).to(weight.dtype)
    return dx, of_weight, of_bias
