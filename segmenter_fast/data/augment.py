"""The paper's augmentation, in bytes on the CPU; `normalise` does the rest where the model is.

Everything random comes from the generator that is passed in. The order is that of the official
pipeline: resize, crop, flip, distort, normalise, pad. The last two are left to `normalise`, so that
a worker hands over bytes, a quarter of what float32 would be.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CROP_TRIES = 10


class Crop(NamedTuple):
    """A training sample.

    Args:
        image: (3, h, w) uint8, zero outside `size`.
        target: (h, w) uint8, `ignore_index` outside `size`.
        size: (2,) int64, height and width that the picture fills from the upper left corner.
    """

    image: Tensor
    target: Tensor
    size: Tensor


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random resize, crop, flip and photometric distortion of a picture and its labels.

    Shrinking averages over all pixels (Pillow's bilinear filter), where OpenCV, which the official
    code uses, reads two per axis and leaves some out. Labels are those of the nearest pixel centre.

    Args:
        crop: (height, width) in pixels of the result.
        base: (long, short) side that the picture is fitted into, keeping its ratio, before the
            random factor; None is its own size. A data set's `base_size` is the paper's.
        factor: (low, high) of the uniform random factor on `base`.
        max_class_share: a crop in which one class has this share of the labelled pixels, or that
            has none, is drawn again, at most ten times; 1 takes every crop.
        flip: mirror half of the samples.
        distortion: strength of the photometric distortion, see `Distortion`; 0 is none.
        ignore_index: label of pixels without a class.

    Raises:
        ValueError: a number that makes no sense, named.

    Source: Strudel et al. 2021, section 4.2; official segm/data/config (MMSegmentation's Resize,
    RandomCrop, RandomFlip, PhotoMetricDistortion and Pad).
    """

    crop: tuple[int, int]
    base: tuple[int, int] | None = None
    factor: tuple[float, float] = (0.5, 2.0)
    max_class_share: float = 0.75
    flip: bool = True
    distortion: float = 1.0
    ignore_index: int = 255

    def __post_init__(self):
        if len(self.crop) != 2 or min(self.crop) < 1:
            raise ValueError(f"crop must be (height, width) in pixels, got {self.crop}")
        if self.base is not None and (len(self.base) != 2 or not self.base[0] >= self.base[1] >= 1):
            raise ValueError(f"base must be (long, short) in pixels or None, got {self.base}")
        if len(self.factor) != 2 or not 0 < self.factor[0] <= self.factor[1] < math.inf:
            raise ValueError(f"factor must be (low, high), 0 < low <= high, got {self.factor}")
        if not 0 < self.max_class_share <= 1:
            raise ValueError(f"max_class_share must be in (0, 1], got {self.max_class_share}")
        if not 0 <= self.distortion <= 2:
            # Beyond 2 the lowest contrast and saturation would be below zero.
            raise ValueError(f"distortion must be in [0, 2], got {self.distortion}")

    def __call__(self, image: Tensor, target: Tensor, rng: np.random.Generator) -> Crop:
        """Augment a sample.

        Args:
            image: (3, H, W) uint8.
            target: (H, W) uint8.
            rng: source of all that is random.

        Raises:
            TypeError: other dtypes.  ValueError: other shapes.
        """
        for name, tensor in (("image", image), ("target", target)):
            if tensor.dtype != torch.uint8:
                raise TypeError(f"{name} must be uint8, got {tensor.dtype}")
        if target.ndim != 2 or image.shape != (3, *target.shape) or 0 in target.shape:
            raise ValueError(
                "image and target must be (3, H, W) and (H, W), "
                f"got {tuple(image.shape)} and {tuple(target.shape)}"
            )
        whole = fitted_size(
            (target.shape[0], target.shape[1]), self.base, rng.uniform(*self.factor)
        )
        size = (min(self.crop[0], whole[0]), min(self.crop[1], whole[1]))
        corner, labels = self._crop(target.numpy(), whole, size, rng)
        pixels = resized_crop(image, whole, corner, size)
        if self.flip and rng.random() < 0.5:
            pixels, labels = pixels[:, ::-1], labels[:, ::-1]
        picture = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
        if self.distortion:
            picture = Distortion.draw(rng, self.distortion)(picture)

        out = torch.zeros((3, *self.crop), dtype=torch.uint8)
        truth = torch.full(self.crop, self.ignore_index, dtype=torch.uint8)
        out[:, : size[0], : size[1]] = picture
        truth[: size[0], : size[1]] = torch.from_numpy(labels.copy())
        return Crop(out, truth, torch.tensor(size))

    def _crop(self, target: np.ndarray, whole, size, rng) -> tuple[tuple[int, int], np.ndarray]:
        """(top, left) in the resized picture and the labels there."""
        margin = (whole[0] - size[0], whole[1] - size[1])

        def draw():
            corner = (int(rng.integers(margin[0] + 1)), int(rng.integers(margin[1] + 1)))
            rows, columns = (
                _nearest(*line) for line in zip(corner, size, whole, target.shape, strict=True)
            )
            return corner, target[rows].take(columns, axis=1)

        corner, labels = draw()
        if self.max_class_share < 1 and any(margin):
            for _ in range(CROP_TRIES):
                counts = np.bincount(labels.ravel(), minlength=256)
                counts[self.ignore_index] = 0
                if counts.max() < self.max_class_share * counts.sum():
                    break
                corner, labels = draw()
        return corner, labels


