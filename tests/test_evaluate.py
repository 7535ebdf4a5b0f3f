"""Measuring a model: counts, object sizes, processes, the command line and submissions."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data_trees import (
    CITYSCAPES_IDS,
    SIZE,
    label_map,
    picture,
    write_ade20k,
    write_cityscapes,
    write_pascal_context,
)
from PIL import Image
from typer.testing import CliRunner

from segmenter_fast import SegmenterConfig, SegmenterModel, predict
from segmenter_fast import evaluate as evaluate_module
from segmenter_fast.cli import app
from segmenter_fast.data import ADE20K, CamVid, Cityscapes, FolderDataset, PascalContext, Scenes
from segmenter_fast.evaluate import evaluate, picture_of
from segmenter_fast.object_size import SIZES, object_sizes
from segmenter_fast.protocols import MULTISCALE
from segmenter_fast.submission import write_submission
from segmenter_fast.variants import create_model_from_config

KINDS = {"ade20k": ADE20K, "cityscapes": Cityscapes, "pascal-context": PascalContext}
CLASSES = {"ade20k": 150, "cityscapes": 19, "pascal-context": 60, "scenes": len(Scenes.class_names)}
# Without windows larger than the miniature pictures, which the official protocols would need.
SMALL = ("--short-side", "original", "--window-size", "whole")


def tiny(classes, crop=32, patch=16, **changes):
    """A random model whose labels differ between pixels."""
    torch.manual_seed(0)
    config = SegmenterConfig(
        n_cls=classes,
        image_size=(crop, crop),
        patch_size=patch,
        d_model=32,
        n_layers=1,
        n_heads=2,
        decoder_n_layers=1,
        **changes,
    )
    model = create_model_from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def saved(kind, **options):
    tiny(CLASSES[kind], **options).save_pretrained("weights")
    return "weights"


def run(*words, status=0):
    result = CliRunner().invoke(app, ["evaluate", *map(str, words)])
    assert result.exit_code == status, f"{result.output}\n{result.exception!r}"
    return result.output


def scenes(count=3, size=(48, 64)):
    return Scenes(count, size, 0, split="val")


# --- Counts --------------------------------------------------------------------------------------


def test_counts_are_those_of_predictions_compared_pixel_by_pixel():
    model, data = tiny(CLASSES["scenes"]), scenes()
    result = evaluate(model, data, progress=False, object_areas=(9, 200), flip=True)
    expected = np.zeros((3, model.n_cls, model.n_cls), np.int64)
    objects = 0
    for image, target in data:
        labels = predict(model, image, flip=True)
        sizes, count = object_sizes(target, 255, (9, 200))
        objects += count
        for place in np.ndindex(*target.shape):
            if target[place] != 255:
                expected[int(sizes[place]), int(target[place]), int(labels[place])] += 1
    assert expected.any((1, 2)).all() and len(np.unique(expected.argmax(2))) > 1
    assert np.array_equal(result["confusion"], expected.sum(0))
    for size, name in enumerate(SIZES):
        of_size = result["objects"][name]
        assert np.array_equal(of_size["confusion"], expected[size])
        assert of_size["objects"] == objects[size]
        values = []
        for k in range(model.n_cls):
            true, found = expected[size][k].sum(), expected[size][:, k].sum()
            both = expected[size][k, k]
            values.append(both / (true + found - both) if true else None)
        assert of_size["iou"] == pytest.approx(values)
        values = [value for value in values if value is not None]
        assert of_size["miou"] == pytest.approx(sum(values) / len(values))
    assert result["images"] == 3
    assert result["images_per_second"] == pytest.approx(3 / result["seconds"])


def test_sizes_do_not_change_the_whole():
    model, data = tiny(CLASSES["scenes"]), scenes(2)
    plain, sized, read_ahead = (
        evaluate(model, data, progress=False, **options)
        for options in ({}, {"object_areas": (9, 200)}, {"object_areas": (9, 200), "workers": 2})
    )
    assert "objects" not in plain
    for other in (sized, read_ahead):
        assert torch.equal(plain["confusion"], other["confusion"])
        for name in ("miou", "pixel_accuracy", "mean_accuracy", "frequency_weighted_iou", "iou"):
            assert plain[name] == other[name]


@pytest.mark.parametrize("ignore_index", [255, 0, -100])
def test_any_ignore_index(ignore_index):
    """One beyond bytes, too; and a label that is a class otherwise."""
    model, data = tiny(CLASSES["scenes"]), scenes(1)
    sized = evaluate(model, data, progress=False, object_areas=(9, 200), ignore_index=ignore_index)
    plain = evaluate(model, data, progress=False, ignore_index=ignore_index)
    assert torch.equal(sized["confusion"], plain["confusion"])
    assert (int(plain["confusion"][0].sum()) == 0) == (ignore_index == 0)


def test_does_not_touch_the_random_numbers_of_training():
    before = torch.random.get_rng_state()
    model = tiny(CLASSES["scenes"])
    torch.random.set_rng_state(before)
    evaluate(model, scenes(1), progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_bad_weights_and_labels_are_named():
    model = tiny(3)
    image, target = torch.zeros(3, 32, 32, dtype=torch.uint8), torch.zeros(32, 32).byte()
    target[4, 5] = 3
    with pytest.raises(ValueError, match=r"image 1: .*3"):
        evaluate(model, [(image, target * 0), (image, target)], progress=False)
    with torch.no_grad():
        model.decoder.cls_emb[0, 1, 2] = float("nan")
    with pytest.raises(
        ValueError, match=r"1 of the model's parameters .* such as decoder\.cls_emb"
    ):
        evaluate(model, scenes(1), progress=False)


def test_two_processes_count_every_image_once():
    """Three images for two processes, under torchrun; each writes what it labelled."""
    root = write_ade20k(Path("data"), val=3)
    words = ["--dataset", "ade20k", "--root", str(root), *SMALL, "--object-areas", "9,100"]
    words += ["-w", saved("ade20k"), "--device", "cpu", "--threads", "1", "--split", "val"]
    run(*words, "--json", "one.json", "--submission", "one")
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "-m", "segmenter_fast.evaluate", *words, "--json", "two.json", "--submission", "two",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(evaluate_module.__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mIoU by") == done.stdout.count("protocol: ") == 1
    one, two = (json.loads(Path(f"{name}.json").read_text()) for name in ("one", "two"))
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    for result in (one, two):
        assert result["images"] == 3 and result.pop("seconds") > 0
        assert result.pop("images_per_second") > 0
    assert one == two and np.sum(one["confusion"]) > 0
    names = sorted(path.name for path in Path("one").iterdir())
    assert names == sorted(path.name for path in Path("two").iterdir()) and len(names) == 3
    for name in names:
        assert (Path("one") / name).read_bytes() == (Path("two") / name).read_bytes()


# --- The command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "crop", "windows"),
    [
        ("ade20k", 512, "windows of 512 pixels every 480, scales 1, no mirror images, shorter side "
         "512 pixels, longer at most 2048"),
        ("pascal-context", 480, "windows of 480 pixels every 448, scales 1, no mirror images, "
         "shorter side 520 pixels, longer at most 4160"),
        ("cityscapes", 768, "windows of 768 pixels every 736, scales 1, no mirror images, "
         "shorter side 1024 pixels, longer at most 2048"),
    ],
)  # fmt: skip
def test_official_datasets(kind, crop, windows):
    """The official protocol unless another is asked for, at full size on miniature pictures."""
    write = {"ade20k": write_ade20k, "cityscapes": write_cityscapes}.get(kind, write_pascal_context)
    root = write(Path("data"))
    weights = saved(kind, crop=crop, patch=96 if crop != 512 else 128)
    words = ("-w", weights, "--dataset", kind, "--root", root, "--limit", 1)
    text = run(*words, "--json", "result.json")
    assert f"protocol: eval (as in official stand-alone evaluation): {windows}" in text
    result = json.loads(Path("result.json").read_text())
    data = KINDS[kind](root, "val")
    assert list(result["iou"]) == list(data.class_names)
    # Ground truth is compared at its own size, which is that of the picture.
    assert np.sum(result["confusion"]) == int((data[0][1] != 255).sum())
    assert f"mIoU {100 * result['miou']:.2f} %" in text and "images/s" in text


def test_json_holds_everything_a_number_depends_on():
    weights = saved("scenes", window_size=32, window_stride=16, short_side=40)
    text = run(
        "-w", weights, "--dataset", "scenes", "--count", 2, "--scene-size", "40,60", "--json",
        "result.json", "--object-areas", "9,200", "--threads", 1, "--batch-size", 2,
    )  # fmt: skip
    result = json.loads(Path("result.json").read_text())
    assert {
        "weights", "variant", "dataset", "root", "split", "precision", "protocol", "backend",
        "device", "device_name", "threads", "processes", "versions", "miou", "pixel_accuracy",
        "mean_accuracy", "frequency_weighted_iou", "iou", "images", "seconds", "images_per_second",
        "confusion", "objects", "warning", "images_of_split",
    } == result.keys()  # fmt: skip
    assert result["protocol"] == {
        "name": "weights", "changed": [], "window_size": 32, "window_stride": 16, "scales": [1.0],
        "flip": False, "short_side": 40, "long_side": None, "antialias": True, "batch_size": 2,
    }  # fmt: skip
    assert result["backend"] == "native" and result["threads"] == result["processes"] == 1
    assert result["versions"]["torch"] == torch.__version__
    assert result["objects"]["areas"] == [9, 200]
    counts = sum(np.array(result["objects"][name]["confusion"]) for name in SIZES)
    assert counts.tolist() == result["confusion"]
    assert result["objects"]["large"]["iou"].keys() == result["iou"].keys()
    assert "small (below 9 pixels)" in text and "large (from 200)" in text

    data = Scenes(2, (40, 60), 0, split="val")
    direct = evaluate(SegmenterModel.from_pretrained(weights), data, progress=False)
    assert direct["confusion"].tolist() == result["confusion"]


def test_options_reach_the_prediction(monkeypatch):
    """--protocol, --multiscale and what overrides them."""
    weights = saved("scenes", crop=64, short_side=48)
    asked = []

    def spy(model, image, **options):
        asked.append(options)
        return torch.zeros(image.shape[1:], dtype=torch.uint8)

    monkeypatch.setattr(evaluate_module, "predict", spy)
    words = ("-w", weights, "--dataset", "scenes", "--count", 1, "--scene-size", "40,60")
    text = run(*words, "--protocol", "eval", "--multiscale", "--object-areas", "none")
    assert "by the size of objects" not in text
    assert asked[0] == {
        "window_size": 64, "window_stride": 32, "short_side": 48, "long_side": None,
        "scales": MULTISCALE, "flip": True, "antialias": False, "batch_size": 4,
    }  # fmt: skip
    assert "protocol: eval" in text and "scales 0.5 0.75 1 1.25 1.5 1.75, with mirror" in text
    text = run(*words, "--protocol", "train", "--window-stride", 40, "--scales", "1,2")
    assert asked[1] | {"window_stride": 40, "scales": (1.0, 2.0), "flip": False} == asked[1]
    assert "train (as in official training but for window_stride)" in text
    run(*words, "--multiscale", "--no-flip")
    assert asked[2]["scales"] == MULTISCALE and asked[2]["flip"] is False
    run(*words, "--multiscale", "--flip")
    assert asked[3]["flip"] is True
    run(*words)
    assert asked[4]["scales"] == (1.0,) and asked[4]["flip"] is False
    for scales in ("1,2", "1", "1.0"):
        text = run(*words, "--multiscale", "--scales", scales, status=2)
        assert f"names its own scales, but --scales is '{scales}'" in text
    text = run(*words, "--window-size", "whole", "--window-stride", 3, status=2)
    assert "--window-size whole has none" in text
    for wrong in ("9,x", "9", "9,4"):
        assert "two numbers of pixels" in run(*words, "--object-areas", wrong, status=2)
    run(*words, "--protocol", "paper", status=2)


def test_outputs_that_cannot_be_written_are_found_out_first(monkeypatch):
    def read(*args, **options):
        raise AssertionError("weights were read")

    monkeypatch.setattr(SegmenterModel, "from_pretrained", read)
    Path("folder").mkdir()
    Path("file").touch()
    long = "a" * 250  # a folder takes it, but not the longer name of a temporary file
    for name, message in (
        ("folder", "--json: folder is a folder; give the name of a file in it"),
        (".", "--json: . is a folder"),
        ("none/a.json", "--json: no such folder: none"),
        ("file/a.json", "--json: no such folder: file"),
        (long, f"--json: {long} cannot be written: File name too long"),
    ):
        text = run("-w", "scenes", "--dataset", "scenes", "--json", name, status=1)
        assert f"error: {message}" in text and ".tmp" not in text
    assert sorted(os.listdir()) == ["file", "folder"]


def test_long_thin_pictures_are_named():
    """1 x 300 would be 360 x 108,000 for weights with a shorter side of 360: no long wait."""
    root = write_ade20k(Path("data"), val=1)
    picture(root / "images/validation/ADE_val_00000001.jpg", (1, 300))
    mask = root / "annotations/validation/ADE_val_00000001.png"
    Image.fromarray(np.ones((1, 300), np.uint8)).save(mask)
    weights = saved("ade20k", window_size=32, short_side=360)
    words = ("-w", weights, "--dataset", "ade20k", "--root", root, "--protocol", "weights")
    text = run(*words, status=1)
    assert "ADE_val_00000001.jpg: an image of 1 x 300 would have to be enlarged to 360 x" in text


def test_all_ignored_is_no_number():
    root = write_ade20k(Path("data"), val=1)
    label_map(root / "annotations/validation/ADE_val_00000001.png", [0])
    words = ("-w", saved("ade20k"), "--dataset", "ade20k", "--root", root, *SMALL)
    text = run(*words, "--json", "result.json")
    assert "mIoU -, pixel accuracy -" in text
    result = json.loads(Path("result.json").read_text())
    assert result["miou"] is None and result["objects"]["small"]["miou"] is None


def test_weights_and_data_that_do_not_fit():
    root = write_cityscapes(Path("data"))
    words = ("--dataset", "cityscapes", "--root", root, *SMALL)
    text = run("-w", saved("ade20k"), *words, status=1)
    assert "know 150 classes but the data have 19" in text and "train --init" in text
    names = list(Cityscapes(root).class_names)
    saved("cityscapes", class_names=names)
    assert "warning" not in run("-w", "weights", *words)
    saved("cityscapes", class_names=[names[1], names[0], *names[2:]])
    text = run("-w", "weights", *words, "--json", "result.json")
    assert "warning: 2 of 19 classes have another name" in text
    assert "such as number 0: 'road' and 'sidewalk'" in text
    assert "2 of 19 classes" in json.loads(Path("result.json").read_text())["warning"]


def test_bad_files_are_named():
    root = write_ade20k(Path("data"), val=1)
    words = ("-w", saved("ade20k"), "--dataset", "ade20k", "--root", root, *SMALL)
    mask, image = (
        root / folder / "validation" / f"ADE_val_00000001.{ending}"
        for folder, ending in (("annotations", "png"), ("images", "jpg"))
    )
    label_map(mask, [1, 200])
    for workers in (0, 1):
        text = run(*words, "--workers", workers, status=1)
        assert f"error: {mask} holds label 200" in text
    label_map(mask, [1])
    image.write_bytes(image.read_bytes()[:300])
    assert f"error: cannot read image {image}" in run(*words, status=1)
    # What the network cannot take is named by the picture, too.
    picture(image, (1, 60_000))
    Image.fromarray(np.ones((1, 60_000), np.uint8)).save(mask)
    text = run(*words, "--window-size", 128, status=1)
    assert f"error: {image}: an image of 1 x 60000 would have to be enlarged" in text


# --- Submissions ---------------------------------------------------------------------------------


def labels_of(weights, picture):
    return predict(SegmenterModel.from_pretrained(weights), picture, window_size="whole").numpy()


def test_cityscapes_submission():
    """Label ids, named by city, sequence and frame, without any label map to compare with."""
    root = write_cityscapes(Path("data"), test=3)
    shutil.rmtree(root / "gtFine/test")
    words = ("-w", saved("cityscapes"), "--dataset", "cityscapes", "--root", root, *SMALL)
    text = run(*words, "--split", "test", status=1)
    assert "split 'test' has no labels to measure by; give --submission" in text
    text = run(*words, "--split", "test", "--submission", "out/files", "--json", "result.json")
    assert "mIoU" not in text and "written to out/files" in text and "protocol: " in text
    result = json.loads(Path("result.json").read_text())
    assert result["miou"] is None and "objects" not in result and result["images"] == 2
    files = sorted(Path("out/files").iterdir())
    pictures = sorted((root / "leftImg8bit/test").rglob("*.png"))
    assert [f.name for f in files] == [
        f"berlin_{number:06d}_000019_labelIds.png" for number in range(2)
    ]
    for file in files:
        stem = file.name.removesuffix("_labelIds.png")
        [source] = [p for p in pictures if p.name == f"{stem}_leftImg8bit.png"]
        with Image.open(file) as image:
            assert image.mode == "L" and image.size == SIZE[::-1]
            written = np.array(image)
        expected = np.array(CITYSCAPES_IDS)[labels_of("weights", source)]
        assert np.array_equal(written, expected) and len(np.unique(written)) > 1


def test_ade20k_submission():
    """1 to 150 under the picture's name; beside an mIoU, where there are labels."""
    root = write_ade20k(Path("data"), val=2)
    words = ("-w", saved("ade20k"), "--dataset", "ade20k", *SMALL)
    text = run(*words, "--root", "data", "--limit", 1, "--submission", "val")
    assert "mIoU" in text and "1 images (of 2)" in text
    assert [p.name for p in Path("val").iterdir()] == ["ADE_val_00000001.png"]
    with Image.open("val/ADE_val_00000001.png") as image:
        written = np.array(image)
    source = root / "images/validation/ADE_val_00000001.jpg"
    assert np.array_equal(written, labels_of("weights", source) + 1)

    text = run(*words, "--root", root, "--split", "test", "--submission", "test", status=1)
    assert "no test pictures of ADE20K" in text
    for number in (1, 2):
        picture(Path(f"data/release_test/testing/ADE_test_{number:08d}.jpg"), seed=number)
    for folder in ("data", root):
        assert len(ADE20K(folder, "test")) == 2
    run(*words, "--root", root, "--split", "test", "--submission", "test")
    assert sorted(p.name for p in Path("test").iterdir()) == [
        "ADE_test_00000001.png", "ADE_test_00000002.png",
    ]  # fmt: skip


