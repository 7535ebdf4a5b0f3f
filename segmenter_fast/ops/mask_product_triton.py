"""Masks on a GPU, forward and backward: cosines, with layer norm over the classes.

With p a patch's vector and c a class's, g = weight, b = bias and K classes

    m = <p, c> / (|p| |c|)          x = (m - mean_k m) r,  r = 1 / sqrt(var_k m + eps)
    y = g x + b

Up to 256 classes a program holds all of them for a block of patches, so the layer norm is its
epilogue; of more classes the kernel makes m, and PyTorch's layer norm follows. The vectors go into
the matrix product as they are and the sums of their squares are taken on the way: dividing the
product is as good as normalising the vectors, and matrix units read operands from memory at full
speed that way. Where a gradient is wanted m, the norms, the mean and r are kept, which is cheaper
than to take the product again. Backward, from the upstream gradient u of y,

    dg = sum_n u x          db = sum_n u
    dm = r (u g - mean_k(u g) - x mean_k(u g x))
    G  = dm / (|p| |c|)     A_n = sum_k dm m / |p|^2          B_k = sum_n dm m / |c|^2

The second line is layer norm's derivative: m can change neither the mean nor the length of x, so
those two parts of u g are taken out. Sums over patches are left per block and added up in a fixed
order. Two matrix products follow, with the rest of the normalisations' derivative as their
epilogues; a vector's length changes no mask, so they take out the part along the vector itself:

    dp = G c - A p          dc = G^T p - B c

16-bit vectors are multiplied by the tensor cores and summed in float32, as is everything else;
float32 is multiplied as such, not as TF32, and float64 in float64.

A vector of zeros has no direction: its masks are NaN, as they are with 0 / 0 in the definition.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from segmenter_fast.ops._mask_product_triton import MASK, MASK_GRADIENT, PRODUCT
from segmenter_fast.ops._triton import (
    Kernel,
    Operation,
    accumulator,
    check_device,
    launch,
    next_power_of_2,
)
from segmenter_fast.ops.mask_product import mask_product_reference
from segmenter_fast.ops.upsample import upcast

MOST_CLASSES = 256
"""What a program's block holds; more are divided among programs, and the layer norm follows."""

BLOCK_OF_MANY_CLASSES = 128


# --------------------------------------------------------------------------- operators
def _kernel(table: dict[bool, Kernel], tensor: Tensor) -> Kernel:
    return table[tensor.dtype in (torch.float16, torch.bfloat16)]


