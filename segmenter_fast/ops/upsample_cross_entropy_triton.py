"""Cross-entropy of upsampled patch logits on a GPU, forward and backward.

With u and L of ops/_log_softmax_triton.py (base 2), t a pixel's label, w the class weights, W their
sum, s the label smoothing and K classes, the pixel's loss is, in base 2 as well,

    (1 - s) w_t (L - u_t) + s/K (W L - M)          M = sum_c w_c u_c, upsampled from the patches

u_t and M are read at four patches, so after L nothing needs the other classes. Forward keeps L,
one number per pixel. Backward, with U the pixel's upstream gradient (for "mean" over the weights'
sum)

    A = U ((1 - s) w_t + s/K W)          r = A 2^-L          b = U (1 - s) w_t
    dloss/dz_k = r 2^u_k - b [k = t] - U s/K w_k

goes cell by cell. Along a row of a cell u_k = u + d x is linear, so that sum_x r_x 2^u_k is a
polynomial in g = 2^d, and the same sum weighted by x is g times its derivative: Horner's rule takes
two multiply-adds per pixel and class. Both sums make the cell's four corners:

    sum over pixels of (1-fy)(1-fx) v, (1-fy) fx v, fy (1-fx) v, fy fx v          v = dloss/dz_k

The labels' part visits only those blocks of classes that some label of the cell falls in. Cells in
reach of a patch with u below SAFE, of a NaN or of an infinity take a power per pixel instead.
ops/_cell_gradient_triton.py adds the corners up. Nothing has the size of z.

A label outside [0, K) that is not ignore_index makes the loss and the gradients it reaches NaN.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from segmenter_fast.ops._cell_gradient_triton import empty_corners, gather_corners
from segmenter_fast.ops._cross_entropy_triton import CORNERS, LOSS, RATIO
from segmenter_fast.ops._log_softmax_triton import log2_softmax, log_sum_exp
from segmenter_fast.ops._triton import (
    Operation,
    accumulator,
    check_device,
    launch,
    next_power_of_2,
)
from segmenter_fast.ops._upsampling_triton import check_floating, make_axis
from segmenter_fast.ops.upsample import upcast
from segmenter_fast.ops.upsample_cross_entropy import upsample_cross_entropy_reference


# --------------------------------------------------------------------------- launches
class _Problem:
    """What every launch needs of one call, prepared once.

    Args:
        logits: (B, K, h, w).
        target: (B, height, width).
        weight: (K,) or None.
        size, crop, label_smoothing, ignore_index: as for `upsample_cross_entropy`.
    """

    def __init__(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        size: Sequence[int],
        crop: Sequence[int],
        label_smoothing: float,
        ignore_index: int,
    ):
        check_device(logits)
        check_floating(logits)
        self.size, self.crop, self.ignore_index = size, crop, ignore_index
        self.batch, self.n_cls, h, w = logits.shape
        self.rows = make_axis(h, size[0], crop[0], crop[2])
        self.columns = make_axis(w, size[1], crop[1], crop[3])
        self.u, self.lowest = log2_softmax(logits)
        self.target = target.contiguous()
        self.weight = None if weight is None else weight.to(self.u.dtype).contiguous()
        self.smoothing = None
        if label_smoothing:
            # A fill, since a copy from the host would wait for the GPU.
            self.smoothing = self.u.new_full((2,), label_smoothing)
            if self.weight is not None:
                self.smoothing[1] *= self.weight.mean()

    @property
    def options(self) -> dict[str, Any]:
        """Constexpr arguments that the kernels share."""
        return {
            "DTYPE": accumulator(self.u.dtype),
            "WEIGHTED": self.weight is not None,
            "SMOOTH": self.smoothing is not None,
        }

    def or_any(self, tensor: Tensor | None) -> Tensor:
        """A kernel's argument that it will not read if it is None."""
        return self.u if tensor is None else tensor

    def loss(self, lse: Tensor, per_pixel: bool) -> tuple[Tensor, Tensor]:
        """The losses (B, height, width), or their sum and that of the weights."""
        pixels = lse.numel()
        config = LOSS.config(lse)
        programs = -(-pixels // config["BLOCK"])
        out = torch.empty_like(lse) if per_pixel else lse.new_empty((2, programs))
        mean = None
        if self.smoothing is not None:
            mean = (self.u if self.weight is None else self.u * self.weight).mean(-1)
        (h, w), (top, left, height, width) = self.u.shape[1:3], self.crop
        launch(
            LOSS,
            (programs,),
            config,
            *(self.u, self.or_any(mean), lse, self.target, self.or_any(self.weight), out, out),
            *(self.or_any(self.smoothing), pixels, self.n_cls, h, w, *self.size),
            *(top, left, height, width, self.ignore_index),
            **self.options,
            PER_PIXEL=per_pixel,
        )
        if per_pixel:
            return out, lse.new_empty(0)
        bits, weights = out.double().sum(1)
        return (bits * math.log(2)).to(lse.dtype), weights.to(lse.dtype)

    def gradient(self, lse: Tensor, upstream: Tensor, per_pixel: bool, gradient: Tensor) -> None:
        """Write the gradient of the logits for an upstream gradient (1,) or of every pixel."""
        ratio = torch.empty_like(lse)
        config = RATIO.config(lse)
        pixels = lse.numel()
        options = {**self.options, "PER_PIXEL": per_pixel}
        weight, smoothing = self.or_any(self.weight), self.or_any(self.smoothing)
        launch(
            RATIO,
            (-(-pixels // config["BLOCK"]),),
            config,
            *(lse, self.target, weight, upstream, smoothing, ratio),
            *(pixels, self.n_cls, self.ignore_index),
            **options,
        )
        rows, columns = self.rows, self.columns
        corners = empty_corners(self.u, self.batch, rows, columns, self.n_cls)
        config = CORNERS.config(lse)
        block = min(16, next_power_of_2(columns.longest))
        tiles = -(-columns.cells // config["CELLS"])
        launch(
            CORNERS,
            (self.batch * rows.cells * tiles, -(-self.n_cls // config["BLOCK_K"])),
            config,
            *(self.u, self.lowest, lse, ratio, self.target, weight, upstream, smoothing, corners),
            *(self.n_cls, *self.u.shape[1:3], *self.size, rows.start, rows.stop),
            *(columns.start, columns.stop, rows.first, rows.cells, columns.first, columns.cells),
            *(tiles, -(-columns.longest // block), self.ignore_index),
            **options,
            PIXELS=block,
        )
        gather_corners(corners, rows, columns, gradient)


# --------------------------------------------------------------------------- forward
@torch.library.custom_op(
    "segmenter_fast::upsample_cross_entropy_triton",
    mutates_args=(),
    device_types=("cpu", "cuda"),
)
def _upsample_cross_entropy_op(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    size: Sequence[int],
    crop: Sequence[int],
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, L of each pixel, and the sum of the weights for "mean" (else empty)."""
    problem = _Problem(logits, target, weight, size, crop, label_smoothing, ignore_index)
    lse = log_sum_exp(problem.u, problem.lowest, size, crop)
    loss, weights = problem.loss(lse, per_pixel=reduction == "none")
    if reduction == "mean":
        return loss / weights, lse, weights
    return loss, lse, lse.new_empty(0)


@_upsample_cross_entropy_op.register_fake
def _(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    size: Sequence[int],
    crop: Sequence[int],
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    like = upcast(logits)
    shape = (logits.shape[0], *crop[2:])
    return (
        like.new_empty(shape if reduction == "none" else ()),
        like.new_empty(shape),
        like.new_empty(() if reduction == "mean" else (0,)),
    )


# --------------------------------------------------------------------------- backward
@torch.library.custom_op(
    "segmenter_fast::upsample_cross_entropy_triton_backward",
    mutates_args=(),
    device_types=("cpu", "cuda"),
)
def _upsample_cross_entropy_backward_op(
    grad_loss: Tensor,
    lse: Tensor,
    weights: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    size: Sequence[int],
    crop: Sequence[int],
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    problem = _Problem(logits, target, weight, size, crop, label_smoothing, ignore_index)
    gradient = torch.empty_like(logits)
    upstream = grad_loss / weights if reduction == "mean" else grad_loss
    problem.gradient(lse, upstream.contiguous(), reduction == "none", gradient)
    return gradient


@_upsample_cross_entropy_backward_op.register_fake
def _(grad_loss: Tensor, lse: Tensor, weights: Tensor, logits: Tensor, *options) -> Tensor:
    return torch.empty_like(logits)


def _no_second_derivative(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError(
        "upsample_cross_entropy cannot be differentiated twice; use backend='reference' for that"
    )


_upsample_cross_entropy_backward_op.register_autograd(_no_second_derivative)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, target, weight, *ctx.options = inputs
    _, lse, weights = output
    ctx.mark_non_differentiable(lse, weights)
    ctx.save_for_backward(lse, weights, logits, target, weight)


def _backward(ctx: Any, grad_loss: Tensor, *unused: Tensor | None) -> tuple:
    gradient = torch.ops.segmenter_fast.upsample_cross_entropy_triton_backward(
        grad_loss, *ctx.saved_tensors, *ctx.options
    )
    return gradient, *[None] * 7


_upsample_cross_entropy_op.register_autograd(_backward, setup_context=_setup_context)
_upsample_cross_entropy_op.register_autocast("cuda", torch.float32)
_upsample_cross_entropy_op.register_autocast("cpu", torch.float32)


# --------------------------------------------------------------------------- declaration
def _make_inputs(
    dtype: torch.dtype,
    batch: int,
    n_cls: int,
    grid: tuple[int, int],
    size: tuple[int, int],
    crop: tuple[int, int, int, int] | None = None,
    weighted: bool = False,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> dict[str, Any]:
    crop = crop or (0, 0, *size)
    # Regions of one label, as in pictures, and void between them.
    coarse = torch.randint(0, n_cls, (batch, -(-crop[2] // 24), -(-crop[3] // 24)))
    target = coarse.repeat_interleave(24, 1).repeat_interleave(24, 2)[:, : crop[2], : crop[3]]
    target = target.masked_fill(torch.rand(target.shape) < 0.1, 255).to(torch.int16)
    return {
        "logits": torch.randn(batch, n_cls, *grid).to(dtype),
        "target": target.contiguous(),
        "weight": torch.rand(n_cls).add_(0.5) if weighted else None,
        "size": size,
        "crop": crop,
        "label_smoothing": label_smoothing,
        "ignore_index": 255,
        "reduction": reduction,
    }


def _run(**inputs: Any) -> Tensor:
    return torch.ops.segmenter_fast.upsample_cross_entropy_triton(*inputs.values())[0]


def _bytes(inputs: Mapping[str, Any]) -> int:
    logits, target = inputs["logits"], inputs["target"]
    return logits.numel() * logits.element_size() + target.numel() * target.element_size()


def _work(inputs: Mapping[str, Any]) -> tuple[float, float]:
    # A multiplication and an addition per pixel and class; logits and labels read once.
    n_cls, pixels = inputs["logits"].shape[1], inputs["target"].numel()
    return 2 * pixels * n_cls, _bytes(inputs)


def _backward_work(inputs: Mapping[str, Any]) -> tuple[float, float]:
    # Two multiply-adds per pixel and class; L, labels and logits read, the gradient written.
    logits, pixels = inputs["logits"], inputs["target"].numel()
    grid = logits.numel() * logits.element_size()
    return 4 * pixels * logits.shape[1], _bytes(inputs) + 4 * pixels + grid


OPERATION = Operation(
    name="upsample_cross_entropy_triton",
    make_inputs=_make_inputs,
    run=_run,
    reference=upsample_cross_entropy_reference,
    case={"batch": 32, "n_cls": 150, "grid": (32, 32), "size": (512, 512)},
    checks=(
        {"batch": 2, "n_cls": 19, "grid": (7, 5), "size": (113, 67), "crop": (3, 5, 101, 53)},
        {
            **{"batch": 1, "n_cls": 37, "grid": (3, 4), "size": (31, 29), "weighted": True},
            **{"label_smoothing": 0.1, "reduction": "none"},
        },
    ),
    toy={"batch": 1, "n_cls": 7, "grid": (2, 2), "size": (5, 6), "weighted": True},
    work=_work,
    backward_work=_backward_work,
)
