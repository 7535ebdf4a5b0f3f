"""Patch embedding on a GPU, forward and backward: from pixels to the token buffer in one kernel.

With V the matrix of all patches, a row of C P^2 normalised pixels each, and a pixel in channel c

    v = s_c x + o_c inside its image, 0 outside      s = 1 / std, o = -mean / std; x / 255 if uint8
    z_e = t_e + q_e                                  extra tokens t, position embeddings q
    z_{E+n} = W v_n + b + q_{E+n}

V is never in memory: the kernels read the image where V is asked for, whatever its strides are and
whether or not whole patches fill it. Backward, from the upstream gradient u of z,

    dq = sum_B u      dt = dq_e, e < E      db = sum_n dq_{E+n}      dW = u^T V      dX = s_c (u W)

The first three are one sum over the images, which reads u once: PyTorch's reduction is at the
floor. u^T V is summed by parts, whose number the shape alone decides, and the parts are added up in
a fixed order. Gathering V in 16 bits for cuBLAS instead would write and read as much again as the
image holds; so the kernel reads the image for this product, too. Patches do not overlap, so every
pixel has its gradient from one row of u W, and is written once.

16-bit operands are multiplied by the tensor cores and summed in float32, as is everything else;
float32 is multiplied as such, not as TF32, and float64 in float64. Pixels of another type than the
weight's, such as uint8 or float32 under autocast, are converted on the way.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from segmenter_fast.ops._patch_embed_triton import EMBED, IMAGE_GRADIENT, WEIGHT_GRADIENT
from segmenter_fast.ops._triton import Operation, accumulator, check_device, launch
from segmenter_fast.ops.patch_embed import FLOATS, patch_embed_reference
from segmenter_fast.ops.upsample import upcast

PROGRAMS = 256
"""Of the weight's gradient, about: two for each multiprocessor of the largest GPUs."""


