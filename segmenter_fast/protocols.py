"""How pictures are resized and cut into windows when a model is measured: the protocols by name.

The official code has two. Its training validates with the stride in its table; its stand-alone
evaluation, the command for finished weights, with windows that overlap by 32 pixels. Both keep each
picture's ratio, resize without antialiasing, and compare at the label map's own size. Only their
rounding of resized pictures to 8 bits is left out here.
"""

from fractions import Fraction
from typing import Any, NamedTuple

from segmenter_fast.config import SegmenterConfig

MULTISCALE = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Scales of the paper's multi-scale results, with mirror images (official segm/data/base.py)."""

OVERLAP = 32
"""Pixels that two windows share in stand-alone evaluation (official segm/eval/miou.py)."""

NAMES = {
    "train": "as in official training",
    "eval": "as in official stand-alone evaluation",
    "weights": "the weights' own",
}


class Validation(NamedTuple):
    """What the official code does with the validation pictures of one dataset.

    Args:
        short_side: pixels of the shorter side.
        max_ratio: the longer side is at most so many times `short_side`.
        stride: of the windows in training, as a share of their size.
    """

    short_side: int
    max_ratio: int
    stride: Fraction


# short_side and stride: official segm/config.yml, im_size and window_stride / window_size, that is
# 512 / 512, 320 / 480 and 512 / 768. max_ratio: segm/data/config/*.py.
OFFICIAL = {
    "ade20k": Validation(512, 4, Fraction(1)),
    "pascal_context": Validation(520, 8, Fraction(2, 3)),
    "cityscapes": Validation(1024, 2, Fraction(2, 3)),
}


class Protocol(NamedTuple):
    """Everything about a prediction that a measured number depends on, but for the weights.

    Args:
        name: "train", "eval" or "weights".
        changed: options of windows and size whose values differ from those of that name.
        window_size, window_stride: in pixels; "whole" and None for whole images.
        scales, flip: views that are averaged.
        short_side, long_side: pixels, as `predict` takes them.
        antialias: as `predict` takes it.
    """

    name: str
    changed: tuple[str, ...]
    window_size: int | str
    window_stride: int | None
    scales: tuple[float, ...]
    flip: bool
    short_side: int | str
    long_side: int | None
    antialias: bool

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `predict`."""
        return {name: getattr(self, name) for name in self._fields[2:]}

    def __str__(self) -> str:
        sides = f"shorter side {self.short_side} pixels"
        if self.long_side is not None:
            sides += f", longer at most {self.long_side}"
        changed = f" but for {', '.join(self.changed)}" if self.changed else ""
        return ", ".join(
            (
                f"{self.name} ({NAMES[self.name]}{changed}): "
                + (
                    "whole images"
                    if self.window_size == "whole"
                    else f"windows of {self.window_size} pixels every {self.window_stride}"
                ),
                f"scales {' '.join(f'{scale:g}' for scale in self.scales)}",
                "with mirror images" if self.flip else "no mirror images",
                "images at their own size" if self.short_side == "original" else sides,
            )
        )


def protocol(
    config: SegmenterConfig,
    name: str | None = None,
    dataset: str | None = None,
    window_size: int | str | None = None,
    window_stride: int | None = None,
    short_side: int | str | None = None,
    scales: tuple[float, ...] = (1.0,),
    flip: bool = False,
) -> Protocol:
    """The protocol of a name for some weights and a dataset.

    "train" and "eval" have windows of the training crop. In "train" the stride is the dataset's
    share of the window, in "eval" it is the window less 32 pixels. The shorter side is the
    dataset's; in "train" that which the weights were trained with, where they were trained on this
    dataset. Datasets without an entry in `OFFICIAL` take the weights' shorter side, and windows
    side by side in "train". "weights" has the windows and the size that `predict` defaults to; its
    stride goes with its window, and other windows lie side by side.

    Args:
        config: of the weights.
        name: "train", "eval" or "weights"; None is "eval" for datasets in `OFFICIAL` and else
            "weights".
        dataset: a name as in `OFFICIAL`, or any other.
        window_size, window_stride, short_side: as in `predict`; instead of the protocol's.
        scales, flip: as in `predict`.

    Raises:
        ValueError: an unknown name, a window that 32 pixels of overlap leave no stride, or a
            stride for whole images.

    Source: official segm/train.py and segm/eval/miou.py, with segm/config.yml.
    """
    if name is None:
        name = "eval" if dataset in OFFICIAL else "weights"
    if name not in NAMES:
        raise ValueError(f"protocol must be one of {', '.join(NAMES)}; got {name!r}")
    official = OFFICIAL.get(dataset or "") if name != "weights" else None

    own_size = (config.window_size or "whole") if name == "weights" else min(config.image_size)
    own_stride = _stride(config, name, official, own_size)
    if window_size is None:
        window_size = own_size
    if window_size == "whole":
        if window_stride is not None:
            raise ValueError(
                f"a window stride of {window_stride} needs windows, but the network sees whole "
                "images: give a window size, too, or leave the stride out"
            )
    elif window_stride is None:
        window_stride = _stride(config, name, official, window_size)
        if window_stride < 1:
            raise ValueError(
                f"protocol 'eval' has windows that overlap by {OVERLAP} pixels, too many for "
                f"windows of {window_size}: give a window stride"
            )

    long_side = None
    own_side = config.short_side
    if official and not (own_side and name == "train" and config.dataset == dataset):
        own_side = official.short_side
    own_side = own_side or "original"
    if short_side is None:
        short_side = own_side
    differ = {
        "window_size": window_size != own_size,
        "window_stride": window_stride not in (None, own_stride),
        "short_side": short_side != own_side,
    }
    if official is not None and isinstance(short_side, int):
        long_side = official.max_ratio * short_side
    return Protocol(
        name,
        tuple(option for option, other in differ.items() if other),
        window_size,
        window_stride,
        tuple(scales),
        bool(flip),
        short_side,
        long_side,
        name == "weights",
    )


def _stride(config: SegmenterConfig, name: str, official: Validation | None, size) -> int | None:
    """The stride of a protocol for windows of `size`; None for whole images."""
    if size == "whole":
        return None
    if name == "eval":
        return size - OVERLAP
    if name == "weights" and size == config.window_size:
        return config.window_stride or size
    return size if official is None else int(size * official.stride)
