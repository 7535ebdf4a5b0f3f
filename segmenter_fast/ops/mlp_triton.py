"""The two linear layers of a transformer block on a GPU, forward and backward.

    n = LayerNorm(x)        z = n w1^T + b1        h = GELU(z)        y = x + s (h w2^T + b2)

Forward in two products: the first with the norm before it (where `_linear_triton.CHOICES` says so)
and GELU after it, the second with scale and sum after it. For the gradient z is kept, 2 F bytes
per token; n and h come back by a pass over memory each, which is cheaper than to hold them. From
the upstream gradient u, and u' = s u rounded to the weights' type,

    dw2 = u'^T h       db2 = sum u'       dz = (u' w2) GELU'(z)       GELU'(z) = Phi(z) + z phi(z)
    dw1 = dz^T n       db1 = sum dz       dn = dz w1                  dx = u + the norm's gradient

One kernel makes dz, h and the parts of db1: GELU' and GELU are the epilogue of the product. The
other three products are cuBLAS's, as nothing stands around them.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segmenter_fast.ops._layer_norm_triton import MOST_CHANNELS, normalise, normalise_gradient
from segmenter_fast.ops._linear_triton import GELU, GELU_GRADIENT, choose, linear
from segmenter_fast.ops._triton import Operation, check_device, matmul
from segmenter_fast.ops.linear_residual_triton import scaled
from segmenter_fast.ops.mlp import mlp_reference
from segmenter_fast.ops.upsample import upcast


@torch.library.custom_op(
    "segmenter_fast::mlp_triton", mutates_args=(), device_types=("cpu", "cuda")
)
def _mlp_op(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    eps: float,
    scale: Tensor | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """The stream y, and z (B N, F), which is empty without `with_gradient`."""
    _check(x, w1, b1, w2, b2)
    stream = x.reshape(-1, x.shape[-1]).contiguous()
    choice = choose("mlp", x.shape[-1], w1.dtype)
    norm = (gamma, beta, eps) if choice.norm else None
    rows = stream if norm else normalise(stream, gamma, beta, eps, w1.dtype, keep=False)[0]
    if choice.product:
        h, z, _ = linear(rows, w1, b1, norm, after=GELU, keep=with_gradient)
        y = linear(h, w2, b2, extra=stream, scale=scale)[0]
        return y.view(x.shape), z
    z = matmul(rows, w1.mT, b1)
    branch = matmul(F.gelu(z), w2.mT, b2).view(x.shape)
    if scale is not None:
        branch *= scale[:, None, None].to(branch)
    return (x + branch).contiguous(), z if with_gradient else z.new_empty(0)


@_mlp_op.register_fake
def _(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    eps: float,
    scale: Tensor | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    return x.new_empty(x.shape), w1.new_empty((rows, len(w1)) if with_gradient else (0,))


def _check(x: Tensor, *weights: Tensor) -> None:
    check_device(x)
    dtypes = {t.dtype for t in weights}
    dtype = weights[0].dtype
    if len(dtypes) > 1 or not dtype.is_floating_point:
        raise TypeError(
            "w1, b1, w2 and b2 must have one floating-point dtype, got "
            + ", ".join(str(t.dtype) for t in weights)
        )
    if x.dtype not in (dtype, upcast(weights[0].new_empty(0)).dtype):
        raise TypeError(f"x must be {dtype} as w1, or float32 beside 16 bits; got {x.dtype}")
    if not 0 < x.shape[-1] <= MOST_CHANNELS:
        raise ValueError(
            f"tokens must have 1 to {MOST_CHANNELS} channels with backend 'triton', got "
            f"{x.shape[-1]}"
        )


@torch.library.custom_op(
    "segmenter_fast::mlp_triton_backward", mutates_args=(), device_types=("cpu", "cuda")
)
def _mlp_backward_op(
    upstream: Tensor,
    x: Tensor,
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    w1: Tensor,
    w2: Tensor,
    eps: float,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gamma, beta, w1, b1, w2 and b2."""
    precise = upcast(w1.new_empty(0)).dtype
    branch = scaled(upstream, scale, w1.dtype)
    of_b2 = branch.sum(0, dtype=precise).to(w2.dtype)
    if choose("mlp", x.shape[-1], w1.dtype).product:
        dz, h, parts = linear(branch.contiguous(), w2.mT, after=GELU_GRADIENT, extra=z)
        of_b1 = parts.sum(0)
    else:
        h, dz = F.gelu(z), torch.ops.aten.gelu_backward(matmul(branch, w2), z)
        of_b1 = dz.sum(0, dtype=precise)
    of_w2 = matmul(branch.mT, h)
    del h, branch
    rows, skip = (t.reshape(-1, x.shape[-1]).contiguous() for t in (x, upstream))
    normed, mean, r = normalise(rows, gamma, beta, eps, w1.dtype, keep=True)
    of_w1 = matmul(dz.mT, normed)
    del normed
    dx, of_gamma, of_beta = normalise_gradient(matmul(dz, w1), rows, mean, r, gamma, skip)
    # Operators may not return two views of one tensor.
    of_norm = of_gamma.clone(), of_beta.clone()
    return dx.view(x.shape), *of_norm, of_w1, of_b1.to(w1.dtype), of_w2, of_b2