def fitted_size(
    size: tuple[int, int], base: tuple[int, int] | None, factor: float
) -> tuple[int, int]:
    """(H, W) of a picture resized to fit into `base` (long, short) times `factor`, ratio kept.

    Source: mmcv.imrescale after MMSegmentation's Resize with ratio_range.
    """
    long, short = base or (max(size), min(size))
    ratio = min(int(long * factor) / max(size), int(short * factor) / min(size))
    return max(1, int(size[0] * ratio + 0.5)), max(1, int(size[1] * ratio + 0.5))


def _nearest(start: int, count: int, whole: int, length: int) -> np.ndarray:
    """Pixels of `length` under the centres of pixels start to start + count of `whole`."""
    # floor((i + 1/2) length / whole) in whole numbers, which no rounding can move.
    return (2 * np.arange(start, start + count) + 1) * length // (2 * whole)


def resized_crop(
    image: Tensor, whole: tuple[int, int], corner: tuple[int, int], size: tuple[int, int]
) -> np.ndarray:
    """A crop of an image resized to `whole`, at the price of the crop alone.

    Args:
        image: (3, H, W) uint8.
        whole: (H', W') of the resized image.
        corner: (top, left) of the crop in it.
        size: (h, w) of the crop.

    Returns:
        (h, w, 3) uint8.
    """
    windows, box = [], []
    for length, resized, start, count in zip(image.shape[1:], whole, corner, size, strict=True):
        step = length / resized
        low, high = start * step, min((start + count) * step, length)
        # The filter reaches this far beyond the pixels of the crop.
        reach = max(1.0, step)
        first, last = max(0, math.floor(low - reach)), min(length, math.ceil(high + reach))
        windows.append(slice(first, last))
        box.append((low - first, high - first))
    source = image[:, windows[0], windows[1]].permute(1, 2, 0).contiguous().numpy()
    (top, bottom), (left, right) = box
    return np.asarray(
        Image.fromarray(source).resize(
            size[::-1], Image.Resampling.BILINEAR, box=(left, top, right, bottom)
        )
    )


