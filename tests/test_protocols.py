"""The protocols by name: windows, strides and the sizes that pictures are resized to."""

import pytest
import torch
import torch.nn.functional as F

from segmenter_fast import SegmenterConfig, predict
from segmenter_fast.inference import rescaled_size
from segmenter_fast.protocols import MULTISCALE, protocol
from segmenter_fast.variants import create_model_from_config

CONFIG = SegmenterConfig(
    n_cls=3,
    image_size=(64, 64),
    patch_size=32,
    d_model=32,
    n_layers=1,
    n_heads=2,
    decoder_n_layers=1,
)


def config(crop, **changes):
    return CONFIG.replace(image_size=crop, **changes)


@pytest.mark.parametrize(
    ("name", "dataset", "crop", "expected"),
    [
        ("train", "ade20k", 512, (512, 512, 512, 2048)),
        ("eval", "ade20k", 512, (512, 480, 512, 2048)),
        ("train", "ade20k", 640, (640, 640, 512, 2048)),
        ("eval", "ade20k", 640, (640, 608, 512, 2048)),
        ("train", "pascal_context", 480, (480, 320, 520, 4160)),
        ("eval", "pascal_context", 480, (480, 448, 520, 4160)),
        ("train", "cityscapes", 768, (768, 512, 1024, 2048)),
        ("eval", "cityscapes", 768, (768, 736, 1024, 2048)),
        ("train", "camvid", 288, (288, 288, "original", None)),
        ("eval", "camvid", 288, (288, 256, "original", None)),
    ],
)
def test_official_numbers(name, dataset, crop, expected):
    used = protocol(config((crop, crop)), name, dataset)
    assert used[2:4] + used[6:8] == expected
    assert used.name == name and used.changed == () and not used.antialias
    assert used.scales == (1.0,) and not used.flip


def test_weights_trained_at_another_size():
    """Seg-L-Mask/16 learned ADE20K at 640 pixels; stand-alone evaluation has 512 all the same."""
    large = config((640, 640), short_side=640, dataset="ade20k")
    assert protocol(large, "train", "ade20k")[6:8] == (640, 2560)
    assert protocol(large, "eval", "ade20k")[6:8] == (512, 2048)
    assert protocol(large, "train", "cityscapes")[6:8] == (1024, 2048)
    assert protocol(large, "train", "camvid")[6:8] == (640, None)
    # The crop is the shorter side of those that are no squares.
    assert protocol(config((64, 96)), "train", "camvid").window_size == 64


def test_the_weights_own():
    own = config((64, 64), window_size=64, window_stride=24, short_side=80)
    used = protocol(own, "weights", "ade20k")
    assert used[2:4] + used[6:8] == (64, 24, 80, None) and used.antialias
    whole = protocol(config((64, 64)), "weights", "camvid")
    assert whole[2:4] == ("whole", None) and whole.short_side == "original"
    assert protocol(own, dataset="camvid").name == protocol(own).name == "weights"
    for dataset in ("ade20k", "cityscapes", "pascal_context"):
        assert protocol(own, dataset=dataset).name == "eval"


def test_changes_are_named():
    plain = config((512, 512))
    used = protocol(plain, "eval", "ade20k", window_size=300, scales=MULTISCALE, flip=True)
    assert used[2:4] == (300, 268) and used.changed == ("window_size", "window_stride")
    assert str(used) == (
        "eval (as in official stand-alone evaluation but for window_size, window_stride): windows "
        "of 300 pixels every 268, scales 0.5 0.75 1 1.25 1.5 1.75, with mirror images, shorter "
        "side 512 pixels, longer at most 2048"
    )
    used = protocol(plain, "train", "cityscapes", window_stride=99, short_side=100)
    assert used.window_stride == 99 and (used.short_side, used.long_side) == (100, 200)
    used = protocol(plain, "train", "cityscapes", short_side="original", window_size="whole")
    assert str(used) == (
        "train (as in official training but for window_size, short_side): whole images, scales 1, "
        "no mirror images, images at their own size"
    )