@_mlp_backward_op.register_fake
def _(
    upstream: Tensor,
    x: Tensor,
    z: Tensor,
    gamma: Tensor,
    beta: Tensor,
    w1: Tensor,
    w2: Tensor,
    eps: float,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        gamma.new_empty(gamma.shape),
        beta.new_empty(beta.shape),
        w1.new_empty(w1.shape),
        w1.new_empty(len(w1)),
        w2.new_empty(w2.shape),
        w2.new_empty(len(w2)),
    )


def _no_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "mlp cannot be differentiated twice in Triton; use backend='reference' for that"
    )


_mlp_backward_op.register_autograd(_no_second_derivative)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, gamma, beta, w1, _, w2, _, eps, scale, with_gradient = inputs
    if not with_gradient:
        raise RuntimeError(
            "an input requires a gradient: call the operator with with_gradient=True"
        )
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], gamma, beta, w1, w2, scale)
    ctx.eps = eps


def _backward(ctx: Any, upstream: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, scale = ctx.saved_tensors
    op = torch.ops.segmenter_fast.mlp_triton_backward
    return *op(upstream, *tensors, ctx.eps, scale), None, None, None


_mlp_op.register_autograd(_backward, setup_context=_setup_context)


# --------------------------------------------------------------------------- declarations
def _make_inputs(
    dtype: torch.dtype, batch: int, n: int, width: int, scale: bool = False
) -> dict[str, Any]:
    hidden = 4 * width
    inputs = {
        "x": torch.randn(batch, n, width),
        "gamma": torch.rand(width).add_(0.5),
        "beta": torch.randn(width),
        "w1": torch.randn(hidden, width) / width**0.5,
        "b1": torch.randn(hidden),
        "w2": torch.randn(width, hidden) / hidden**0.5,
        "b2": torch.randn(width),
    }
    inputs = {name: value.to(dtype) for name, value in inputs.items()}
    return {**inputs, "eps": 1e-6, "scale": torch.rand(batch).to(dtype) if scale else None}


def _run(**inputs: Any) -> Tensor:
    with_gradient = any(t.requires_grad for t in inputs.values() if isinstance(t, Tensor))
    return torch.ops.segmenter_fast.mlp_triton(*inputs.values(), with_gradient)[0]


def _work(inputs: Mapping[str, Any]) -> tuple[float, float]:
    # Tokens read and written, weights read; the hidden layer need not leave the chip.
    x, w1 = inputs["x"], inputs["w1"]
    return 4 * x.numel() * len(w1), 2 * x.nbytes + 2 * w1.nbytes


def _backward_work(inputs: Mapping[str, Any]) -> tuple[float, float]:
    # Four products more, and z read.
    x, w1 = inputs["x"], inputs["w1"]
    z = x.numel() // x.shape[-1] * len(w1) * w1.element_size()
    return 8 * x.numel() * len(w1), 3 * x.nbytes + z + 4 * w1.nbytes


def _declare(name: str, width: int, checks: tuple[dict[str, Any], ...]) -> Operation:
    return Operation(
        name=name,
        make_inputs=_make_inputs,
        run=_run,
        reference=mlp_reference,
        case={"batch": 32, "n": 1025, "width": width},
        checks=checks,
        toy={"batch": 1, "n": 3, "width": 16},
        work=_work,
        backward_work=_backward_work,
        matrix=True,
        gradient_of=("x", "gamma", "beta", "w1", "b1", "w2", "b2"),
    )


# One on each side of the table's limit.
OPERATIONS = (
    _declare("mlp_triton", 192, ({"batch": 2, "n": 37, "width": 100, "scale": True},)),
    _declare("mlp_768_triton", 768, ({"batch": 1, "n": 70, "width": 400},)),
)
