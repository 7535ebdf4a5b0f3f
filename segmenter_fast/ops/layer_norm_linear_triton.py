"""A linear layer of normed tokens on a GPU, forward and backward.

    n = LayerNorm(x)        y = n w^T + b

Forward, `_linear_triton.CHOICES` says whether the norm is part of the product's kernel or one
before it. Nothing but x is kept: n is a pass over memory, and would hold 2 D bytes per token until
the gradient. Backward, from the upstream gradient u,

    dw = u^T n        db = sum u        dn = u w

and dn goes through the norm's gradient. The two products are cuBLAS's, as nothing stands around
them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from segmenter_fast.ops._layer_norm_triton import MOST_CHANNELS, normalise, normalise_gradient
from segmenter_fast.ops._linear_triton import choose, linear
from segmenter_fast.ops._triton import Operation, check_device, matmul
from segmenter_fast.ops.layer_norm_linear import layer_norm_linear_reference
from segmenter_fast.ops.upsample import upcast


@torch.library.custom_op(
    "segmenter_fast::layer_norm_linear_triton", mutates_args=(), device_types=("cpu", "cuda")
)
def _layer_norm_linear_op(
    x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    _check(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    choice = choose("layer_norm_linear", x.shape[-1], weight.dtype)
    norm = (gamma, beta, eps) if choice.norm else None
    if norm is None:
        rows, *_ = normalise(rows, gamma, beta, eps, weight.dtype, keep=False)
    if choice.product:
        y = linear(rows, weight, bias, norm)[0]
    else:
        y = matmul(rows, weight.mT, bias)
    return y.view(*x.shape[:-1], len(weight))


@_layer_norm_linear_op.register_fake
def _(x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return weight.new_empty(*x.shape[:-1], len(weight))


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    check_device(x)
    precise = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not x.is_floating_point() or weight.dtype not in (x.dtype, torch.float16, torch.bfloat16):
        raise TypeError(
            f"for {x.dtype} tokens the weight must be of that dtype or of 16 bits, got "
            f"{weight.dtype}"
        )
    if bias.dtype != weight.dtype or upcast(weight.new_empty(0)).dtype != precise:
        raise TypeError(
            f"tokens, weight and bias do not fit: {x.dtype}, {weight.dtype}, {bias.dtype}"
        )
    if not 0 < x.shape[-1] <= MOST_CHANNELS:
        raise ValueError(
            f"tokens must have 1 to {MOST_CHANNELS} channels with backend 'triton', got "
            f"{x.shape[-1]}"
        )


@torch.library.custom_op(
    "segmenter_fast::layer_norm_linear_triton_backward",
    mutates_args=(),
    device_types=("cpu", "cuda"),
)
def _layer_norm_linear_backward_op(
    upstream: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gamma, beta, weight and bias."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    upstream = upstream.reshape(-1, len(weight))
    normed, mean, r = normalise(rows, gamma, beta, eps, weight.dtype, keep=True)
    of_normed = matmul(upstream, weight)
    dx, of_gamma, of_beta = normalise_gradient(of_normed, rows, mean, r, gamma)
    of_bias = upstream.sum(0, dtype=mean.dtype).to(weight.dtype)
    # Operators may not return two views of one tensor.
    of_norm = of_gamma.clone(), of_beta.clone()
    return dx.view(x.shape), *of_norm, matmul(upstream.mT, normed), of_bias


@_layer_norm_linear_backward_op.register_fake
def _(
    upstream: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        gamma.new_empty(gamma.shape),
        beta.new_empty(beta.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(len(weight)),
    )


def _no_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "layer_norm_linear cannot be differentiated twice in Triton; use backend='reference' for "
        "that"
    )


_layer_norm_linear_backward_op.register_autograd(_no_second_derivative)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, _, eps = inputs
    ctx.save_for_backward(*tensors)
    ctx.eps = eps


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    op = torch.ops.segmenter_fast.layer_norm_linear_triton_backward
    return *op(upstream, *ctx.saved_tensors, ctx.eps), None


_layer_norm_linear_op.register_autograd(_backward, setup_context=_setup_context)


# --------------------------------------------------------------------------- declarations
def _make_inputs(dtype: torch.dtype, batch: int, n: int, width: int) -> dict[str, Any]:
    return {
        "x": (torch.randn(batch, n, width) + torch.randn(batch, n, 1)).to(dtype),
        "gamma": torch.rand(width).add_(0.5).to(dtype),
        "beta": torch.randn(width).to(dtype),
        "weight": (torch.randn(3 * width, width) / width**0.5).to(dtype),
        "bias": torch.randn(3 * width).to(dtype),
        "eps": 1e-6,
    }


def _work(inputs: Mapping[str, Any]) -> tuple[float, float]:
    # Tokens and weight read, result written.
    x, weight = inputs["x"], inputs["weight"]
    y = x.numel() // x.shape[-1] * len(weight) * weight.element_size()
    return 2 * x.numel() * len(weight), x.nbytes + weight.nbytes + y


def _backward_work(inputs: Mapping[str, Any]) -> tuple[float, float]:
    flop, moved = _work(inputs)
    return 2 * flop, moved + inputs["x"].nbytes + inputs["weight"].nbytes


def _declare(name: str, width: int, checks: tuple[dict[str, Any], ...]) -> Operation:
    return Operation(
        name=name,
        make_inputs=_make_inputs,
        run=lambda **inputs: torch.ops.segmenter_fast.layer_norm_linear_triton(*inputs.values()),
        reference=layer_norm_linear_reference,
        case={"batch": 32, "n": 1025, "width": width},
        checks=checks,
        toy={"batch": 1, "n": 3, "width": 24},
        work=_work,
        backward_work=_backward_work,
        matrix=True,
        gradient_of=("x", "gamma", "beta", "weight", "bias"),
    )


# One on each side of the table's limit.
OPERATIONS = (
    _declare("layer_norm_linear_triton", 192, ({"batch": 2, "n": 37, "width": 100},)),
    _declare("layer_norm_linear_768_triton", 768, ({"batch": 1, "n": 130, "width": 400},)),
)
