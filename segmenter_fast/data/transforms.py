"""Training views of an image and its label map, seeded per sample.

Everything random comes from the generator that is passed in, so a sample looks the same for any
number of workers and after a resumed run.
"""

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Luma of an RGB pixel (ITU-R BT.601), the grey that saturation is measured from.
_LUMA = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
# A rotation about the grey axis (1, 1, 1) turns the hue: Rodrigues' formula needs these two.
_GREY_AXIS = torch.full((3, 3), 1 / 3)
_GREY_CROSS = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3**0.5


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Random scale, crop, flip and photometric distortion; zeros and 255 where the crop overhangs.

    Args:
        crop: (height, width) in pixels of the result.
        mean, std: per channel, for images in [0, 1].
        scale: (low, high) of the log-uniform zoom.
        flip: mirror half of the samples.
        jitter: strength of brightness, contrast, saturation and hue; 0 leaves colours alone.
        max_class_share: a crop that one class fills beyond this share is drawn again, at most ten
            times.
        ignore_index: label of pixels without truth.

    Source: Strudel et al. 2021, section 4.2; official segm/data/config (crop, flip and distortion).
    """

    crop: tuple[int, int]
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    scale: tuple[float, float] = (0.5, 2.0)
    flip: bool = True
    jitter: float = 1.0
    max_class_share: float = 0.75
    ignore_index: int = 255

    def __call__(
        self, image: Tensor, target: Tensor, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """(3, H, W) uint8 and (H, W) uint8 to normalised (3, h, w) float32 and (h, w) uint8."""
        low, high = self.scale
        zoom = float(np.exp(rng.uniform(np.log(low), np.log(high))))
        for _ in range(10):
            window = self._window(target.shape, zoom, rng)
            counts = torch.bincount(target[window].flatten(), minlength=self.ignore_index + 1)
            counts[self.ignore_index] = 0
            if counts.max() <= self.max_class_share * counts.sum():
                break
        image, target = image[:, window[0], window[1]], target[window]

        size = [
            min(c, max(1, round(s * zoom))) for c, s in zip(self.crop, target.shape, strict=True)
        ]
        x = image[None].float() / 255
        x = F.interpolate(x, size, mode="bilinear", antialias=zoom < 1)[0].clamp_(0, 1)
        y = F.interpolate(target[None, None], size, mode="nearest-exact")[0, 0]
        if self.flip and rng.random() < 0.5:
            x, y = x.flip(2), y.flip(1)
        if self.jitter:
            x = distort_colours(x, rng, self.jitter)
        x = (x - torch.tensor(self.mean).view(3, 1, 1)) / torch.tensor(self.std).view(3, 1, 1)
        overhang = (0, self.crop[1] - size[1], 0, self.crop[0] - size[0])
        return F.pad(x, overhang), F.pad(y, overhang, value=self.ignore_index)

    def _window(self, shape, zoom, rng) -> tuple[slice, slice]:
        """The part of the source that fills the crop once zoomed: resizing more would be waste."""
        slices = []
        for length, crop in zip(shape, self.crop, strict=True):
            extent = min(length, max(1, round(crop / zoom)))
            start = int(rng.integers(0, length - extent + 1))
            slices.append(slice(start, start + extent))
        return tuple(slices)


def distort_colours(x: Tensor, rng: np.random.Generator, strength: float = 1.0) -> Tensor:
    """Random brightness, contrast, saturation and hue.

    Args:
        x: (3, H, W) float in [0, 1].
        rng: source of randomness.
        strength: 1 is brightness +-0.125, contrast and saturation 0.5 to 1.5, hue +-18 degrees,
            each applied to half of the samples.

    Returns:
        (3, H, W) in [0, 1].
    """

    def draw(width):
        return float(rng.uniform(-width, width)) * strength if rng.random() < 0.5 else 0.0

    brightness, contrast, saturation = draw(32 / 255), 1 + draw(0.5), 1 + draw(0.5)
    angle = np.deg2rad(draw(18.0))
    x = (x + brightness) * contrast
    # Saturation and hue are both linear in the colour, hence one 3 x 3 matrix.
    grey = _LUMA.view(1, 3).expand(3, 3)
    saturate = grey + saturation * (torch.eye(3) - grey)
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    rotate = cos * torch.eye(3) + sin * _GREY_CROSS + (1 - cos) * _GREY_AXIS
    return torch.einsum("ij,jhw->ihw", rotate @ saturate, x).clamp_(0, 1)


class TrainStream(torch.utils.data.Dataset):
    """An endless shuffled stream of transformed samples, numbered from 0.

    Number n is sample n mod len of the permutation of epoch n div len, transformed with a generator
    seeded by (seed, n): resuming at n continues the same stream with any number of workers.

    Args:
        dataset: maps an index to (uint8 image, uint8 target).
        transform: called with (image, target, rng).
        seed: of shuffling and of every sample.
        length: how many samples the stream holds.
    """

    def __init__(self, dataset, transform, seed: int, length: int):
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.length = length
        self._epoch = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        epoch, position = divmod(number, len(self.dataset))
        if epoch != self._epoch:
            order = np.random.default_rng([self.seed, 0, epoch])
            self._order, self._epoch = order.permutation(len(self.dataset)), epoch
        image, target = self.dataset[int(self._order[position])]
        return self.transform(image, target, np.random.default_rng([self.seed, 1, number]))
