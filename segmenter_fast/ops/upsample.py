"""Bilinear upsampling of patch logits: the geometry that every reader of them shares.

    y = s_y (Y + 1/2) - 1/2, clamped below at 0        s_y = h / H, float32 as in PyTorch
    i = floor(y), i' = min(i + 1, h - 1), a = y - i    and likewise j, j', b along a row
    z_k(Y, X) = (1-a) (1-b) l_k(i, j) + (1-a) b l_k(i, j') + a (1-b) l_k(i', j) + a b l_k(i', j')

`size` = (H, W) is what `interpolate(mode="bilinear", align_corners=False)` would be asked for, and
`crop` = (top, left, height, width) the part of it that is the answer. float16 and bfloat16 logits
are upcast to float32 first; they are small at patch resolution.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from segmenter_fast.backend import native_module, resolve_backend

LOGIT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TARGET_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


def label_dtype(n_cls: int) -> torch.dtype:
    """Smallest of uint8, int16, int32 that holds `n_cls` class indices."""
    if n_cls <= 256:
        return torch.uint8
    return torch.int16 if n_cls <= 32767 else torch.int32


def _whole_numbers(name: str, values: Sequence[int], parts: str) -> tuple[int, ...]:
    expected = len(parts.split(", "))
    if not isinstance(values, (tuple, list)) or len(values) != expected:
        raise ValueError(f"{name} must be ({parts}), got {values!r}")
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must hold ints, got {value!r} ({type(value).__name__})")
    return tuple(values)


def check_geometry(
    logits: Tensor, size: Sequence[int], crop: Sequence[int] | None
) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """Check (logits, size, crop) and return size and crop as tuples, crop filled in.

    Raises:
        ValueError: wrong rank, no class or patch, a size that is not positive, a crop outside it.
        TypeError: logits that are not floating point, sizes that are not ints.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a tensor, got {type(logits).__name__}")
    if logits.ndim != 4:
        raise ValueError(f"logits must be (B, K, h, w), got shape {tuple(logits.shape)}")
    if logits.dtype not in LOGIT_DTYPES:
        raise TypeError(f"logits must be float16, bfloat16, float32 or float64, got {logits.dtype}")
    if 0 in logits.shape[1:]:
        raise ValueError(
            f"logits need at least one class and one patch, got shape {tuple(logits.shape)}"
        )
    height, width = _whole_numbers("size", size, "H, W")
    if height < 1 or width < 1:
        raise ValueError(f"size must be positive, got {(height, width)}")
    if crop is None:
        return (height, width), (0, 0, height, width)
    rect = _whole_numbers("crop", crop, "top, left, height, width")
    if (
        min(rect[0], rect[1]) < 0
        or min(rect[2], rect[3]) < 1
        or rect[0] + rect[2] > height
        or rect[1] + rect[3] > width
    ):
        raise ValueError(
            "crop (top, left, height, width) must be non-empty and lie inside "
            f"size {(height, width)}, got {rect}"
        )
    return (height, width), rect


def check_target(
    target: Tensor, logits: Tensor, size: Sequence[int] | None, crop: Sequence[int] | None
) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """Check a label map against the logits; size None is the target's own."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    if target.dtype not in TARGET_DTYPES:
        raise TypeError(f"target must be uint8, int16, int32 or int64, got {target.dtype}")
    if target.ndim != 3:
        raise ValueError(f"target must be (B, height, width), got shape {tuple(target.shape)}")
    if size is None:
        if crop is not None:
            raise ValueError("crop is a part of size: pass size together with crop")
        size = tuple(target.shape[1:])
    size, crop = check_geometry(logits, size, crop)
    expected = (logits.shape[0], crop[2], crop[3])
    if tuple(target.shape) != expected:
        raise ValueError(
            f"target must be (B, height, width) = {expected} for these logits, size and crop, "
            f"got {tuple(target.shape)}"
        )
    if target.device != logits.device:
        raise ValueError(
            f"target is on {target.device} and logits are on {logits.device}; move one of them"
        )
    return size, crop


def check_labels(target: Tensor, n_cls: int, ignore_index: int) -> None:
    """Raise ValueError if a label is neither in [0, n_cls) nor ignore_index."""
    if target.numel() == 0 or (target.amin() >= 0 and target.amax() < n_cls):
        return
    labels = target.long()
    wrong = labels[((labels < 0) | (labels >= n_cls)) & (labels != ignore_index)]
    if wrong.numel() == 0:
        return
    values = wrong.unique().tolist()
    shown = ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")
    raise ValueError(
        f"target has {wrong.numel()} pixels whose label is outside [0, {n_cls}) and not "
        f"ignore_index={ignore_index}: {shown}. Map them to a class or to ignore_index"
    )


def upcast(logits: Tensor) -> Tensor:
    """`logits`, float16 and bfloat16 as float32."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def dtype_name(tensor: Tensor) -> str:
    """`float32` for torch.float32: how the compiled module names types."""
    return str(tensor.dtype).removeprefix("torch.")


def native_upsampling(logits: Tensor, size: Sequence[int], crop: Sequence[int]):
    """`_C.Upsampling` of float32 or float64 CPU logits; the caller keeps them alive."""
    return native_module().Upsampling(
        logits.data_ptr(),
        dtype_name(logits),
        logits.shape,
        logits.stride(),
        size,
        crop,
        torch.get_num_threads(),
    )


def upsample_reference(
    logits: Tensor, size: tuple[int, int], crop: tuple[int, int, int, int]
) -> Tensor:
    """The definition: interpolate, then slice; (B, K, height, width) float32 or float64."""
    logits = upcast(logits)
    # From class-last strides `interpolate` makes a class-last result, over which softmax is several
    # times slower.
    full = F.interpolate(logits.contiguous(), size=size, mode="bilinear", align_corners=False)
    top, left, height, width = crop
    return full[:, :, top : top + height, left : left + width]


def upsample_logits(
    logits: Tensor,
    size: tuple[int, int],
    crop: tuple[int, int, int, int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Bilinear upsampling, written out: the only consumer whose result is K times the image.

    Args:
        logits: (B, K, h, w) floating point, any strides.
        size: (H, W) the full output, in pixels.
        crop: (top, left, height, width) in pixels, the part of `size` to return; None is all of it.
        backend: see `segmenter_fast.backend`.

    Returns:
        (B, K, height, width) float32, or float64 for float64 logits; differentiable.

    Raises:
        ValueError: wrong rank, a size that is not positive, a crop outside it.
        TypeError: logits that are not floating point.

    Source: Strudel et al. 2021, section 3.2; official segm/model/segmenter.py.
    """
    geometry = check_geometry(logits, size, crop)
    resolve_backend(backend, logits.device)
    return upsample_reference(logits, *geometry)