@dataclasses.dataclass(frozen=True)
class Distortion:
    """Brightness, contrast, saturation and hue, in this order or with contrast last.

    Brightness adds to every byte, contrast multiplies it; both cut off fractions and stay within 0
    to 255. Saturation multiplies S and hue adds to H of the colour as HSV.

    Args:
        brightness: in levels of 0 to 255.
        contrast, saturation: factors.
        hue: in degrees.
        contrast_last: contrast comes after the hue.

    Source: MMSegmentation's PhotoMetricDistortion.
    """

    brightness: float = 0.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    contrast_last: bool = False

    @classmethod
    def draw(cls, rng: np.random.Generator, strength: float = 1.0) -> "Distortion":
        """A random one; each of the four is left out half of the time.

        At strength 1 brightness is within +-32, contrast and saturation within 0.5 to 1.5, and hue
        within +-36 degrees, which is 18 in OpenCV's units.
        """

        def within(width: float) -> float:
            amount = strength * float(rng.uniform(-width, width))
            return amount if rng.random() < 0.5 else 0.0

        return cls(within(32), 1 + within(0.5), 1 + within(0.5), within(36), rng.random() < 0.5)

    def __call__(self, image: Tensor) -> Tensor:
        """(3, H, W) uint8 to (3, H, W) uint8."""
        levels = np.arange(256, dtype=np.float32)
        table = (levels + self.brightness).clip(0, 255).astype(np.uint8)
        contrast = (levels * self.contrast).clip(0, 255).astype(np.uint8)
        if not self.contrast_last:
            table = contrast[table]
        image = _looked_up(image, table)
        if self.saturation != 1 or self.hue:
            image = _recoloured(image, self.saturation, self.hue / 60)
        return _looked_up(image, contrast) if self.contrast_last else image


def _looked_up(image: Tensor, table: np.ndarray) -> Tensor:
    return torch.from_numpy(table.take(image.numpy()))


def _recoloured(image: Tensor, saturation: float, turn: float) -> Tensor:
    """Multiply S and add `turn` sextants to H of a picture, whose V stays.

    With V = max, C = V - min and S = C / V, the channel n = 5, 3, 1 (red, green, blue) of a colour
    with hue H in sextants is V - C clip(2 - |(n + H mod 6) - 2|, 0, 1).
    """
    red, green, blue = image.float()
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    after = torch.minimum(chroma * saturation, value)  # S is at most 1
    per_chroma = chroma.clamp_min(1).reciprocal_()  # grey has no hue: any will do
    out = torch.empty_like(image)
    if not turn:
        shrink = after.mul_(per_chroma)
        for channel, old in zip(out, (red, green, blue), strict=True):
            channel.copy_(value.add(value.sub(old).mul_(shrink), alpha=-1).add_(0.5))
        return out
    hue = torch.where(
        value == red,
        (green - blue).mul_(per_chroma),
        torch.where(
            value == green,
            (blue - red).mul_(per_chroma).add_(2),
            (red - green).mul_(per_chroma).add_(4),
        ),
    )
    for channel, n in zip(out, (5, 3, 1), strict=True):
        place = hue.add(n + turn)
        place.sub_(place.div(6).floor_(), alpha=6)
        share = place.sub_(2).abs_().neg_().add_(2).clamp_(0, 1)
        channel.copy_(value.addcmul(after, share, value=-1).add_(0.5))
    return out


def normalise(
    images: Tensor,
    sizes: Tensor | None,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Network input (x / 255 - mean) / std, and zero outside of each picture.

    Args:
        images: (B, 3, H, W) uint8.
        sizes: (B, 2) integers, height and width that each picture fills from the upper left corner,
            on the device of `images`; None where all are full.
        mean, std: per channel, for images in [0, 1]; a model's config has them.
        dtype: of the result; the arithmetic is in float32, or float64 for float64.

    Returns:
        (B, 3, H, W) in `dtype` on the device of `images`.

    Raises:
        TypeError: images are not uint8, or dtype is not a floating-point type.
        ValueError: shapes other than these.
    """
    if images.dtype != torch.uint8 or not dtype.is_floating_point:
        raise TypeError(
            f"images must be uint8 and dtype floating point, got {images.dtype} and {dtype}"
        )
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
    if sizes is not None and sizes.shape != (len(images), 2):
        raise ValueError(f"sizes must be ({len(images)}, 2), got {tuple(sizes.shape)}")
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    shift, scale = (
        torch.tensor(v, dtype=exact).to(images.device, non_blocking=True).view(1, 3, 1, 1)
        for v in (mean, std)
    )
    x = images.to(exact).div_(255).sub_(shift).div_(scale).to(dtype)
    if sizes is None:
        return x
    height, width = images.shape[2:]
    rows = torch.arange(height, device=images.device) < sizes[:, :1]
    columns = torch.arange(width, device=images.device) < sizes[:, 1:]
    return x.masked_fill_(~(rows[:, None, :, None] & columns[:, None, None, :]), 0)
