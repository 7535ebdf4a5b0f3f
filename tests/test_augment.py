"""The augmentation: sizes, the crop rule, colours against a slow plain implementation, padding."""

import colorsys
import math

import numpy as np
import pytest
import torch
from PIL import Image

from segmenter_fast.config import NORMALIZATION
from segmenter_fast.data import Augmentation, normalise
from segmenter_fast.data.augment import CROP_TRIES, Distortion, fitted_size, resized_crop


def rng(seed=0):
    return np.random.default_rng(seed)


def noise(height=40, width=60, seed=0):
    return torch.from_numpy(rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8))


@pytest.fixture
def sample():
    """Colour encodes the label, so that image and label can be checked to move together."""
    label = torch.zeros(40, 60, dtype=torch.uint8)
    label[:, 30:] = 1
    label[20:, :] += 2
    return (label * 60).expand(3, -1, -1).contiguous(), label


# --- Sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "base", "factor", "expected"),
    [
        ((512, 683), (2048, 512), 1.0, (512, 683)),  # the short side becomes 512
        ((683, 512), (2048, 512), 0.5, (342, 256)),
        ((100, 1000), (2048, 512), 1.0, (205, 2048)),  # the long side is the limit
        ((375, 500), (512, 512), 1.0, (384, 512)),
        ((1024, 2048), (2048, 1024), 1.237, (1266, 2532)),
        ((375, 500), (512, 512), 0.777, (298, 397)),  # the base is cut to 397, not 397.8
        ((40, 60), None, 1.5, (60, 90)),
        ((3, 500), None, 0.5, (1, 167)),
        ((1, 1), None, 2.0, (2, 2)),
    ],
)
def test_fitted_size(size, base, factor, expected):
    assert fitted_size(size, base, factor) == expected