@torch.library.custom_op(
    "segmenter_fast::mask_product_triton", mutates_args=(), device_types=("cpu", "cuda")
)
def _mask_product_op(
    patches: Tensor,
    classes: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The masks y; m, 1/|p|, 1/|c|, mean of m and r, which are empty without `with_gradient`."""
    _check(patches, classes)
    (batch, n, d), n_cls = patches.shape, classes.shape[1]
    fused = n_cls <= MOST_CLASSES
    outputs = _empty(patches, classes, weight, with_gradient)
    y, m, by_p, by_c, *_ = buffers = (
        outputs if fused or with_gradient else _empty(patches, classes, weight, True)
    )
    kernel = _kernel(MASK, patches)
    config = kernel.config(patches)
    block = max(16, next_power_of_2(n_cls)) if fused else BLOCK_OF_MANY_CLASSES
    blocks = -(-n // config["BLOCK_N"])
    launch(
        kernel,
        (batch * blocks, -(-n_cls // block)),
        config,
        *(patches, classes, weight.contiguous(), bias.contiguous(), *buffers),
        *(*patches.stride(), *classes.stride(), n, n_cls, d, blocks),
        DTYPE=accumulator(patches.dtype),
        EPS=eps,
        KEEP=with_gradient or not fused,
        NORM=fused,
        BLOCK_K=block,
    )
    if fused:
        return outputs
    masks, mean, r = torch.native_layer_norm(m, (n_cls,), weight.to(m), bias.to(m), eps)
    masks = masks.to(y.dtype)
    if with_gradient:
        return masks, m, by_p, by_c, mean.squeeze(-1), r.squeeze(-1)
    return masks, *outputs[1:]


def _empty(
    patches: Tensor, classes: Tensor, weight: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (batch, n, _), n_cls = patches.shape, classes.shape[1]
    y = patches.new_empty((batch, n, n_cls), dtype=torch.promote_types(patches.dtype, weight.dtype))
    precise = upcast(patches.new_empty(0))
    rows = (batch, n)
    shapes = ((*rows, n_cls), rows, (batch, n_cls), rows, rows) if with_gradient else ((0,),) * 5
    return y, *(precise.new_empty(shape) for shape in shapes)


@_mask_product_op.register_fake
def _(
    patches: Tensor,
    classes: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty(patches, classes, weight, with_gradient)


def _check(patches: Tensor, classes: Tensor) -> None:
    check_device(patches)
    allowed = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if patches.dtype not in allowed or classes.dtype != patches.dtype:
        raise TypeError(
            "patches and classes must both be float16, bfloat16, float32 or float64, got "
            f"{patches.dtype} and {classes.dtype}"
        )


@torch.library.custom_op(
    "segmenter_fast::mask_product_triton_backward",
    mutates_args=(),
    device_types=("cpu", "cuda"),
)
def _mask_product_backward_op(
    upstream: Tensor,
    m: Tensor,
    by_p: Tensor,
    by_c: Tensor,
    mean: Tensor,
    r: Tensor,
    patches: Tensor,
    classes: Tensor,
    weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of patches, classes, weight and bias."""
    (batch, n, d), n_cls = patches.shape, classes.shape[1]
    config = MASK_GRADIENT.config(patches)
    blocks = -(-n // config["BLOCK_N"])
    products = patches.new_empty((batch, n, n_cls))
    of_patches = torch.empty_like(by_p)
    sums = m.new_empty((batch, blocks, 3, n_cls))
    options = {"DTYPE": accumulator(patches.dtype)}
    launch(
        MASK_GRADIENT,
        (batch * blocks,),
        config,
        *(upstream.contiguous(), m, by_p, by_c, mean, r, weight.contiguous()),
        *(products, of_patches, sums, n, n_cls, blocks),
        **options,
    )
    per_image = sums.sum(1)
    of_weight, of_bias = per_image[:, 0].sum(0), per_image[:, 1].sum(0)

    def product(g: Tensor, vectors: Tensor, scale: Tensor, own: Tensor) -> Tensor:
        out = torch.empty(own.shape, dtype=own.dtype, device=own.device)
        kernel = _kernel(PRODUCT, own)
        config = kernel.config(own)
        rows = own.shape[1]
        blocks = -(-rows // config["BLOCK_ROWS"])
        launch(
            kernel,
            (batch * blocks, -(-d // config["BLOCK_D"])),
            config,
            *(g, vectors, scale.contiguous(), own, out, *g.stride(), *vectors.stride()),
            *(*own.stride(), rows, g.shape[2], d, blocks),
            **options,
        )
        return out

    return (
        product(products, classes, of_patches, patches),
        product(products.mT, patches, per_image[:, 2], classes),
        of_weight.to(weight.dtype),
        of_bias.to(weight.dtype),
    )


@_mask_product_backward_op.register_fake
def _(
    upstream: Tensor,
    m: Tensor,
    by_p: Tensor,
    by_c: Tensor,
    mean: Tensor,
    r: Tensor,
    patches: Tensor,
    classes: Tensor,
    weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        patches.new_empty(patches.shape),
        classes.new_empty(classes.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape),
    )


def _no_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "mask_product cannot be differentiated twice in Triton; use backend='reference' for that"
    )


_mask_product_backward_op.register_autograd(_no_second_derivative)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    patches, classes, weight, _, _, with_gradient = inputs
    if not with_gradient:
        raise RuntimeError(
            "an input requires a gradient: call the operator with with_gradient=True"
        )
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:], patches, classes, weight)


def _backward(
    ctx: Any, upstream: Tensor, *unused: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None]:
    op = torch.ops.segmenter_fast.mask_product_triton_backward
    return *op(upstream, *ctx.saved_tensors), None, None


_mask_product_op.register_autograd(_backward, setup_context=_setup_context)


# --------------------------------------------------------------------------- declaration
def _make_inputs(dtype: torch.dtype, batch: int, n: int, n_cls: int, width: int) -> dict[str, Any]:
    return {
        "patches": torch.randn(batch, n, width).to(dtype),
        "classes": torch.randn(batch, n_cls, width).to(dtype),
        "weight": torch.rand(n_cls).add_(0.5).to(dtype),
        "bias": torch.randn(n_cls).to(dtype),
        "eps": 1e-5,
    }


def _run(**inputs: Any) -> Tensor:
    with_gradient = any(x.requires_grad for x in inputs.values() if isinstance(x, Tensor))
    return torch.ops.segmenter_fast.mask_product_triton(*inputs.values(), with_gradient)[0]


def _work(inputs: Mapping[str, Any]) -> tuple[float, float]:
    patches, classes = inputs["patches"], inputs["classes"]
    masks = patches.shape[0] * patches.shape[1] * classes.shape[1]
    moved = patches.nbytes + classes.nbytes + masks * patches.element_size()
    return 2 * masks * patches.shape[2], moved


def _backward_work(inputs: Mapping[str, Any]) -> tuple[float, float]:
    # Two products; vectors and upstream gradient read, gradients written.
    flop, moved = _work(inputs)
    return 2 * flop, moved + inputs["patches"].nbytes + inputs["classes"].nbytes


OPERATION = Operation(
    name="mask_product_triton",
    make_inputs=_make_inputs,
    run=_run,
    reference=mask_product_reference,
    case={"batch": 32, "n": 1024, "n_cls": 150, "width": 768},
    checks=(
        {"batch": 2, "n": 37, "n_cls": 19, "width": 48},
        {"batch": 1, "n": 130, "n_cls": 200, "width": 100},
        {"batch": 2, "n": 70, "n_cls": 300, "width": 40},
    ),
    toy={"batch": 1, "n": 5, "n_cls": 7, "width": 24},
    work=_work,
    backward_work=_backward_work,
    matrix=True,
    gradient_of=("patches", "classes", "weight", "bias"),
)