def test_values_of_the_protocol_change_nothing():
    """Given or not: an option is changed if its value is another, and the stride goes with it."""
    own = config((64, 64), window_size=64, window_stride=24, short_side=80)
    plain = protocol(own, "weights")
    same = {"window_size": 64, "window_stride": 24, "short_side": 80}
    assert protocol(own, "weights", **same) == plain
    assert protocol(own, "weights", window_size=64) == plain
    other = protocol(own, "weights", window_size=48)
    assert other[2:4] == (48, 48) and other.changed == ("window_size", "window_stride")
    assert protocol(own, "weights", window_size=48, window_stride=24).changed == ("window_size",)
    assert protocol(own, "weights", window_size="whole").changed == ("window_size",)
    whole = config((64, 64))
    given = {"window_size": "whole", "short_side": "original"}
    assert protocol(whole, "weights", **given) == protocol(whole, "weights")
    large = config((512, 512))
    given = {"window_size": 512, "window_stride": 480, "short_side": 512}
    assert protocol(large, "eval", "ade20k", **given) == protocol(large, "eval", "ade20k")


def test_bad_protocols():
    with pytest.raises(ValueError, match="one of train, eval, weights; got 'paper'"):
        protocol(CONFIG, "paper")
    with pytest.raises(ValueError, match=r"overlap by 32 pixels.*windows of 32: give a window"):
        protocol(config((32, 32)), "eval")
    assert protocol(config((32, 32)), "eval", window_stride=16).window_stride == 16
    with pytest.raises(ValueError, match="stride of 3 needs windows"):
        protocol(config((64, 64)), "weights", window_stride=3)
    with pytest.raises(ValueError, match="stride of 3 needs windows"):
        protocol(CONFIG, "eval", "ade20k", window_size="whole", window_stride=3)


# Worked out by hand: (H, W) of a picture, bounds (short, long), (H, W) of what the network sees.
SIZES = [
    ((683, 512), (512, 2048), (683, 512)),  # as it is
    ((333, 517), (512, 2048), (512, 795)),  # 517 x 512 / 333 = 794.9
    ((333, 517), (256, 1024), (256, 397)),  # at scale 0.5: 397.5 rounds down, 397.45
    ((256, 1700), (512, 2048), (308, 2048)),  # 256 x 2048 / 1700 = 308.4
    ((1700, 256), (512, 2048), (2048, 308)),
    ((1, 4000), (512, 2048), (1, 2048)),
    ((1, 9000), (512, 2048), (1, 2048)),  # 0.23 pixels would be none
    ((375, 500), (520, 4160), (520, 693)),  # 693.3
    ((500, 333), (520, 4160), (781, 520)),  # 780.8
    ((1024, 2048), (1024, 2048), (1024, 2048)),
    ((1000, 2100), (1024, 2048), (975, 2048)),  # 975.2
    ((1024, 2048), (1792, 3584), (1792, 3584)),
]


@pytest.mark.parametrize(("size", "bounds", "expected"), SIZES)
def test_sizes(size, bounds, expected):
    assert rescaled_size(size, *bounds) == expected


def test_predict_resizes_each_scale_from_the_picture():
    """The network's input at each scale, and its pixels at one of them."""
    torch.manual_seed(0)
    model = create_model_from_config(CONFIG.replace(image_size=32))
    seen = []
    real = model.patch_logits

    def spy(images):
        seen.append(images)
        return real(images)

    model.patch_logits = spy
    image = torch.randn(3, 33, 51)
    options = {"short_side": 51, "long_side": 75, "window_size": "whole", "antialias": False}
    predict(model, image, scales=(0.5, 1.0, 1.3), **options)
    # 75 / 51 is the smaller factor. At 0.5 the bound is int(37.5) = 37, and at 1.3 int(97.5) = 97.
    assert [tuple(x.shape[2:]) for x in seen] == [(24, 37), (49, 75), (63, 97)]
    expected = F.interpolate(image[None], size=(24, 37), mode="bilinear", align_corners=False)
    torch.testing.assert_close(seen[0], expected)
    smooth = F.interpolate(image[None], size=(24, 37), mode="bilinear", antialias=True)
    assert (smooth - expected).abs().max() > 0.1
    seen.clear()
    predict(model, image, scales=(0.5,), **options | {"antialias": True})
    torch.testing.assert_close(seen[0], smooth)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"long_side": 40}, "long_side 40 needs short_side"),
        ({"long_side": 0, "short_side": 9}, "long_side must be a positive int"),
        ({"short_side": 40, "scales": (0.01,)}, "scale 0.01 leaves no pixels of an image of 40 x"),
    ],
)
def test_predict_rejects(options, message):
    model = create_model_from_config(CONFIG.replace(image_size=32))
    with pytest.raises(ValueError, match=message):
        predict(model, torch.zeros(3, 40, 50), **options)