@pytest.mark.parametrize("whole", [(40, 60), (27, 41), (10, 15), (93, 140), (1, 7)])
def test_resized_crop_is_a_crop_of_the_resized_image(whole):
    """Only the part that is needed is resized; it equals resizing all of it."""
    image = noise()
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    full = np.asarray(picture.resize(whole[::-1], Image.Resampling.BILINEAR)).astype(int)
    size = (min(16, (whole[0] + 1) // 2), min(24, whole[1] // 2))
    for seed in range(6):
        top, left = (int(rng(seed).integers(w - s + 1)) for w, s in zip(whole, size, strict=True))
        crop = resized_crop(image, whole, (top, left), size)
        expected = full[top : top + size[0], left : left + size[1]]
        assert crop.shape == (*size, 3) and np.abs(crop - expected).max() <= 1  # rounding


def test_factor_is_uniform_and_within_its_limits():
    transform = Augmentation((400, 400), (200, 100), distortion=0.0, max_class_share=1.0)
    image, target = noise(50, 100), torch.zeros(50, 100, dtype=torch.uint8)
    generator = rng()
    heights = [transform(image, target, generator).size[0].item() for _ in range(400)]
    assert min(heights) >= 50 and max(heights) <= 200
    assert np.mean(heights) == pytest.approx(125, abs=7)  # log-uniform would be 108
    assert np.mean([height < 100 for height in heights]) == pytest.approx(1 / 3, abs=0.07)


@pytest.mark.parametrize("factor", [(0.4, 0.4), (1.0, 1.0), (2.3, 2.3), (0.5, 2.0)])
@pytest.mark.parametrize("crop", [(32, 32), (24, 72), (64, 96)])
def test_image_and_labels_move_together(sample, crop, factor):
    transform = Augmentation(crop, None, factor, distortion=0.0, max_class_share=1.0)
    mirrored = set()
    for seed in range(8):
        image, target, size = transform(*sample, rng(seed))
        assert image.shape == (3, *crop) and image.dtype == torch.uint8
        assert target.shape == crop and target.dtype == torch.uint8
        height, width = size.tolist()
        image, target = image[:, :height, :width], target[:height, :width]
        assert (target != 255).all()
        difference = (image[0].float() / 60 - target).abs()
        # Only a blended border may differ, and it runs along one row and one column.
        border = (target.diff(dim=0) != 0).any(1).sum() + (target.diff(dim=1) != 0).any(0).sum()
        assert border <= 2
        assert (difference > 0.3).float().mean() <= 4 * (1 / height + 1 / width)
        mirrored.add((target[0].diff() == -1).any().item())
    if factor != (2.3, 2.3) and crop[1] >= 72:  # always shows the border of left and right
        assert mirrored == {True, False}


def test_labels_are_those_of_the_nearest_pixel_centre():
    target = torch.arange(6, dtype=torch.uint8).expand(2, 6).contiguous()
    image = target.expand(3, 2, 6).contiguous()
    transform = Augmentation((9, 9), (9, 3), (1, 1), flip=False, distortion=0.0, ignore_index=77)
    labels = transform(image, target, rng()).target
    # 6 pixels become 9: centres 1/3, 1, 5/3, 7/3, 3, ... of the old pixels
    assert labels[0].tolist() == [0, 1, 1, 2, 3, 3, 4, 5, 5]
    assert (labels[3:] == 77).all()


# --- The crop rule -------------------------------------------------------------------------------


def count_classes(share, label, draws=100, ignore_index=255):
    image = torch.zeros(3, *label.shape, dtype=torch.uint8)
    transform = Augmentation(
        (24, 24), None, (1, 1), share, distortion=0.0, ignore_index=ignore_index
    )
    targets = [transform(image, label, rng(seed)).target for seed in range(draws)]
    return [np.bincount(target[target != ignore_index].numpy(), minlength=2) for target in targets]


def test_crops_that_one_class_fills_are_drawn_again():
    """Half the image is one class: without the rule many crops hold nothing else."""
    label = torch.zeros(64, 64, dtype=torch.uint8)
    label[:, 34:] = 1

    def too_full(share):
        return sum(c.max() >= 0.75 * c.sum() for c in count_classes(share, label))

    # A crop passes with probability 12 / 41: 0.71 fail at first, and 0.71^11 = 0.02 always.
    assert 50 < too_full(1.0) < 90
    assert too_full(0.75) <= 8


def test_crop_rule_ignores_void():
    """70 % void and 30 % of two classes in equal shares is a good crop; one class alone is not."""
    label = torch.full((24, 400), 255, dtype=torch.uint8)
    label[:4] = 0
    label[4:8] = 1
    draws = []

    class Counting(np.random.Generator):
        def integers(self, *args, **options):
            draws.append(args)
            return super().integers(*args, **options)

    def tries(label, share=0.75, ignore_index=255):
        draws.clear()
        transform = Augmentation((24, 24), None, (1, 1), share, ignore_index=ignore_index)
        image = torch.zeros(3, *label.shape, dtype=torch.uint8)
        transform(image, label, Counting(np.random.PCG64(0)))
        return len(draws) // 2

    assert tries(label) == 1
    assert tries(label, ignore_index=7) == 1  # 255 is then a class, of two thirds
    label[:4] = 1
    assert tries(label) == 1 + CROP_TRIES == 11
    assert tries(label, share=1.0) == 1
    label[:] = 255
    assert tries(label) == 11
    label[:, :] = 0
    assert tries(label[:, :20]) == 1  # no other crop exists


# --- Colours -------------------------------------------------------------------------------------


def plain_distortion(image, brightness, contrast, saturation, hue, contrast_last):
    """Pixel by pixel, with the standard library's HSV and no rounding in between."""

    def cut(value):
        return int(min(max(value, 0.0), 255.0))

    out = np.zeros_like(image)
    for y in range(image.shape[1]):
        for x in range(image.shape[2]):
            pixel = [cut(float(c) + brightness) for c in image[:, y, x]]
            if not contrast_last:
                pixel = [cut(c * contrast) for c in pixel]
            h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in pixel))
            s, h = min(s * saturation, 1.0), (h + hue / 360) % 1.0
            pixel = [math.floor(255 * c + 0.5) for c in colorsys.hsv_to_rgb(h, s, v)]
            if contrast_last:
                pixel = [cut(c * contrast) for c in pixel]
            out[:, y, x] = pixel
    return out


@pytest.mark.parametrize("hue", [0.0, 17.0, -36.0, 36.0, 180.0])
@pytest.mark.parametrize("saturation", [0.53, 1.0, 1.47])  # no ties
@pytest.mark.parametrize("last", [False, True])
def test_distortion_matches_a_plain_implementation(hue, saturation, last):
    image = noise(12, 16)
    # Corners of the colour cube: grey, black, white, two equal channels.
    for column, colour in enumerate([(0, 0, 0), (255,) * 3, (9, 9, 9), (200, 200, 3), (7, 90, 90)]):
        image[:, 0, column] = torch.tensor(colour, dtype=torch.uint8)
    for brightness, contrast in ((0.0, 1.0), (31.5, 0.5), (-20.25, 1.5)):
        ours = Distortion(brightness, contrast, saturation, hue, last)(image)
        plain = plain_distortion(image.numpy(), brightness, contrast, saturation, hue, last)
        off = np.abs(ours.numpy().astype(int) - plain)
        # Close to the middle of two levels float32 may take the other one, and the contrast that
        # follows may then make two of it.
        assert off.max() <= (2 if last else 1) and (off > 0).mean() < 0.02


def test_distortion_leaves_what_it_should():
    image = noise(9, 11)
    assert torch.equal(Distortion()(image), image)
    assert torch.equal(Distortion(contrast_last=True)(image), image)
    grey = torch.full((3, 2, 2), 90, dtype=torch.uint8)
    assert torch.equal(Distortion(saturation=1.5, hue=30)(grey), grey)
    turned = Distortion(hue=120.0)(image)  # a third of the circle permutes the channels
    assert torch.equal(turned, image[[2, 0, 1]])
    value = image.amax(0)
    assert torch.equal(Distortion(hue=23.0, saturation=0.7)(image).amax(0), value)


