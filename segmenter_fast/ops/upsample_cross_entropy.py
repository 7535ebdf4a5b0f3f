"""Cross-entropy of bilinearly upsampled patch logits with a label map.

loss(Y, X) = -w_t log p_t          p as in ops/upsample_probabilities.py, t the pixel's target
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from segmenter_fast.backend import resolve_backend
from segmenter_fast.ops.upsample import check_labels, check_target, upsample_reference


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    size: tuple[int, int] | None = None,
    crop: tuple[int, int, int, int] | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = 255,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of the bilinearly upsampled logits, exactly as `F.cross_entropy` defines it.

    Labels are range-checked on the CPU outside torch.compile; elsewhere by PyTorch itself.

    Args:
        logits, crop, backend: as for `upsample_logits`; the target covers `crop`.
        target: (B, height, width) uint8|int16|int32|int64 class indices.
        size: (H, W) the full output, in pixels; None is the target's own size.
        weight: (K,) floating point, one factor per class.
        label_smoothing: in [0, 1], the share of the target spread over all classes.
        ignore_index: label of the pixels that count for nothing.
        reduction: "mean" (weighted, over the pixels not ignored), "sum" or "none".

    Returns:
        Scalar, or (B, height, width) for "none", where ignored pixels are 0; float32, or float64
        for float64 logits; differentiable. "mean" is NaN when every pixel is ignored.

    Raises:
        ValueError: shapes that do not fit together, unknown reduction, label_smoothing outside
            [0, 1], a label outside [0, K) that is not ignore_index.
        TypeError: logits or weight not floating point, target not an integer type.

    Source: Strudel et al. 2021, section 4.1; official segm/engine.py.
    """
    size, crop = check_target(target, logits, size, crop)
    resolve_backend(backend, logits.device)
    n_cls = logits.shape[1]
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
    if weight is not None:
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
    # Reading the labels on the host would break a compiled graph and stall a GPU.
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        check_labels(target, n_cls, ignore_index)
    upsampled = upsample_reference(logits, size, crop)
    return F.cross_entropy(
        upsampled,
        target.long(),
        weight=None if weight is None else weight.to(upsampled.dtype),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
