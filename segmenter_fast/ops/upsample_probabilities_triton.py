"""Softmax over the classes of upsampled patch logits on a GPU, forward and backward.

With u and L of ops/_log_softmax_triton.py, both in base 2, a pixel's probabilities are

    p_k = 2^(u_k - L)

so they can be written out class by class, in any order, once L is known; and they need not be kept
for the gradient. With g the upstream gradient that is

    s = sum_c g_c p_c          dz_k = p_k (g_k - s)

where the first kernel of the backward makes s, one number per pixel, and the second adds dz up for
the four corners of every cell. Beside the result and g, which the caller has asked for, nothing has
the size of z. g is read twice, at any strides.

The largest probability needs no kernel of its own: it is made of two other operators, in
ops/upsample_probabilities.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from segmenter_fast.ops._cell_gradient_triton import empty_corners, gather_corners
from segmenter_fast.ops._log_softmax_triton import log2_softmax, log_sum_exp
from segmenter_fast.ops._probabilities_triton import EXPECTATION, FILL, PROBABILITY_CORNERS
from segmenter_fast.ops._triton import Operation, accumulator, check_device, launch, next_power_of_2
from segmenter_fast.ops._upsampling_triton import check_floating, make_axis
from segmenter_fast.ops.upsample import upcast
from segmenter_fast.ops.upsample_probabilities import upsample_probabilities_reference


# --------------------------------------------------------------------------- forward
@torch.library.custom_op(
    "segmenter_fast::upsample_probabilities_triton",
    mutates_args=(),
    device_types=("cpu", "cuda"),
)
def _upsample_probabilities_op(
    logits: Tensor, size: Sequence[int], crop: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Probabilities (B, K, height, width), and L of each pixel."""
    check_device(logits)
    check_floating(logits)
    batch, n_cls, h, w = logits.shape
    top, left, height, width = crop
    rows = make_axis(h, size[0], top, height)
    u, lowest = log2_softmax(logits)
    lse = log_sum_exp(u, lowest, size, crop)
    p = u.new_empty((batch, n_cls, height, width))
    config = FILL.config(u)
    tiles = -(-width // config["BLOCK_X"])
    launch(
        FILL,
        (batch * rows.cells * tiles, -(-n_cls // config["BLOCK_K"])),
        config,
        *(u, lse, p, n_cls, h, w, *size, top, top + height, left, left + width),
        *(rows.first, rows.cells, tiles),
        DTYPE=accumulator(u.dtype),
    )
    return p, lse


@_upsample_probabilities_op.register_fake
def _(logits: Tensor, size: Sequence[int], crop: Sequence[int]) -> tuple[Tensor, Tensor]:
    batch, n_cls = logits.shape[:2]
    like = upcast(logits)
    return like.new_empty((batch, n_cls, *crop[2:])), like.new_empty((batch, *crop[2:]))


# --------------------------------------------------------------------------- backward
@torch.library.custom_op(
    "segmenter_fast::upsample_probabilities_triton_backward",
    mutates_args=(),
    device_types=("cpu", "cuda"),
)
def _upsample_probabilities_backward_op(
    upstream: Tensor, lse: Tensor, logits: Tensor, size: Sequence[int], crop: Sequence[int]
) -> Tensor:
    batch, n_cls, h, w = logits.shape
    top, left, height, width = crop
    rows, columns = make_axis(h, size[0], top, height), make_axis(w, size[1], left, width)
    u, _ = log2_softmax(logits)
    options = {"DTYPE": accumulator(u.dtype)}
    geometry = (n_cls, h, w, *size, top, top + height, left, left + width, rows.first, rows.cells)

    expectation = torch.empty_like(lse)
    config = EXPECTATION.config(u)
    tiles = -(-width // config["BLOCK_X"])
    launch(
        EXPECTATION,
        (batch * rows.cells * tiles, -(-rows.longest // config["ROWS"])),
        config,
        *(u, lse, upstream, expectation, *upstream.stride(), *geometry, tiles),
        **options,
    )
    corners = empty_corners(u, batch, rows, columns, n_cls)
    config = PROBABILITY_CORNERS.config(u)
    pixels = min(16, next_power_of_2(columns.longest))
    launch(
        PROBABILITY_CORNERS,
        (batch * rows.cells * columns.cells, -(-n_cls // config["BLOCK_K"])),
        config,
        *(u, lse, upstream, expectation, corners, *upstream.stride(), *geometry),
        *(columns.first, columns.cells, -(-columns.longest // pixels)),
        **options,
        PIXELS=pixels,
    )
    gradient = torch.empty_like(logits)
    gather_corners(corners, rows, columns, gradient)
    return gradient


@_upsample_probabilities_backward_op.register_fake
def _(
    upstream: Tensor, lse: Tensor, logits: Tensor, size: Sequence[int], crop: Sequence[int]
) -> Tensor:
    return torch.empty_like(logits)


def _no_second_derivative(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError(
        "upsample_probabilities cannot be differentiated twice; use backend='reference' for that"
    )


_upsample_probabilities_backward_op.register_autograd(_no_second_derivative)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    logits, ctx.size, ctx.crop = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], logits)


def _backward(ctx: Any, upstream: Tensor, _: Tensor | None) -> tuple[Tensor, None, None]:
    op = torch.ops.segmenter_fast.upsample_probabilities_triton_backward
    return op(upstream, *ctx.saved_tensors, ctx.size, ctx.crop), None, None


_upsample_probabilities_op.register_autograd(_backward, setup_context=_setup_context)
_upsample_probabilities_op.register_autocast("cuda", torch.float32)
_upsample_probabilities_op.register_autocast("cpu", torch.float32)


# --------------------------------------------------------------------------- declaration
def _make_inputs(
    dtype: torch.dtype,
    batch: int,
    n_cls: int,
    grid: tuple[int, int],
    size: tuple[int, int],
    crop: tuple[int, int, int, int] | None = None,
) -> dict[str, Any]:
    logits = torch.randn(batch, n_cls, *grid).to(dtype)
    return {"logits": logits, "size": size, "crop": crop or (0, 0, *size)}


def _run(**inputs: Any) -> Tensor:
    return torch.ops.segmenter_fast.upsample_probabilities_triton(*inputs.values())[0]


def _reference(**inputs: Any) -> Tensor:
    return upsample_probabilities_reference(**inputs, top1=False)


def _sizes(inputs: Mapping[str, Any]) -> tuple[int, int]:
    logits, (_, _, height, width) = inputs["logits"], inputs["crop"]
    return logits.shape[0] * logits.shape[1] * height * width, logits.nbytes


def _work(inputs: Mapping[str, Any]) -> tuple[float, float]:
    # A multiply-add per pixel and class; every probability written once.
    elements, grid = _sizes(inputs)
    return 2 * elements, grid + 4 * elements


def _backward_work(inputs: Mapping[str, Any]) -> tuple[float, float]:
    # Two multiply-adds for s and two for dz; the upstream gradient read once.
    elements, grid = _sizes(inputs)
    return 8 * elements, 2 * grid + 4 * elements


OPERATION = Operation(
    name="upsample_probabilities_triton",
    make_inputs=_make_inputs,
    run=_run,
    reference=_reference,
    case={"batch": 4, "n_cls": 150, "grid": (32, 32), "size": (512, 512)},
    checks=(
        {"batch": 2, "n_cls": 19, "grid": (7, 5), "size": (113, 67), "crop": (3, 5, 101, 53)},
        {"batch": 1, "n_cls": 37, "grid": (3, 4), "size": (31, 29)},
    ),
    toy={"batch": 1, "n_cls": 7, "grid": (2, 2), "size": (5, 6)},
    work=_work,
    backward_work=_backward_work,
)