def test_submissions_that_cannot_be():
    write_cityscapes(Path("data"))
    words = ("-w", saved("cityscapes"), "--dataset", "cityscapes", "--root", "data", *SMALL)
    Path("full").mkdir()
    Path("full/old.png").touch()
    assert "full is there already" in run(*words, "--submission", "full", status=1)
    assert "full/old.png is there already" in run(*words, "--submission", "full/old.png", status=1)
    text = run("-w", "weights", "--dataset", "scenes", "--submission", "out", status=2)
    assert "ade20k and cityscapes" in text and not Path("out").exists()
    with pytest.raises(ValueError, match="for ade20k and cityscapes, got 'camvid'"):
        write_submission(Path("."), "camvid", Path("a.png"), torch.zeros(2, 2))


def test_pictures_of_samples_through_subsets():
    data = ADE20K(write_ade20k(Path("data")), "train")
    subset = torch.utils.data.Subset(torch.utils.data.Subset(data, [2, 1]), [1])
    assert picture_of(subset, 0).name == "ADE_train_00000002.jpg"
    assert picture_of(scenes(1), 0) is None


def test_folder_of_pictures_without_labels():
    picture(Path("data/images/test/a.png"))
    data = FolderDataset("data/images/test", None, ("a", "b"), ignore_index=7)
    image, target = data[0]
    assert not data.labelled and image.shape == (3, *SIZE)
    assert target.shape == SIZE and (target == 7).all()
    label_map(Path("data/annotations/test/a.png"), [0, 10])
    assert CamVid("data", "test").labelled
