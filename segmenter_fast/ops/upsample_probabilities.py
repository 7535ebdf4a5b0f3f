"""Softmax over classes of bilinearly upsampled patch logits, or its largest entry.

p_k(Y, X) = exp(z_k) / sum_c exp(z_c)          z as in ops/upsample.py
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from segmenter_fast.backend import resolve_backend
from segmenter_fast.ops.upsample import check_geometry, upcast, upsample_reference

STRIP_ELEMENTS = 1 << 22
"""Upsampled logits held at once when only one number per pixel is kept (16 MiB in float32)."""


def _upsampled_strips(
    logits: Tensor, size: tuple[int, int], crop: tuple[int, int, int, int]
) -> Iterator[Tensor]:
    """Yield the rows of `upsample_reference` from top to bottom, a bounded number at a time."""
    logits = upcast(logits).contiguous()
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
