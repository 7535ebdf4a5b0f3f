"""The demo end to end, with a small model that has seen nothing."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from segmenter_fast import demo
from segmenter_fast.backend import BackendError
from segmenter_fast.config import SegmenterConfig
from segmenter_fast.data.scenes import Scenes
from segmenter_fast.demo import run_demo
from segmenter_fast.inference import predict
from segmenter_fast.metrics import mean_iou
from segmenter_fast.model import SegmenterModel
from segmenter_fast.ops.confusion import confusion_matrix
from segmenter_fast.variants import create_model_from_config


def save_model(folder, n_cls=Scenes.num_classes):
    torch.manual_seed(0)
    config = SegmenterConfig(
        n_cls=n_cls, image_size=(64, 64), patch_size=16, d_model=32, n_layers=1, n_heads=2
    )
    create_model_from_config(config).eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(autouse=True)
def small_head(monkeypatch):
    """What is timed is as large as published models; what is tested need not be."""
    monkeypatch.setattr(demo, "HEAD_GRID", (8, 8))
    monkeypatch.setattr(demo, "HEAD_SIZE", (128, 128))


def run(weights, folder, **options):
    console = Console(file=io.StringIO(), width=120)
    options = {"size": (48, 64), "repeats": 1, "scenes": 3, "seed": 0, **options}
    result = run_demo(weights, output=folder / "demo.png", console=console, **options)
    return result, console.file.getvalue()


def test_picture_and_report(weights, tmp_path):
    result, text = run(weights, tmp_path)
    with Image.open(tmp_path / "demo.png") as image:
        page = np.asarray(image.convert("RGB"))
    assert page.shape[0] > 48 and page.shape[1] > 3 * 64
    # The picture itself is on the page, untouched.
    scene = Scenes(3, (48, 64), split="val")[0][0].permute(1, 2, 0).numpy()
    windows = np.lib.stride_tricks.sliding_window_view(page, scene.shape)[:, :, 0]
    top = (windows[:, :40] == scene).all((-3, -2, -1))
    assert top.sum() == 1
    for word in (*Scenes.class_names, "mIoU", "official", "ratio", "K = 150", "demo.png"):
        assert word in text, word
    assert [path.name for path in tmp_path.iterdir()] == ["demo.png"]
    assert result["output"] == str(tmp_path / "demo.png")


def test_numbers_are_those_of_the_predictions(weights, tmp_path):
    result, text = run(weights, tmp_path, seed=4)
    model = SegmenterModel.from_pretrained(weights)
    total = torch.zeros(11, 11, dtype=torch.int64)
    by_scene = []
    for image, target in Scenes(3, (48, 64), seed=4, split="val"):
        by_scene.append(confusion_matrix(predict(model, image), target, 11))
        total += by_scene[-1]
    assert result["miou"] == pytest.approx(mean_iou(total))
    assert result["miou_scene"] == pytest.approx(mean_iou(by_scene[0]))
    assert f"mIoU {100 * result['miou']:.1f} %" in text
    present = [value for value in result["iou"].values() if value is not None]
    assert list(result["iou"]) == list(Scenes.class_names)
    assert np.mean(present) == pytest.approx(result["miou"])
    assert result["pixel_accuracy"] == pytest.approx(float(total.diagonal().sum() / total.sum()))
    assert (result["scenes"], result["size"]) == (3, (48, 64))


def test_official_and_fast_agree(weights, tmp_path):
    result, _ = run(weights, tmp_path, repeats=2)
    assert result["backend"] == "native"
    for part in ("image", "head"):
        row = result[part]
        assert row["official_ms"] > 0 and row["fast_ms"] > 0
        assert math.isclose(row["speedup"], row["official_ms"] / row["fast_ms"])
        assert row["label_agreement"] > 0.999, part
    reference, _ = run(weights, tmp_path, backend="reference", repeats=1)
    assert reference["backend"] == "reference"
    assert reference["image"]["label_agreement"] == 1.0
    assert reference["miou"] == pytest.approx(result["miou"], abs=1e-3)


def test_rejects_bad_input(weights, tmp_path):
    for options, text in (
        ({"repeats": 0}, "repeats must be an int of at least 1, got 0"),
        ({"scenes": 2.0}, "scenes must be an int of at least 1, got 2.0"),
        ({"size": (16, 16)}, "at least 32"),
        ({"backend": "fast"}, "backend must be one of"),
    ):
        with pytest.raises(ValueError, match=text):
            run(weights, tmp_path, **options)
    with pytest.raises(BackendError, match="triton"):
        run(weights, tmp_path, backend="triton")
    with pytest.raises(ValueError, match=r"must end in \.png"):
        run_demo(weights, output=tmp_path / "demo.txt")
    with pytest.raises(ValueError, match="does not exist: create it first"):
        run_demo(weights, output=tmp_path / "nowhere" / "demo.png")
    assert list(tmp_path.iterdir()) == []


def test_other_classes_are_refused(tmp_path):
    other = save_model(tmp_path / "other", n_cls=5)
    with pytest.raises(ValueError, match="know 5 classes, but the demo's scenes have 11"):
        run(other, tmp_path)
