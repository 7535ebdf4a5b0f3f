"""Bilinear upsampling of patch logits, joined to whatever reads the result.

    y = s_y (Y + 1/2) - 1/2, clamped below at 0        s_y = h / H, float32 as in PyTorch
    i = floor(y), i' = min(i + 1, h - 1), a = y - i    and likewise j, j', b along a row
    z_k(Y, X) = (1-a) (1-b) l_k(i, j) + (1-a) b l_k(i, j') + a (1-b) l_k(i', j) + a b l_k(i', j')

    labels          argmax_k z_k, the first class wins ties, NaN counts as largest
    probabilities   p_k = exp(z_k) / sum_c exp(z_c)
    cross-entropy   -w_t log p_t, as torch.nn.functional.cross_entropy on z
    confusion       C[t, argmax_k z_k] += 1

`size` = (H, W) is what `interpolate(mode="bilinear", align_corners=False)` would be asked for, and
`crop` = (top, left, height, width) the part of it that is the answer. Backward, by autograd: with
g = dL/dz, dL/dl_k(i, j) is the sum over pixels of g_k times the pixel's weight on (i, j).
float16 and bfloat16 logits are upcast to float32 first; they are small at patch resolution.

On backend "native" the labels, and the confusion counts made from them, come from a compiled
kernel; the other consumers have none yet and run in PyTorch.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from segmenter_fast.backend import native_module, resolve_backend

LOGIT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TARGET_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)
STRIP_ELEMENTS = 1 << 22
"""Upsampled logits held at once when only one number per pixel is kept (16 MiB in float32)."""


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


def _check_target(
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


def _check_labels(target: Tensor, n_cls: int, ignore_index: int) -> None:
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


def _upcast(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def upsample_reference(
    logits: Tensor, size: tuple[int, int], crop: tuple[int, int, int, int]
) -> Tensor:
    """The definition: interpolate, then slice; (B, K, height, width) float32 or float64."""
    logits = _upcast(logits)
    # From class-last strides `interpolate` makes a class-last result, over which softmax is several
    # times slower.
    full = F.interpolate(logits.contiguous(), size=size, mode="bilinear", align_corners=False)
    top, left, height, width = crop
    return full[:, :, top : top + height, left : left + width]


def upsample_argmax_reference(
    logits: Tensor, size: tuple[int, int], crop: tuple[int, int, int, int]
) -> Tensor:
    """The definition of the labels: (B, height, width) of `label_dtype(K)`."""
    return upsample_reference(logits, size, crop).argmax(dim=1).to(label_dtype(logits.shape[1]))


def _upsampled_strips(
    logits: Tensor, size: tuple[int, int], crop: tuple[int, int, int, int]
) -> Iterator[Tensor]:
    """Yield the rows of `upsample_reference` from top to bottom, a bounded number at a time."""
    logits = _upcast(logits).contiguous()
    batch, n_cls, grid_h, _ = logits.shape
    top, left, height, width = crop
    rows = torch.arange(top, top + height, device=logits.device, dtype=logits.dtype)
    scale = logits.new_tensor(grid_h) / size[0]
    source = (scale * (rows + 0.5) - 0.5).clamp(min=0)
    upper = source.long().clamp(max=grid_h - 1)
    lower = (upper + 1).clamp(max=grid_h - 1)
    fraction = (source - upper).unsqueeze(-1)

    step = max(1, STRIP_ELEMENTS // max(1, batch * n_cls * size[1]))
    for start in range(0, height, step):
        part = slice(start, min(start + step, height))
        a = fraction[part]
        strip = (1 - a) * logits[:, :, upper[part]] + a * logits[:, :, lower[part]]
        # One input row per output row: this only interpolates along the rows.
        wide = F.interpolate(
            strip, size=(strip.shape[2], size[1]), mode="bilinear", align_corners=False
        )
        yield wide[..., left : left + width]


@torch.library.custom_op("segmenter_fast::upsample_argmax", mutates_args=(), device_types="cpu")
def _upsample_argmax_op(logits: Tensor, size: Sequence[int], crop: Sequence[int]) -> Tensor:
    logits = _upcast(logits)
    labels = torch.empty(
        (logits.shape[0], *crop[2:]), dtype=label_dtype(logits.shape[1]), device=logits.device
    )
    native_module().upsample_argmax(
        logits.data_ptr(),
        labels.data_ptr(),
        str(logits.dtype).removeprefix("torch."),
        str(labels.dtype).removeprefix("torch."),
        *logits.shape,
        *logits.stride(),
        *size,
        *crop,
        torch.get_num_threads(),
    )
    return labels


@_upsample_argmax_op.register_fake
def _(logits: Tensor, size: Sequence[int], crop: Sequence[int]) -> Tensor:
    shape = (logits.shape[0], crop[2], crop[3])
    return logits.new_empty(shape, dtype=label_dtype(logits.shape[1]))


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
    if resolve_backend(backend, logits.device) == "reference":
        return upsample_argmax_reference(logits.detach(), *geometry)
    return torch.ops.segmenter_fast.upsample_argmax(logits.detach(), *geometry)


def upsample_probabilities(
    logits: Tensor,
    size: tuple[int, int],
    crop: tuple[int, int, int, int] | None = None,
    top1: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Softmax over the classes of the bilinearly upsampled logits.

    Args:
        logits, size, crop, backend: as for `upsample_logits`.
        top1: only the largest probability of each pixel, by strips of rows in bounded memory.

    Returns:
        (B, K, height, width), or (B, height, width) with `top1`; float32, or float64 for float64
        logits; differentiable.

    Raises:
        ValueError: wrong rank, a size that is not positive, a crop outside it.
        TypeError: logits that are not floating point.

    Source: official segm/model/utils.py (softmax after interpolation).
    """
    geometry = check_geometry(logits, size, crop)
    resolve_backend(backend, logits.device)
    if top1:
        strips = [
            strip.softmax(dim=1).amax(dim=1) for strip in _upsampled_strips(logits, *geometry)
        ]
        return torch.cat(strips, dim=1)
    return upsample_reference(logits, *geometry).softmax(dim=1)


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
    size, crop = _check_target(target, logits, size, crop)
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
        _check_labels(target, n_cls, ignore_index)
    upsampled = upsample_reference(logits, size, crop)
    return F.cross_entropy(
        upsampled,
        target.long(),
        weight=None if weight is None else weight.to(upsampled.dtype),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


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
    size, crop = _check_target(target, logits, size, crop)
    n_cls = logits.shape[1]
    _check_labels(target, n_cls, ignore_index)
    labels = upsample_argmax(logits, size, crop, backend=backend)
    target = target.long()
    # Ignored pixels fall into one extra bin, which keeps the shapes fixed.
    bins = torch.where(target == ignore_index, n_cls * n_cls, target * n_cls + labels)
    counts = torch.bincount(bins.flatten(), minlength=n_cls * n_cls + 1)
    return counts[: n_cls * n_cls].view(n_cls, n_cls)
