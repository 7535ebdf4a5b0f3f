"""Cross-entropy of bilinearly upsampled patch logits with a label map, and its gradient.

With z as in ops/upsample.py, t the pixel's label, w the class weights (1 if none are given), W
their sum, s the label smoothing, K classes, p = softmax(z) and lse = log sum_c exp(z_c):

    loss = (1 - s) w_t (lse - z_t) + s/K sum_c w_c (lse - z_c)
    dloss/dz_c = ((1 - s) w_t + s/K W) p_c - (1 - s) w_t [c = t] - s/K w_c
    dloss/dl_c(i, j) = sum over pixels of dloss/dz_c times the pixel's bilinear weight of (i, j)

Pixels whose label is ignore_index have loss and gradient 0. "sum" adds the losses of the pixels up,
"mean" divides that by the sum of w_t over the pixels that are not ignored, "none" keeps them.

The native kernel stores nothing of the size of z. For "mean" and "sum" the gradient comes out of
the same pass as the loss, and backward multiplies it by a number. For "none" backward is a pass of
its own, which computes lse once more rather than keep it.

NaN and infinite logits give what PyTorch gives: a pixel that reads a NaN or +inf has loss NaN and
passes NaN to the gradients of all classes in its four patches, even if it is ignored; -inf is a
class of probability 0. The native kernel goes through the cells of the patch grid that have such a
corner pixel by pixel, and so it does where neighbours are sure of different classes by some 110
nats.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from segmenter_fast.backend import native_module, resolve_backend
from segmenter_fast.ops.upsample import (
    check_labels,
    check_target,
    dtype_name,
    native_upsampling,
    upcast,
    upsample_reference,
)


def upsample_cross_entropy_reference(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    size: tuple[int, int],
    crop: tuple[int, int, int, int],
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """The definition: interpolate, crop, `F.cross_entropy`."""
    return F.cross_entropy(
        upsample_reference(logits, size, crop),
        target.long(),
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def _run_kernel(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    size: Sequence[int],
    crop: Sequence[int],
    label_smoothing: float,
    ignore_index: int,
    mean: bool = False,
    upstream: Tensor | None = None,
    losses: Tensor | None = None,
    gradient: Tensor | None = None,
) -> float:
    """Write `losses` and `gradient` where given; return the loss."""
    if logits.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"logits must be float32 or float64, got {logits.dtype}")
    target = target.contiguous()
    if weight is not None:
        weight = weight.to(logits.dtype).contiguous()
    if upstream is not None:
        upstream = upstream.to(logits.dtype).contiguous()

    def address(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    loss, wrong_labels = native_module().upsample_cross_entropy(
        native_upsampling(logits, size, crop),
        target.data_ptr(),
        dtype_name(target),
        weight_ptr=address(weight),
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        mean=mean,
        upstream_ptr=address(upstream),
        losses_ptr=address(losses),
        gradient_ptr=address(gradient),
        gradient_strides=(0, 0, 0, 0) if gradient is None else gradient.stride(),
    )
    if wrong_labels:
        check_labels(target, logits.shape[1], ignore_index)
    return loss


# --------------------------------------------------------------------------- forward
@torch.library.custom_op(
    "segmenter_fast::upsample_cross_entropy", mutates_args=(), device_types="cpu"
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
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Loss, and with `with_gradient` its gradient unless reduction is "none"; else empty."""
    options = (target, weight, size, crop, label_smoothing, ignore_index)
    gradient = torch.empty_like(logits) if with_gradient and reduction != "none" else None
    if reduction == "none":
        loss = logits.new_empty(target.shape)
        _run_kernel(logits, *options, losses=loss)
    else:
        value = _run_kernel(logits, *options, mean=reduction == "mean", gradient=gradient)
        loss = logits.new_full((), value)
    return loss, logits.new_empty(0) if gradient is None else gradient


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
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty(target.shape if reduction == "none" else ())
    stored = with_gradient and reduction != "none"
    return loss, torch.empty_like(logits) if stored else logits.new_empty(0)


