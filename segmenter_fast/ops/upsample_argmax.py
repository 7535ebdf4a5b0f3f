"""The label of each pixel: argmax over classes of bilinearly upsampled patch logits.

    label(Y, X) = argmax_k z_k(Y, X)          z as in ops/upsample.py

The first class wins ties, and NaN counts as the largest value, as in `torch.argmax`. The native
kernel discards per cell of the patch grid the classes that cannot win there: inside a cell every
z_k is a convex combination of four corners, so a class whose largest corner is below another's
smallest is beaten everywhere. No gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from segmenter_fast.backend import native_module, resolve_backend
from segmenter_fast.ops.upsample import (
    check_geometry,
    dtype_name,
    label_dtype,
    native_upsampling,
    upcast,
    upsample_reference,
)


def upsample_argmax_reference(
    logits: Tensor, size: tuple[int, int], crop: tuple[int, int, int, int]
) -> Tensor:
    """The definition of the labels: (B, height, width) of `label_dtype(K)`."""
    return upsample_reference(logits, size, crop).argmax(dim=1).to(label_dtype(logits.shape[1]))


@torch.library.custom_op("segmenter_fast::upsample_argmax", mutates_args=(), device_types="cpu")
def _upsample_argmax_op(logits: Tensor, size: Sequence[int], crop: Sequence[int]) -> Tensor:
    logits = upcast(logits)
    labels = torch.empty(
        (logits.shape[0], *crop[2:]), dtype=label_dtype(logits.shape[1]), device=logits.device
    )
    native_module().upsample_argmax(
        native_upsampling(logits, size, crop), labels.data_ptr(), dtype_name(labels)
    )
    return labels


@_upsample_argmax_op.register_fake
def _(logits: Tensor, size: Sequence[int], crop: Sequence[int]) -> Tensor:
    shape = (logits.shape[0], crop[2], crop[3])
    return logits.new_empty(shape, dtype=label_dtype(logits.shape[1]))


def upsample_argmax(
    logits: Tensor,
    size: tuple[int, int],
    crop: tuple[int, int, int, int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Label map argmax_k of the bilinearly upsampled logits.

    The first class wins ties, and NaN counts as the largest value, as in `torch.argmax`. The native
    kernel discards per cell of the patch grid the classes that cannot win there, which is exact.

    Args:
        logits, size, crop, backend: as for `upsample_logits`.

    Returns:
        (B, height, width) uint8 up to 256 classes, int16 up to 32767, int32 above.

    Raises:
        ValueError: wrong rank, a size that is not positive, a crop outside it.
        TypeError: logits that are not floating point.
        BackendError: the backend named cannot run here.

    Source: official segm/eval/miou.py (interpolate, softmax and argmax in one step).
    """
    geometry = check_geometry(logits, size, crop)
    backend = resolve_backend(backend, logits.device)
    if backend == "reference":
        return upsample_argmax_reference(logits.detach(), *geometry)
    if backend == "triton":
        return torch.ops.segmenter_fast.upsample_argmax_triton(logits.detach(), *geometry)
    return torch.ops.segmenter_fast.upsample_argmax(logits.detach(), *geometry)