def test_drawn_distortions():
    drawn = [Distortion.draw(rng(seed)) for seed in range(400)]
    for name, neutral, width in (
        ("brightness", 0, 32),
        ("contrast", 1, 0.5),
        ("saturation", 1, 0.5),
        ("hue", 0, 36),
    ):
        values = np.array([getattr(d, name) for d in drawn]) - neutral
        assert np.mean(values == 0) == pytest.approx(0.5, abs=0.1), name
        assert 0.9 * width < values.max() <= width and -width <= values.min() < -0.9 * width, name
    assert np.mean([d.contrast_last for d in drawn]) == pytest.approx(0.5, abs=0.1)
    assert Distortion.draw(rng(3), 0.0) == Distortion(contrast_last=drawn[3].contrast_last)


# --- Padding and normalisation -------------------------------------------------------------------


@pytest.mark.parametrize("family", ["vit", "deit"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_normalise(family, dtype):
    mean, std = NORMALIZATION[family]
    images = torch.stack([noise(6, 7, seed) for seed in range(3)])
    sizes = torch.tensor([[6, 7], [4, 7], [2, 3]])
    out = normalise(images, sizes, mean, std, dtype)
    assert out.shape == images.shape and out.dtype == dtype
    for b, (height, width) in enumerate(sizes.tolist()):
        for c in range(3):
            exact = (images[b, c].double() / 255 - mean[c]) / std[c]
            inside = out[b, c, :height, :width].double()
            working = torch.float64 if dtype == torch.float64 else torch.float32
            torch.testing.assert_close(
                inside,
                exact[:height, :width],
                rtol=2 * torch.finfo(dtype).eps,
                atol=8 * torch.finfo(working).eps,  # what is left of 1 after the mean
            )
        assert (out[b, :, height:] == 0).all() and (out[b, :, :, width:] == 0).all()
    torch.testing.assert_close(normalise(images[:1], None, mean, std, dtype), out[:1])


def test_normalise_refuses_what_it_cannot_mean():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    half = (0.5,) * 3
    with pytest.raises(TypeError, match=r"got torch\.float32 and"):
        normalise(images.float(), None, half, half)
    with pytest.raises(TypeError, match=r"and torch\.int64"):
        normalise(images, None, half, half, torch.int64)
    with pytest.raises(ValueError, match=r"must be \(B, 3, H, W\), got \(3, 4, 4\)"):
        normalise(images[0], None, half, half)
    with pytest.raises(ValueError, match=r"must be \(2, 2\), got \(1, 2\)"):
        normalise(images, torch.ones(1, 2), half, half)


def test_padding(sample):
    """Zeros after the normalisation and void in the labels, where the picture does not reach."""
    transform = Augmentation((64, 64), None, (0.5, 0.5))
    image, target, size = transform(*sample, rng())
    assert size.tolist() == [20, 30]
    assert (target[20:] == 255).all() and (target[:, 30:] == 255).all()
    assert (target[:20, :30] != 255).all()
    x = normalise(image[None], size[None], *NORMALIZATION["vit"])[0]
    assert (x[:, 20:] == 0).all() and (x[:, :, 30:] == 0).all()
    assert (x[:, :20, :30] != 0).any()


def test_seeds(sample):
    transform = Augmentation((32, 32))
    first, same, other = (transform(noise(), sample[1], rng(seed)) for seed in (1, 1, 2))
    assert all(map(torch.equal, first, same))
    assert not torch.equal(first.image, other.image)


def test_colours_are_distorted_inside_the_picture_alone(sample):
    """The same draws but for the distortion, which comes last."""
    with_, without = (Augmentation((64, 64), None, (0.5, 1), distortion=s) for s in (1.0, 0.0))
    changed = 0
    for seed in range(20):
        ours, plain = with_(*sample, rng(seed)), without(*sample, rng(seed))
        assert torch.equal(ours.target, plain.target)
        height, width = ours.size.tolist()
        assert not ours.image[:, height:].any() and not ours.image[:, :, width:].any()
        changed += not torch.equal(ours.image, plain.image)
    assert changed >= 15  # one in sixteen has nothing to distort


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop": (0, 8)}, "crop must be"),
        ({"base": (512, 2048)}, r"base must be \(long, short\)"),
        ({"factor": (2, 1)}, "factor must be"),
        ({"max_class_share": 0.0}, "max_class_share must be"),
        ({"distortion": -1.0}, "distortion must be"),
    ],
)
def test_rejects_bad_numbers(change, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**{"crop": (8, 8), **change})


def test_rejects_bad_samples(sample):
    transform = Augmentation((8, 8))
    with pytest.raises(TypeError, match=r"target must be uint8, got torch\.int64"):
        transform(sample[0], sample[1].long(), rng())
    with pytest.raises(ValueError, match=r"got \(3, 40, 60\) and \(40, 59\)"):
        transform(sample[0], sample[1][:, 1:], rng())
