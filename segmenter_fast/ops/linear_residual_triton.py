"""A linear layer added to the stream of tokens on a GPU, forward and backward.

    y = x + s (v w^T + b)

The sum is the epilogue of the product. With u the upstream gradient and u' = s u, rounded to the
weight's type,

    dx = u        dv = u' w        dw = u'^T v        db = sum u'
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from segmenter_fast.ops._linear_triton import choose, linear
from segmenter_fast.ops._triton import Operation, check_device, matmul
from segmenter_fast.ops.linear_residual import linear_residual_reference
from segmenter_fast.ops.upsample import upcast


@torch.library.custom_op(
    "segmenter_fast::linear_residual_triton", mutates_args=(), device_types=("cpu", "cuda")
)
def _linear_residual_op(
    v: Tensor, weight: Tensor, bias: Tensor, x: Tensor, scale: Tensor | None
) -> Tensor:
    _check(v, weight, bias, x)
    rows, stream = (t.reshape(-1, t.shape[-1]).contiguous() for t in (v, x))
    if choose("linear_residual", v.shape[-1], weight.dtype).product:
        return linear(rows, weight, bias, extra=stream, scale=scale)[0].view(x.shape)
    branch = matmul(rows, weight.mT, bias).view(x.shape)
    y = x + branch if scale is None else x + branch * scale[:, None, None].to(branch)
    return y.contiguous()


@_linear_residual_op.register_fake
def _(v: Tensor, weight: Tensor, bias: Tensor, x: Tensor, scale: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def _check(v: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> None:
    check_device(x)
    if not (v.is_floating_point() and v.dtype == weight.dtype == bias.dtype):
        raise TypeError(
            "v, weight and bias must have one floating-point dtype, got "
            f"{v.dtype}, {weight.dtype} and {bias.dtype}"
        )
    if x.dtype not in (v.dtype, upcast(v.new_empty(0)).dtype):
        raise TypeError(f"x must be {v.dtype} as v, or float32 beside 16 bits; got {x.dtype}")


def scaled(upstream: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The upstream gradient (B, N, D) of a branch, as rows (B N, D)."""
    if scale is not None:
        upstream = upstream * scale[:, None, None].to(upstream)
    return upstream.to(dtype).reshape(-1, upstream.shape[-1])


@torch.library.custom_op(
    "segmenter_fast::linear_residual_triton_backward",
    mutates_args=(),
    device_types=("cpu", "cuda"),
)
def _linear_residual_backward_op(
    upstream: Tensor, v: Tensor, weight: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of v, weight and bias."""
    branch = scaled(upstream, scale, weight.dtype)
    of_bias = branch.sum(0, dtype=upcast(weight.new_empty(0)).dtype).to(weight.dtype)
    of_weight = matmul(branch.mT, v.reshape(-1, v.shape[-1]))
    return matmul(branch, weight).view(v.shape), of_weight, of_bias


@_linear_residual_backward_op.register_fake
def _(
    upstream: Tensor, v: Tensor, weight: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return v.new_empty(v.shape), weight.new_empty(weight.shape), weight.new_empty(len(weight))


def _no_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "linear_residual cannot be differentiated twice in Triton; use backend='reference' for that"
    )


_linear_residual_backward_op.register_autograd(_no_second_derivative)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    v, weight, _, _, scale = inputs
    ctx.save_for_backward(v, weight, scale)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    op = torch.ops.segmenter_fast.linear_residual_triton_backward
    return *op(upstream, *ctx.saved_tensors), upstream, None


_linear_residual_op.register_autograd(_backward, setup_context=_setup_context)


# --------------------------------------------------------------------------- declaration
def _make_inputs(dtype: torch.dtype, batch: int, n: int, width: int) -> dict[str, Any]:
    return {
        "v": torch.randn(batch, n, width).to(dtype),
        "weight": (torch.randn(width, width) / width**0.5).to(dtype),
        "bias": torch.randn(width).to(dtype),
        "x": torch.randn(batch, n, width).to(dtype),
        "scale": torch.rand(batch).to(dtype),
    }


def _work(inputs: Mapping[str, Any]) -> tuple[float, float]:
    v, weight, x = inputs["v"], inputs["weight"], inputs["x"]
    return 2 * v.numel() * len(weight), v.nbytes + weight.nbytes + 2 * x.nbytes


def _backward_work(inputs: Mapping[str, Any]) -> tuple[float, float]:
    v, weight, x = inputs["v"], inputs["weight"], inputs["x"]
    return 4 * v.numel() * len(weight), x.nbytes + 2 * v.nbytes + 2 * weight.nbytes


OPERATION = Operation(
    name="linear_residual_triton",
    make_inputs=_make_inputs,
    run=lambda **inputs: torch.ops.segmenter_fast.linear_residual_triton(*inputs.values()),
    reference=linear_residual_reference,
    case={"batch": 32, "n": 1025, "width": 768},
    checks=({"batch": 2, "n": 37, "width": 100},),
    toy={"batch": 1, "n": 3, "width": 24},
    work=_work,
    backward_work=_backward_work,
    matrix=True,
    gradient_of=("v", "weight", "bias", "x"),
)
