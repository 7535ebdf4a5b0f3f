"""Softmax over classes of bilinearly upsampled patch logits, or its largest entry.

    p_k(Y, X) = exp(z_k) / sum_c exp(z_c)          z as in ops/upsample.py
    top1(Y, X) = max_k p_k

Backward, with U the upsampling of one class (U^T its adjoint) and g the upstream gradient:

    dz_k = p_k (g_k - sum_c g_c p_c)               all classes
    dz_k = g top1 (m_k - p_k)                      top1: m_k = 1 / n for the n classes that tie for
                                                   the largest, 0 for the others
    dl_k = U^T dz_k

The native kernel never stores z: see csrc/cpu/upsample_probabilities_kernel.cpp. The gradient of
all classes has an upstream gradient of their size to read anyway, so it is plain PyTorch on tensors
of that size, and may be differentiated again. The gradient of top1 recomputes the probabilities by
strips of rows, in bounded memory, and may not. Where an upstream gradient or a probability is NaN,
patches that the pixel does not read may become NaN too.

Special values are PyTorch's: where a pixel reads a NaN or +inf, or only -inf, or -inf with weight 0
(0 inf = NaN), all its probabilities are NaN; otherwise -inf has probability 0.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from segmenter_fast.backend import native_module, resolve_backend
from segmenter_fast.ops.upsample import (
    check_geometry,
    native_upsampling,
    upcast,
    upsample_reference,
)

STRIP_ELEMENTS = 1 << 21
"""Upsampled logits that the gradient of top1 holds at once, several times over (8 MiB each)."""


def upsample_probabilities_reference(
    logits: Tensor, size: tuple[int, int], crop: tuple[int, int, int, int], top1: bool
) -> Tensor:
    """The definition: (B, K, height, width), or (B, height, width) with `top1`."""
    probabilities = upsample_reference(logits, size, crop).softmax(dim=1)
    return probabilities.amax(dim=1) if top1 else probabilities


# ------------------------------------------------------------------------------------- U^T
def _weights(grid: int, full: int, start: int, count: int, dtype: torch.dtype) -> Tensor:
    """(count, grid) weights of one axis, so that U l = rows @ l @ columns.T."""
    position = torch.arange(start, start + count, dtype=dtype)
    source = (torch.tensor(grid, dtype=dtype) / full * (position + 0.5) - 0.5).clamp(min=0)
    i = source.long().clamp(max=grid - 1)
    a = (source - i).unsqueeze(1)
    weights = torch.zeros(count, grid, dtype=dtype).scatter_(1, i.unsqueeze(1), 1 - a)
    return weights.scatter_add_(1, (i + 1).clamp(max=grid - 1).unsqueeze(1), a)


# Matrix products are several times quicker than PyTorch's upsample_bilinear2d_backward, which
# besides cannot be traced with dynamic shapes.
@torch.library.custom_op("segmenter_fast::upsample_adjoint", mutates_args=(), device_types="cpu")
def _upsample_adjoint_op(
    gradient: Tensor, size: Sequence[int], crop: Sequence[int], shape: Sequence[int]
) -> Tensor:
    (grid_h, grid_w), (top, left, height, width) = shape[2:], crop
    rows = _weights(grid_h, size[0], top, height, gradient.dtype)
    columns = _weights(grid_w, size[1], left, width, gradient.dtype)
    narrow = gradient.new_zeros((*shape[:2], height, grid_w))
    # A column of pixels has weights for two patches. Blocks keep the products from growing with
    # the width of the grid.
    block = max(64, 64 * size[1] // grid_w)
    for start in range(0, width, block):
        part = columns[start : start + block]
        read = part.any(dim=0).nonzero()
        first, last = int(read[0]), int(read[-1]) + 1
        narrow[..., first:last] += gradient[..., start : start + block] @ part[:, first:last]
    return rows.T @ narrow


@_upsample_adjoint_op.register_fake
def _(gradient: Tensor, size: Sequence[int], crop: Sequence[int], shape: Sequence[int]) -> Tensor:
    return gradient.new_empty(shape)


def _save_geometry(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, ctx.size, ctx.crop, _ = inputs


def _adjoint_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    return upsample_reference(gradient, ctx.size, ctx.crop), None, None, None


_upsample_adjoint_op.register_autograd(_adjoint_backward, setup_context=_save_geometry)


# ------------------------------------------------------------------------------------- all classes
def _native(logits: Tensor, size: Sequence[int], crop: Sequence[int], top1: bool) -> Tensor:
    logits = upcast(logits)
    batch, n_cls = logits.shape[:2]
    out = logits.new_empty((batch, *crop[2:]) if top1 else (batch, n_cls, *crop[2:]))
    native_module().upsample_probabilities(
        native_upsampling(logits, size, crop), out.data_ptr(), top1
    )
    return out


@torch.library.custom_op(
    "segmenter_fast::upsample_probabilities", mutates_args=(), device_types="cpu"
)
def _upsample_probabilities_op(logits: Tensor, size: Sequence[int], crop: Sequence[int]) -> Tensor:
    return _native(logits, size, crop, top1=False)


@_upsample_probabilities_op.register_fake
def _(logits: Tensor, size: Sequence[int], crop: Sequence[int]) -> Tensor:
    return upcast(logits).new_empty((*logits.shape[:2], *crop[2:]))


def _save_probabilities(ctx: Any, inputs: tuple, output: Tensor) -> None:
    logits, ctx.size, ctx.crop = inputs
    ctx.shape, ctx.dtype = logits.shape, logits.dtype
    ctx.save_for_backward(output)


def _probabilities_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    (p,) = ctx.saved_tensors
    # dz_k = p_k (g_k - sum_c g_c p_c)
    dz = torch.ops.aten._softmax_backward_data(gradient, p, 1, p.dtype)
    adjoint = torch.ops.segmenter_fast.upsample_adjoint
    return adjoint(dz, ctx.size, ctx.crop, ctx.shape).to(ctx.dtype), None, None


_upsample_probabilities_op.register_autograd(
    _probabilities_backward, setup_context=_save_probabilities
)
_upsample_probabilities_op.register_autocast("cpu", torch.float32)


# ------------------------------------------------------------------------------------- top1
@torch.library.custom_op("segmenter_fast::upsample_top1", mutates_args=(), device_types="cpu")
def _upsample_top1_op(logits: Tensor, size: Sequence[int], crop: Sequence[int]) -> Tensor:
    return _native(logits, size, crop, top1=True)


@_upsample_top1_op.register_fake
def _(logits: Tensor, size: Sequence[int], crop: Sequence[int]) -> Tensor:
    return upcast(logits).new_empty((logits.shape[0], *crop[2:]))


@torch.library.custom_op(
    "segmenter_fast::upsample_top1_backward", mutates_args=(), device_types="cpu"
)
def _upsample_top1_backward_op(
    gradient: Tensor, logits: Tensor, size: Sequence[int], crop: Sequence[int]
) -> Tensor:
    dtype, logits = logits.dtype, upcast(logits)
    top, left, height, width = crop
    dl = logits.new_zeros(logits.shape)
    step = max(1, STRIP_ELEMENTS // (logits.shape[1] * width))
    for image in range(len(logits)):
        one = logits[image : image + 1]
        for start in range(0, height, step):
            g = gradient[image, start : start + step]
            strip = (top + start, left, len(g), width)
            p = _native(one, size, strip, top1=False)
            largest = p.amax(dim=1, keepdim=True)
            share = (p == largest).to(p.dtype)
            share /= share.sum(dim=1, keepdim=True)
            dz = share.sub_(p).mul_(largest * g)
            dl[image] += torch.ops.segmenter_fast.upsample_adjoint(dz, size, strip, one.shape)[0]
    return dl.to(dtype)


@_upsample_top1_backward_op.register_fake
def _(gradient: Tensor, logits: Tensor, size: Sequence[int], crop: Sequence[int]) -> Tensor:
    return logits.new_empty(logits.shape)


def _save_logits(ctx: Any, inputs: tuple, output: Tensor) -> None:
    logits, ctx.size, ctx.crop = inputs
    ctx.save_for_backward(logits)


def _top1_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    (logits,) = ctx.saved_tensors
    op = torch.ops.segmenter_fast.upsample_top1_backward
    return op(gradient, logits, ctx.size, ctx.crop), None, None


_upsample_top1_op.register_autograd(_top1_backward, setup_context=_save_logits)
_upsample_top1_op.register_autocast("cpu", torch.float32)


def _top1_triton(logits: Tensor, size: tuple[int, int], crop: tuple[int, int, int, int]) -> Tensor:
    # exp(-cross-entropy) with the pixel's own label t, and so is its gradient, -p_t times that of
    # the cross-entropy. Where classes tie, the first one takes it whole.
    ops = torch.ops.segmenter_fast
    labels = ops.upsample_argmax_triton(logits.detach(), size, crop)
    losses, _, _ = ops.upsample_cross_entropy_triton(
        logits, labels, None, size, crop, 0.0, -1, "none"
    )
    # Rounding may leave a loss just below 0.
    return losses.clamp(min=0).neg().exp()


def upsample_probabilities(
    logits: Tensor,
    size: tuple[int, int],
    crop: tuple[int, int, int, int] | None = None,
    top1: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Softmax over the classes of the bilinearly upsampled logits.

    Args:
        logits, size, crop, backend: as for `upsample_logits`.
        top1: only the largest probability of each pixel; the kernels and their gradients then need
            memory for a few rows of logits at most, the reference for all of them.

    Returns:
        (B, K, height, width), or (B, height, width) with `top1`; float32, or float64 for float64
        logits; differentiable (the native top1 and Triton once; where classes tie, Triton's top1
        gives the first one the whole gradient). A pixel that reads a NaN or +inf is NaN, and -inf
        has probability 0, as in `interpolate` and `softmax`.

    Raises:
        ValueError: wrong rank, a size that is not positive, a crop outside it.
        TypeError: logits that are not floating point.
        BackendError: the backend named cannot run here.

    Source: official segm/model/utils.py (softmax after interpolation).
    """
    geometry = check_geometry(logits, size, crop)
    backend = resolve_backend(backend, logits.device)
    if backend == "reference":
        return upsample_probabilities_reference(logits, *geometry, top1)
    if backend == "triton":
        if top1:
            return _top1_triton(logits, *geometry)
        return torch.ops.segmenter_fast.upsample_probabilities_triton(logits, *geometry)[0]
    if top1:
        return torch.ops.segmenter_fast.upsample_top1(logits, *geometry)
    return torch.ops.segmenter_fast.upsample_probabilities(logits, *geometry)