# --------------------------------------------------------------------------- geometry
@functools.lru_cache(maxsize=64)
def _affine(
    mean: tuple[float, ...], std: tuple[float, ...], largest: int, like: torch.dtype, device: Any
) -> Tensor:
    """(2, C) scale and shift."""
    rows = [[1 / (largest * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]]
    return torch.tensor(rows, dtype=like, device=device)


def _with_short_offsets(images: Tensor) -> Tensor:
    """The images; a copy if offsets inside one of them exceed 32 bits, as where B is innermost."""
    sides = zip(images.shape[1:], images.stride()[1:], strict=True)
    far = sum((size - 1) * stride for size, stride in sides) >= 1 << 31
    return images.contiguous() if far else images


class _Problem:
    """What all kernels are told of the images.

    Args:
        images: (B, C, H, W), as read; of the image's gradient, as written.
        weight: (D, C, P, P).
        mean, std, sizes: options of the operation.
        dtype: of the images that are read.
    """

    def __init__(
        self,
        images: Tensor,
        weight: Tensor,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        sizes: Tensor | None,
        dtype: torch.dtype,
    ):
        self.batch, channels, height, width = images.shape
        self.d, patch = weight.shape[0], weight.shape[2]
        self.columns = -(-width // patch)
        self.n = -(-height // patch) * self.columns
        self.k = channels * patch * patch
        # Where the channels of a pixel lie side by side, so do the columns of V.
        last = channels > 1 and images.stride(1) == 1 and images.stride(3) == channels
        self.order = (0, 2, 3, 1) if last else (0, 1, 2, 3)
        affine = dtype == torch.uint8 or mean is not None or std is not None
        like = upcast(weight.new_empty(0)).dtype
        # How pixels become operands of the tensor cores, if they do.
        computed = affine or sizes is not None or dtype != weight.dtype
        self.kind = "computed" if computed else "loaded"
        if weight.dtype not in (torch.float16, torch.bfloat16):
            self.kind = "wide"
        # Without one the kernels are handed the images, and leave them alone.
        self.affine = self.sizes = images
        if affine:
            mean, std = mean or (0.0,) * channels, std or (1.0,) * channels
            largest = 255 if dtype == torch.uint8 else 1
            self.affine = _affine(tuple(mean), tuple(std), largest, like, images.device)
        if sizes is not None:
            self.sizes = sizes.to(images.device).contiguous()
        self.options = {
            "DTYPE": accumulator(weight.dtype),
            "C": channels,
            "P": patch,
            "LAST": last,
            "AFFINE": affine,
            "SIZES": sizes is not None,
        }

    def matrix(self, weight: Tensor) -> Tensor:
        """(D, C P P) weight in the order of V's columns."""
        return weight.permute(self.order).reshape(self.d, self.k).contiguous()

    def like_weight(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """The other way, to (D, C, P, P)."""
        inner = [shape[dim] for dim in self.order]
        return matrix.view(inner).permute([self.order.index(dim) for dim in range(4)]).contiguous()


# --------------------------------------------------------------------------- operators
@torch.library.custom_op(
    "segmenter_fast::patch_embed_triton", mutates_args=(), device_types=("cpu", "cuda")
)
def _patch_embed_op(
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos_embed: Tensor,
    tokens: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    sizes: Tensor | None,
) -> Tensor:
    """The tokens z; pixels and weight are multiplied in the weight's dtype."""
    _check(images, weight)
    images = _with_short_offsets(images)
    problem = _Problem(images, weight, mean, std, sizes, images.dtype)
    out = _empty(images, weight, pos_embed, tokens)
    kernel = EMBED[problem.kind]
    config = kernel.config(images)
    blocks = -(-problem.d // config["BLOCK_D"])
    launch(
        kernel,
        (-(-problem.batch * problem.n // config["BLOCK_N"]) * blocks,),
        config,
        *(images, problem.matrix(weight), bias.contiguous(), pos_embed.contiguous()),
        *(tokens.contiguous(), problem.affine, problem.sizes, out, *images.stride()),
        *(problem.batch, problem.n, problem.d, *images.shape[2:], problem.columns, blocks),
        EXTRA=tokens.shape[1],
        **problem.options,
    )
    return out


def _empty(images: Tensor, weight: Tensor, pos_embed: Tensor, tokens: Tensor) -> Tensor:
    dtype = torch.promote_types(weight.dtype, torch.promote_types(pos_embed.dtype, tokens.dtype))
    return weight.new_empty((images.shape[0], *pos_embed.shape[1:]), dtype=dtype)


@_patch_embed_op.register_fake
def _(
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos_embed: Tensor,
    tokens: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    sizes: Tensor | None,
) -> Tensor:
    return _empty(images, weight, pos_embed, tokens)


def _check(images: Tensor, weight: Tensor) -> None:
    check_device(images)
    if images.dtype not in (torch.uint8, *FLOATS) or weight.dtype not in FLOATS:
        raise TypeError(
            "images must be uint8, float16, bfloat16, float32 or float64 and weight one of the "
            f"last four, got {images.dtype} and {weight.dtype}"
        )
    if images.shape[1:].numel() >= 1 << 31:
        raise ValueError(f"an image must have fewer than 2^31 values, got {tuple(images.shape)}")


@torch.library.custom_op(
    "segmenter_fast::patch_embed_triton_backward",
    mutates_args=(),
    device_types=("cpu", "cuda"),
)
def _patch_embed_backward_op(
    upstream: Tensor,
    images: Tensor,
    weight: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    sizes: Tensor | None,
    of_images: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of images and weight, empty where they are not asked for."""
    # As the product's operand it comes from memory in the weight's dtype, not from registers.
    upstream = upstream.to(weight.dtype).contiguous()
    images = _with_short_offsets(images)
    options = (weight, mean, std, sizes, images.dtype)
    by_images, by_weight = images.new_empty(0), weight.new_empty(0)
    if of_weight:
        by_weight = _weight_gradient(upstream, images, weight, _Problem(images, *options))
    if of_images:
        by_images = torch.empty_like(images)
        _image_gradient(upstream, by_images, weight, _Problem(by_images, *options))
    return by_images, by_weight


def _weight_gradient(upstream: Tensor, images: Tensor, weight: Tensor, problem: _Problem) -> Tensor:
    kernel = WEIGHT_GRADIENT[problem.kind]
    config = kernel.config(images)
    d_blocks, k_blocks = -(-problem.d // config["BLOCK_D"]), -(-problem.k // config["BLOCK_K"])
    token_blocks = -(-problem.n // config["BLOCK_N"])
    each = -(-token_blocks // max(1, PROGRAMS // (d_blocks * k_blocks)))
    parts = -(-token_blocks // each)
    sums = upcast(weight.new_empty(0)).new_empty((parts, problem.d, problem.k))
    launch(
        kernel,
        (parts * d_blocks * k_blocks,),
        config,
        *(upstream, images, problem.affine, problem.sizes, sums, *images.stride()),
        *(problem.batch, problem.n, problem.d, *images.shape[2:], problem.columns),
        *(d_blocks, k_blocks, each * config["BLOCK_N"]),
        EXTRA=upstream.shape[1] - problem.n,
        **problem.options,
    )
    return problem.like_weight(sums.sum(0).to(weight.dtype), weight.shape)


def _image_gradient(upstream: Tensor, out: Tensor, weight: Tensor, problem: _Problem) -> None:
    kernel = IMAGE_GRADIENT[problem.kind != "wide"]
    config = kernel.config(out)
    blocks = -(-problem.k // config["BLOCK_K"])
    launch(
        kernel,
        (-(-problem.batch * problem.n // config["BLOCK_N"]) * blocks,),
        config,
        *(upstream, problem.matrix(weight), problem.affine, problem.sizes, out, *out.stride()),
        *(problem.batch, problem.n, problem.d, *out.shape[2:], problem.columns, blocks),
        EXTRA=upstream.shape[1] - problem.n,
        **problem.options,
    )


@_patch_embed_backward_op.register_fake
def _(
    upstream: Tensor,
    images: Tensor,
    weight: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    sizes: Tensor | None,
    of_images: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor]:
    by_images = torch.empty_like(images) if of_images else images.new_empty(0)
    return by_images, weight.new_empty(weight.shape if of_weight else (0,))


def _no_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "patch_embed cannot be differentiated twice in Triton; use backend='reference' for that"
    )


_patch_embed_backward_op.register_autograd(_no_second_derivative)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    images, weight, bias, pos_embed, tokens, ctx.mean, ctx.std, sizes = inputs
    ctx.extra, ctx.dtypes = tokens.shape[1], (bias.dtype, pos_embed.dtype, tokens.dtype)
    ctx.save_for_backward(images, weight, sizes)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    images, weight, sizes = ctx.saved_tensors
    of_images, of_weight, *others = ctx.needs_input_grad[:5]
    by_images = by_weight = by_bias = by_pos = by_tokens = None
    if any(others):
        precise = torch.float64 if upstream.dtype == torch.float64 else torch.float32
        by_pos = upstream.sum(0, keepdim=True, dtype=precise)
        # A copy: gradients that share memory would be scaled twice by whoever clips them in place.
        by_tokens = by_pos[:, : ctx.extra].to(ctx.dtypes[2])
        by_tokens = by_tokens.clone(memory_format=torch.contiguous_format)
        by_bias = by_pos[0, ctx.extra :].sum(0).to(ctx.dtypes[0])
        by_pos = by_pos.to(ctx.dtypes[1])
    if of_images or of_weight:
        by_images, by_weight = torch.ops.segmenter_fast.patch_embed_triton_backward(
            upstream, images, weight, ctx.mean, ctx.std, sizes, of_images, of_weight
        )
    return (
        by_images if of_images else None,
        by_weight if of_weight else None,
        *(by_bias, by_pos, by_tokens, None, None, None),
    )


_patch_embed_op.register_autograd(_backward, setup_context=_setup_context)


# --------------------------------------------------------------------------- declaration
def _make_inputs(
    dtype: torch.dtype,
    batch: int,
    height: int,
    width: int,
    patch: int,
    d: int,
    extra: int = 1,
    channels_last: bool = False,
) -> dict[str, Any]:
    images = torch.randn(batch, 3, height, width)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    n = -(-height // patch) * -(-width // patch)
    return {
        "images": images.to(dtype),
        "weight": torch.randn(d, 3, patch, patch).mul_(0.02).to(dtype),
        "bias": torch.randn(d).mul_(0.02).to(dtype),
        "pos_embed": torch.randn(1, extra + n, d).to(dtype),
        "tokens": torch.randn(1, extra, d).to(dtype),
        "mean": None,
        "std": None,
        "sizes": None,
    }


def _make_pictures(dtype: torch.dtype, **case: Any) -> dict[str, Any]:
    inputs = _make_inputs(dtype, **case)
    shape = inputs["images"].shape
    heights = torch.randint(1, shape[2] + 1, (shape[0],), dtype=torch.int32)
    widths = torch.randint(1, shape[3] + 1, (shape[0],), dtype=torch.int32)
    return inputs | {
        "images": inputs["images"].mul(60).add(120).clamp(0, 255).to(torch.uint8),
        "mean": (0.5, 0.4, 0.45),
        "std": (0.25, 0.2, 0.3),
        "sizes": torch.stack((heights, widths), 1),
    }


def _as_under_autocast(dtype: torch.dtype, **case: Any) -> dict[str, Any]:
    inputs = _make_inputs(torch.float32, **case)
    return inputs | {"weight": inputs["weight"].to(dtype)}


def _run(**inputs: Any) -> Tensor:
    return torch.ops.segmenter_fast.patch_embed_triton(*inputs.values())


def _reference_under_autocast(**inputs: Any) -> Tensor:
    dtype = inputs["weight"].dtype
    images, bias = inputs["images"].to(dtype), inputs["bias"].to(dtype)
    return patch_embed_reference(**inputs | {"images": images, "bias": bias})


def _work(inputs: Mapping[str, Any]) -> tuple[float, float]:
    # One product; image and parameters read, tokens written.
    images, weight, pos_embed = inputs["images"], inputs["weight"], inputs["pos_embed"]
    rows, d = pos_embed.shape[1:]
    n = len(images) * (rows - inputs["tokens"].shape[1])
    z = len(images) * rows * d * pos_embed.element_size()
    moved = images.nbytes + weight.nbytes + pos_embed.nbytes + z
    return 2 * n * weight.numel(), moved


def _training_work(inputs: Mapping[str, Any]) -> tuple[float, float]:
    # A product for the weight; image and upstream gradient read, the parameters' gradients written.
    return _work(inputs)


def _backward_work(inputs: Mapping[str, Any]) -> tuple[float, float]:
    # Another product for the image, which takes the weight; the image's gradient written.
    flop, moved = _training_work(inputs)
    return 2 * flop, moved + inputs["images"].nbytes + inputs["weight"].nbytes


_CASE = {"batch": 32, "height": 512, "width": 512, "patch": 16, "d": 768}
_PARAMETERS = ("weight", "bias", "pos_embed", "tokens")

OPERATIONS = (
    Operation(
        name="patch_embed_triton",
        make_inputs=_make_inputs,
        run=_run,
        reference=patch_embed_reference,
        case=_CASE,
        checks=(
            {"batch": 3, "height": 37, "width": 50, "patch": 8, "d": 48, "extra": 2},
            {"batch": 2, "height": 70, "width": 33, "patch": 14, "d": 200, "channels_last": True},
        ),
        toy={"batch": 1, "height": 9, "width": 8, "patch": 4, "d": 24},
        work=_work,
        backward_work=_backward_work,
        matrix=True,
        gradient_of=("images", *_PARAMETERS),
    ),
    Operation(
        name="patch_embed_of_pictures_triton",
        make_inputs=_make_pictures,
        run=_run,
        reference=patch_embed_reference,
        case=_CASE,
        checks=(
            {"batch": 3, "height": 37, "width": 50, "patch": 8, "d": 48, "extra": 2},
            {"batch": 2, "height": 70, "width": 33, "patch": 14, "d": 200, "channels_last": True},
        ),
        toy={"batch": 1, "height": 9, "width": 8, "patch": 4, "d": 24},
        work=_work,
        backward_work=_training_work,
        matrix=True,
        gradient_of=_PARAMETERS,
    ),
    Operation(
        name="patch_embed_under_autocast_triton",
        make_inputs=_as_under_autocast,
        run=_run,
        reference=_reference_under_autocast,
        case=_CASE,
        checks=({"batch": 3, "height": 37, "width": 50, "patch": 8, "d": 48, "extra": 2},),
        toy={"batch": 1, "height": 9, "width": 8, "patch": 4, "d": 24},
        work=_work,
        backward_work=_training_work,
        matrix=True,
        dtypes=(torch.bfloat16, torch.float16),
        gradient_of=_PARAMETERS,
    ),
)
