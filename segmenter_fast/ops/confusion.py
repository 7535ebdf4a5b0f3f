"""Confusion counts: how many pixels of each true class were given each label.

C[t, argmax_k z_k] += 1          z as in ops/upsample.py, t the pixel's target
"""

import torch
from torch import Tensor

from segmenter_fast.ops.upsample import check_labels, check_target
from segmenter_fast.ops.upsample_argmax import upsample_argmax


def upsample_confusion(
    logits: Tensor,
    target: Tensor,
    size: tuple[int, int] | None = None,
    crop: tuple[int, int, int, int] | None = None,
    ignore_index: int = 255,
    backend: str = "auto",
) -> Tensor:
    """Confusion counts C[t, argmax_k z_k] of the bilinearly upsampled logits.

    Args:
        logits, crop, backend: as for `upsample_logits`; the target covers `crop`.
        target: (B, height, width) uint8|int16|int32|int64 class indices.
        size: (H, W) the full output, in pixels; None is the target's own size.
        ignore_index: label of the pixels that are not counted.

    Returns:
        (K, K) int64, rows are target classes and columns predicted ones; every pixel that is not
        ignored is counted once.

    Raises:
        ValueError: shapes that do not fit together, a label outside [0, K) but not ignore_index.
        TypeError: logits not floating point, target not an integer type.
        BackendError: the backend named cannot run here.
    """
    size, crop = check_target(target, logits, size, crop)
    n_cls = logits.shape[1]
    check_labels(target, n_cls, ignore_index)
    labels = upsample_argmax(logits, size, crop, backend=backend)
    target = target.long()
    # Ignored pixels fall into one extra bin, which keeps the shapes fixed.
    bins = torch.where(target == ignore_index, n_cls * n_cls, target * n_cls + labels)
    counts = torch.bincount(bins.flatten(), minlength=n_cls * n_cls + 1)
    return counts[: n_cls * n_cls].view(n_cls, n_cls)
