"""Layer norm on a GPU, forward and backward.

With m the mean of a row, r = 1 / sqrt(var + eps), g = weight and x' = (x - m) r

    y = g x' + bias

m and r are kept for the gradient. From the upstream gradient u, with means over the channels,

    dx = r (u g - mean(u g) - x' mean(u g x'))        dg = sum u x'        dbias = sum u

A norm can change neither the mean nor the length of x', so those parts of u g are taken out. Sums
over rows are left per program, and added up in a fixed order.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from segmenter_fast.ops._layer_norm_triton import MOST_CHANNELS, normalise, normalise_gradient
from segmenter_fast.ops._triton import Operation, check_device
from segmenter_fast.ops.layer_norm import layer_norm_reference
from segmenter_fast.ops.upsample import upcast


@torch.library.custom_op(
    "segmenter_fast::layer_norm_triton", mutates_args=(), device_types=("cpu", "cuda")
)
def _layer_norm_op(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm y; mean and r, (rows,), which are empty without `with_gradient`."""
    _check(x)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y, mean, r = normalise(rows, weight, bias, eps, x.dtype, with_gradient)
    return y.view(x.shape), mean, r


@_layer_norm_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    kept = upcast(x.new_empty(0)).new_empty(x.numel() // x.shape[-1] if with_gradient else 0)
    return x.new_empty(x.shape), kept, torch.empty_like(kept)


def _check(x: Tensor) -> None:
    check_device(x)
    allowed = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if x.dtype not in allowed:
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if not 0 < x.shape[-1] <= MOST_CHANNELS:
        raise ValueError(
            f"rows must have 1 to {MOST_CHANNELS} channels with backend 'triton', got {x.shape[-1]}"
        )


@torch.library.custom_op(
    "segmenter_fast::layer_norm_triton_backward", mutates_args=(), device_types=("cpu", "cuda")
)
def _layer_norm_backward_op(
    upstream: Tensor, x: Tensor, mean: Tensor, r: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    upstream, rows = (t.reshape(-1, x.shape[-1]).contiguous() for t in (upstream, x))
    dx, of_weight, of_bias = normalise_gradient(upstream, rows, mean, r, weight)
    # Operators may not return two views of one tensor.
    return dx.view(x.shape), of_weight.clone(), of_bias.clone()


@_layer_norm_backward_op.register_fake
def _(
    upstream: Tensor, x: Tensor, mean: Tensor, r: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _no_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "layer_norm cannot be differentiated twice in Triton; use backend='reference' for that"
    )


_layer_norm_backward_op.register_autograd(_no_second_derivative)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, weight, _, _, with_gradient = inputs
    if not with_gradient:
        raise RuntimeError(
            "an input requires a gradient: call the operator with with_gradient=True"
        )
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, *output[1:], weight)


def _backward(
    ctx: Any, upstream: Tensor, *unused: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, None, None]:
    op = torch.ops.segmenter_fast.layer_norm_triton_backward
    return *op(upstream, *ctx.saved_tensors), None, None


_layer_norm_op.register_autograd(_backward, setup_context=_setup_context)


# --------------------------------------------------------------------------- declaration
def _make_inputs(dtype: torch.dtype, rows: int, width: int) -> dict[str, Any]:
    return {
        "x": (torch.randn(rows, width) + torch.randn(rows, 1)).to(dtype),
        "weight": torch.rand(width).add_(0.5).to(dtype),
        "bias": torch.randn(width).to(dtype),
        "eps": 1e-6,
    }


def _run(**inputs: Any) -> Tensor:
    with_gradient = any(x.requires_grad for x in inputs.values() if isinstance(x, Tensor))
    return torch.ops.segmenter_fast.layer_norm_triton(*inputs.values(), with_gradient)[0]


def _work(inputs: Mapping[str, Any]) -> tuple[float, float]:
    # Sum, square, sum, and two for the result.
    return 5 * inputs["x"].numel(), 2 * inputs["x"].nbytes


def _backward_work(inputs: Mapping[str, Any]) -> tuple[float, float]:
    return 11 * inputs["x"].numel(), 3 * inputs["x"].nbytes


OPERATION = Operation(
    name="layer_norm_triton",
    make_inputs=_make_inputs,
    run=_run,
    reference=layer_norm_reference,
    case={"rows": 32 * 1025, "width": 768},
    checks=({"rows": 37, "width": 192}, {"rows": 1500, "width": 100}),
    toy={"rows": 3, "width": 24},
    work=_work,
    backward_work=_backward_work,
    gradient_of=("x", "weight", "bias"),
)
