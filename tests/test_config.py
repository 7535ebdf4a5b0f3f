"""SegmenterConfig: round trips and what it refuses."""

import json

import pytest

from segmenter_fast import SegmenterConfig, create_model, list_variants
from segmenter_fast.variants import create_config


def test_json_round_trip():
    config = create_config(
        "Seg-S-Mask/16", 2, (64, 96), class_names=["a", "b"], palette=[[1, 2, 3], [4, 5, 6]],
        window_size=64, window_stride=48, short_side=80, dataset="mine", mean=[0.1, 0.2, 0.3],
    )  # fmt: skip
    again = SegmenterConfig.from_json(config.to_json())
    assert again == config
    assert again.palette == ((1, 2, 3), (4, 5, 6)) and again.class_names == ("a", "b")
    assert hash(again) == hash(config)


@pytest.mark.parametrize("name", list_variants())
def test_every_variant_round_trips(name):
    config = create_config(name, 19, 768)
    assert SegmenterConfig.from_json(config.to_json()) == config
    assert config.image_size == (768, 768)


def test_config_describes_the_modules():
    """A model built from parts describes itself as the table does, but for names."""
    from segmenter_fast import SegmenterModel

    model = create_model("Seg-N-Mask/8", 4, (32, 64), drop_path_rate=0.1)
    parts = SegmenterModel(model.encoder, model.decoder, 4)
    expected = model.config.replace(
        variant=None, backbone=None, window_size=None, window_stride=None
    )
    assert parts.config == expected


def test_with_classes_drops_names():
    config = create_config("Seg-T/16", 2, 64, class_names=("a", "b"), palette=((0, 0, 0),) * 2)
    other = config.with_classes(3)
    assert (other.n_cls, other.class_names, other.palette) == (3, None, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_cls": 0}, "n_cls must be a positive int, got 0"),
        ({"image_size": (60, 64)}, r"image_size \(60, 64\) must be multiples of patch_size 16"),
        ({"n_heads": 5}, "d_model 192 must be divisible by n_heads 5"),
        ({"decoder": "unet"}, "decoder must be one of"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"std": (0, 1, 1)}, "std must be positive"),
        ({"mean": (0.5,)}, "mean must have 3 values"),
        ({"class_names": ("a",)}, "class_names has 1 entries but n_cls is 2"),
        ({"palette": ((0, 0, 256),) * 2}, "palette entries"),
        ({"window_stride": 0}, "window_stride must be a positive int or None"),
    ],
)
def test_rejects(change, message):
    config = create_config("Seg-T-Mask/16", 2, 64)
    with pytest.raises(ValueError, match=message):
        config.replace(**change)


def test_rejects_unknown_and_missing_keys():
    values = json.loads(create_config("Seg-T/16", 2, 64).to_json())
    with pytest.raises(ValueError, match=r"unknown keys \['colour'\]"):
        SegmenterConfig.from_dict(values | {"colour": 1})
    del values["n_cls"]
    with pytest.raises(ValueError, match=r"missing keys \['n_cls'\]"):
        SegmenterConfig.from_dict(values)
    with pytest.raises(ValueError, match="must hold an object, got list"):
        SegmenterConfig.from_json("[]")