# --------------------------------------------------------------------------- backward
@torch.library.custom_op(
    "segmenter_fast::upsample_cross_entropy_backward", mutates_args=(), device_types="cpu"
)
def _upsample_cross_entropy_backward_op(
    grad_loss: Tensor,
    gradient: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    size: Sequence[int],
    crop: Sequence[int],
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """Gradient of the logits: grad_loss times what forward stored, or a pass for "none"."""
    if reduction != "none":
        return gradient * grad_loss
    gradient = torch.empty_like(logits)
    options = (target, weight, size, crop, label_smoothing, ignore_index)
    _run_kernel(logits, *options, upstream=grad_loss, gradient=gradient)
    return gradient


@_upsample_cross_entropy_backward_op.register_fake
def _(grad_loss: Tensor, gradient: Tensor, logits: Tensor, *options) -> Tensor:
    return torch.empty_like(logits)


def _no_second_derivative(ctx, grad: Tensor) -> None:
    raise RuntimeError(
        "upsample_cross_entropy cannot be differentiated twice; use backend='reference' for that"
    )


_upsample_cross_entropy_backward_op.register_autograd(_no_second_derivative)


def _setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    logits, target, weight, *ctx.options, with_gradient = inputs
    if not with_gradient:
        raise RuntimeError("logits require a gradient: call the operator with with_gradient=True")
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], logits, target, weight)


def _backward(ctx, grad_loss: Tensor, _: Tensor | None) -> tuple:
    grad_logits = torch.ops.segmenter_fast.upsample_cross_entropy_backward(
        grad_loss, *ctx.saved_tensors, *ctx.options
    )
    return grad_logits, *[None] * 8


_upsample_cross_entropy_op.register_autograd(_backward, setup_context=_setup_context)
_upsample_cross_entropy_op.register_autocast("cpu", torch.float32)


# --------------------------------------------------------------------------- public function
def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    size: tuple[int, int] | None = None,
    crop: tuple[int, int, int, int] | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = 255,
    reduction: str = "mean",
    check: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of the bilinearly upsampled logits, exactly as `F.cross_entropy` defines it.

    Args:
        logits, crop, backend: as for `upsample_logits`; the target covers `crop`. The native kernel
            takes up to 65,535 classes.
        target: (B, height, width) uint8|int16|int32|int64 class indices.
        size: (H, W) the full output, in pixels; None is the target's own size.
        weight: (K,) floating point, one factor per class; no gradient flows to it.
        label_smoothing: in [0, 1], the share of the target spread over all classes.
        ignore_index: label of the pixels that count for nothing; may be a class.
        reduction: "mean" (weighted, over the pixels not ignored), "sum" or "none".
        check: also look at the labels on a GPU, which makes the host wait for it: not for a graph
            that is captured. On the CPU they are always looked at. Without it Triton gives pixels
            of a wrong label, and the gradients they reach, NaN; "reference" fails as PyTorch does.

    Returns:
        Scalar, or (B, height, width) for "none", where ignored pixels are 0; float32, or float64
        for float64 logits; once differentiable. "mean" is NaN when every pixel is ignored, and its
        gradient is then 0.

    Raises:
        ValueError: shapes that do not fit together, unknown reduction, label_smoothing outside
            [0, 1], a weight that requires a gradient; where labels are looked at, one outside
            [0, K) that is not ignore_index.
        TypeError: logits or weight not floating point, target not an integer type.
        BackendError: the backend named cannot run here.

    Source: Strudel et al. 2021, section 4.1; official segm/engine.py.
    """
    size, crop = check_target(target, logits, size, crop)
    backend = resolve_backend(backend, logits.device)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
    if weight is not None:
        _check_weight(weight, logits)
    if check and backend != "native":
        check_labels(target, logits.shape[1], ignore_index)
    options = (size, crop, float(label_smoothing), ignore_index, reduction)
    if backend == "triton":
        loss, _, _ = torch.ops.segmenter_fast.upsample_cross_entropy_triton(
            logits, target, weight, *options
        )
        return loss
    logits = upcast(logits)
    if weight is not None:
        weight = weight.to(logits.dtype)
    options = (weight, *options)
    if backend == "reference":
        # Reading the labels on the host would break a compiled graph and stall a GPU.
        if target.device.type == "cpu" and not torch.compiler.is_compiling():
            check_labels(target, logits.shape[1], ignore_index)
        return upsample_cross_entropy_reference(logits, target, *options)
    with_gradient = torch.is_grad_enabled() and logits.requires_grad
    loss, _ = torch.ops.segmenter_fast.upsample_cross_entropy(
        logits, target, *options, with_gradient
    )
    return loss


def _check_weight(weight: Tensor, logits: Tensor) -> None:
    n_cls = logits.shape[1]
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating point, got {weight.dtype}")
    if tuple(weight.shape) != (n_cls,):
        raise ValueError(
            f"weight must hold one factor per class, ({n_cls},), got {tuple(weight.shape)}"
        )
    if weight.device != logits.device:
        raise ValueError(
            f"weight is on {weight.device} and logits are on {logits.device}; move one of them"
        )
    if weight.requires_grad:
        raise ValueError("weight must not require a gradient: pass weight.detach()")
