"""Inputs that the tests of every reader of patch logits share."""

import pytest
import torch
import torch.nn.functional as F
from checks import with_spikes
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)

# (B, K, h, w), size, crop
SHAPES = {
    "patch 16": ((1, 150, 4, 6), (64, 96), None),
    "prime sizes": ((2, 19, 7, 5), (113, 67), (3, 5, 101, 53)),
    "one patch": ((2, 5, 1, 1), (17, 13), None),
    "one row of patches": ((1, 7, 1, 9), (16, 144), (0, 16, 16, 31)),
    "one class": ((1, 1, 3, 4), (12, 16), None),
    "int16 labels": ((1, 300, 3, 3), (29, 31), None),
    "downscale": ((2, 11, 13, 17), (5, 7), (1, 2, 3, 4)),
    "same size": ((1, 6, 8, 9), (8, 9), None),
    "one pixel": ((1, 6, 8, 9), (31, 37), (30, 36, 1, 1)),
    "mixed": ((1, 6, 3, 40), (31, 11), None),
}
shapes = pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)


def noise(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return with_spikes(torch.randn(shape, generator=generator)).to(dtype)


def random_target(shape: tuple[int, ...], n_cls: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Labels with about a fifth of the pixels ignored (255)."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(0, n_cls, shape, generator=generator)
    return target.masked_fill(torch.rand(shape, generator=generator) < 0.2, 255).to(dtype)


def plain_logits(logits: Tensor, size: tuple[int, int], crop: tuple | None = None) -> Tensor:
    """Full-resolution logits, written apart from the library."""
    if logits.dtype in HALF:
        logits = logits.float()
    full = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    top, left, height, width = crop or (0, 0, *size)
    return full[:, :, top : top + height, left : left + width]


STRIDED_LAYOUTS = ("class last", "every second", "expanded", "transposed grid")


def strided_as(layout: str, dense: Tensor) -> Tensor:
    """A tensor of these strides; the same numbers unless "expanded", which repeats one image."""
    return {
        "class last": lambda: dense.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        "every second": lambda: dense.repeat_interleave(2, dim=3).repeat_interleave(2, 1)[
            :, ::2, :, ::2
        ],
        "expanded": lambda: dense[:1].expand(dense.shape[0], -1, -1, -1),
        "transposed grid": lambda: dense.transpose(2, 3).contiguous().transpose(2, 3),
    }[layout]()


GOOD = torch.zeros(1, 3, 2, 2)
LABELS = torch.zeros(1, 8, 8, dtype=torch.int64)

bad_geometry = pytest.mark.parametrize(
    ("logits", "size", "crop", "error", "text"),
    [
        (GOOD[0], (8, 8), None, ValueError, r"\(B, K, h, w\), got shape \(3, 2, 2\)"),
        (
            GOOD.long(),
            (8, 8),
            None,
            TypeError,
            "float16, bfloat16, float32 or float64, got .*int64",
        ),
        ("logits", (8, 8), None, TypeError, "must be a tensor, got str"),
        (GOOD[:, :0], (8, 8), None, ValueError, "at least one class"),
        (GOOD[:, :, :0], (8, 8), None, ValueError, "at least one class and one patch"),
        (GOOD, (0, 8), None, ValueError, r"size must be positive, got \(0, 8\)"),
        (GOOD, (8, 8, 8), None, ValueError, r"size must be \(H, W\), got \(8, 8, 8\)"),
        (GOOD, 8, None, ValueError, r"size must be \(H, W\), got 8"),
        (GOOD, (8.0, 8), None, TypeError, "size must hold ints, got 8.0"),
        (GOOD, (8, 8), (0, 0, 9, 8), ValueError, r"inside size \(8, 8\), got \(0, 0, 9, 8\)"),
        (GOOD, (8, 8), (-1, 0, 2, 2), ValueError, "inside size"),
        (GOOD, (8, 8), (0, 7, 2, 2), ValueError, "inside size"),
        (GOOD, (8, 8), (0, 0, 0, 2), ValueError, "non-empty"),
        (GOOD, (8, 8), (0, 0, 2), ValueError, r"crop must be \(top, left, height, width\)"),
    ],
)
bad_target = pytest.mark.parametrize(
    ("target", "options", "error", "text"),
    [
        (LABELS.float(), {}, TypeError, "uint8, int16, int32 or int64, got torch.float32"),
        ([0], {}, TypeError, "target must be a tensor, got list"),
        (LABELS[0], {}, ValueError, r"\(B, height, width\), got shape \(8, 8\)"),
        (LABELS.expand(2, 8, 8), {}, ValueError, r"\(1, 8, 8\) .*got \(2, 8, 8\)"),
        (LABELS, {"size": (9, 8)}, ValueError, r"\(1, 9, 8\) .*got \(1, 8, 8\)"),
        (LABELS, {"crop": (0, 0, 8, 8)}, ValueError, "pass size together with crop"),
        (LABELS.to("meta"), {}, ValueError, "target is on meta and logits are on cpu"),
        (LABELS + 3, {}, ValueError, r"64 pixels .*outside \[0, 3\).*ignore_index=255: 3"),
        (LABELS - 1, {}, ValueError, "ignore_index=255: -1"),
        (LABELS + 254, {"ignore_index": -100}, ValueError, "ignore_index=-100: 254"),
        ((LABELS + 200).byte(), {"ignore_index": 456}, ValueError, "ignore_index=456: 200"),
    ],
)
