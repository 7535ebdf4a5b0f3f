"""`segmenter-fast prepare`: what it unpacks, what it counts, and what it says is missing."""

import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from data_trees import (
    label_map,
    run_length_code,
    write_ade20k,
    write_cityscapes,
    write_context_annotations,
    write_pascal_context,
    write_voc2010,
)
from PIL import Image
from typer.testing import CliRunner

from segmenter_fast.cli import app
from segmenter_fast.data import ADE20K, Cityscapes, PascalContext
from segmenter_fast.data.folder import read_classes
from segmenter_fast.data.prepare import CONTEXT_CATEGORIES, decode_mask, prepare


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The data sets have as many pictures as their miniatures."""
    monkeypatch.setattr(ADE20K, "counts", {"train": 3, "val": 2})
    monkeypatch.setattr(Cityscapes, "counts", {"train": 2, "val": 1, "test": 1})
    monkeypatch.setattr(PascalContext, "counts", {"train": 3, "val": 2})


def run(*words, status=0):
    result = CliRunner().invoke(app, ["prepare", *map(str, words)])
    assert result.exit_code == status, f"{result.output}\n{result.exception!r}"
    return result.output


def archive(path: Path, folder: Path, *names: str) -> None:
    """Pack `names` of `folder` and remove them there."""
    if path.suffix == ".tar":
        with tarfile.open(path, "w") as file:
            for name in names:
                file.add(folder / name, name)
    else:
        with zipfile.ZipFile(path, "w") as file:
            for name in names:
                for member in sorted((folder / name).rglob("*")):
                    file.write(member, member.relative_to(folder))
    for name in names:
        shutil.rmtree(folder / name)


def test_ade20k_is_unpacked_and_checked(tmp_path):
    write_ade20k(tmp_path)
    archive(tmp_path / "ADEChallengeData2016.zip", tmp_path, "ADEChallengeData2016")
    text = run("ade20k", tmp_path)
    assert "unpacking" in text and "train: 3 pictures with label maps, 3 of them read" in text
    assert f"ADE20K is ready: --dataset ade20k --root {tmp_path}" in text
    assert len(ADE20K(tmp_path, "val")) == 2
    assert "unpacking" not in run("ade20k", tmp_path)
    assert "is ready" in run("ade20k", tmp_path / "ADEChallengeData2016", "--sample", 0)


def test_cityscapes_is_unpacked_and_checked(tmp_path):
    write_cityscapes(tmp_path)
    for name in ("gtFine", "leftImg8bit"):
        archive(tmp_path / f"{name}_trainvaltest.zip", tmp_path, name)
    text = run("cityscapes", tmp_path)
    assert text.count("unpacking") == 2
    assert "test: 1 pictures with label maps, 1 of them read" in text


def context_categories():
    """Five label maps in the annotation file's categories, and what they mean."""
    known = np.array(list(CONTEXT_CATEGORIES))
    rng = np.random.default_rng(0)
    maps = {}
    for number in range(5):
        blocks = rng.choice(known, (4, 5)).repeat(5, axis=0).repeat(6, axis=1)
        maps[f"2008_{number:06d}"] = ("train" if number < 3 else "val", blocks)
    return maps


def test_pascal_context_labels_are_made(tmp_path):
    maps = context_categories()
    write_voc2010(tmp_path, [*maps, "2008_000009"])
    archive(tmp_path / "VOCtrainval_03-May-2010.tar", tmp_path, "VOCdevkit")
    everything = maps | {"2009_000001": ("test", np.full((20, 30), 23))}
    write_context_annotations(tmp_path / "trainval_merged.json", everything)
    text = run("pascal-context", tmp_path)
    assert "train: 3 pictures" in text and "val: 2 pictures" in text and "is ready" in text
    numbers = sorted(CONTEXT_CATEGORIES)
    for split in ("train", "val"):
        data = PascalContext(tmp_path, split)
        expected = [blocks for phase, blocks in maps.values() if phase == split]
        for (_, target), blocks in zip(data, expected, strict=True):
            assert torch.equal(target, torch.from_numpy(np.searchsorted(numbers, blocks)).byte())
    assert not list(tmp_path.rglob("2009_000001.png"))


def test_later_annotations_lie_on_top(tmp_path):
    whole = np.full((20, 30), 23)
    corner = np.zeros((20, 30), int)
    corner[:5, :7] = 458
    write_voc2010(tmp_path, ["2008_000000"])
    file = tmp_path / "trainval_merged.json"
    write_context_annotations(file, {"2008_000000": ("train", np.maximum(whole, corner))})
    prepare("pascal-context", tmp_path)
    with Image.open(next(tmp_path.rglob("SegmentationClassContext/*.png"))) as made:
        assert (np.asarray(made)[:5, :7] == 59).all() and (np.asarray(made)[5:] == 6).all()


def test_pascal_context_names_are_those_of_its_categories():
    """The Detail API evaluates these categories in this order, which is that of the official names.

    Source: detail/__init__.py of PASCAL in Detail; official segm/data/config/pascal_context.yml.
    """
    categories = (
        "2 23 25 31 34 45 59 65 72 98 397 113 207 258 284 308 347 368 416 427 9 18 22 33 44 46 68 "
        "80 85 104 115 144 158 159 162 187 189 220 232 259 260 105 296 355 295 324 326 349 354 360 "
        "366 19 415 420 424 440 445 454 458"
    )
    names = (
        "aeroplane bicycle bird boat bottle bus car cat chair cow table dog horse motorbike person "
        "pottedplant sheep sofa train tvmonitor bag bed bench book building cabinet ceiling cloth "
        "computer cup door fence floor flower food grass ground keyboard light mountain mouse "
        "curtain platform sign plate road rock shelves sidewalk sky snow bedclothes track tree "
        "truck wall water window wood"
    )
    ours = read_classes("pascal_context")[0]
    assert len(CONTEXT_CATEGORIES) == 60 and CONTEXT_CATEGORIES[0] == 0 and ours[0] == "background"
    for category, name in zip(categories.split(), names.split(), strict=True):
        assert ours[CONTEXT_CATEGORIES[int(category)]] == name


def test_a_stopped_conversion_begins_again(tmp_path, monkeypatch):
    maps = context_categories()
    write_voc2010(tmp_path, list(maps))
    write_context_annotations(tmp_path / "trainval_merged.json", maps)
    calls = []

    def stop(segmentation):
        calls.append(segmentation)
        if len(calls) > 30:
            raise KeyboardInterrupt
        return decode_mask(segmentation)

    monkeypatch.setattr("segmenter_fast.data.prepare.decode_mask", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare("pascal-context", tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(PascalContext, "counts", {"train": 3, "val": 2})
    report = prepare("pascal-context", tmp_path)
    assert not report.problems and len(report.found) == 2


def test_run_length_codes():
    """A code that pycocotools 2.0 wrote, and the way there and back for many masks."""
    mask = np.zeros((50, 70), bool)
    mask[5:40, 10:60] = True
    mask[20:25, 0:3] = True
    mask[49, 69] = True
    code = "d05]1000_:n0cD" + 97 * "0" + "^?nN"
    assert run_length_code(mask)["counts"] == code
    np.testing.assert_array_equal(decode_mask({"size": [50, 70], "counts": code}), mask)
    rng = np.random.default_rng(0)
    for share in (0.0, 0.02, 0.5, 0.98, 1.0):
        for size in ((1, 1), (1, 40), (37, 1), (31, 53)):
            mask = rng.random(size) < share
            np.testing.assert_array_equal(decode_mask(run_length_code(mask)), mask)
    for counts in (code[:-1], code + "1", code[:-2]):
        with pytest.raises(ValueError, match="does not fill 50 x 70 pixels"):
            decode_mask({"size": [50, 70], "counts": counts})


# --- What is missing or wrong --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("ade20k", {"ADEChallengeData2016.zip": "data.csail.mit.edu"}),
        (
            "cityscapes",
            {
                "gtFine_trainvaltest.zip": "packageID=1",
                "leftImg8bit_trainvaltest.zip": "packageID=3",
            },
        ),
        (
            "pascal-context",
            {
                "VOCtrainval_03-May-2010.tar": "host.robots.ox.ac.uk",
                "trainval_merged.json": "codalabuser",
            },
        ),
    ],
)
def test_says_where_to_get_what_is_missing(tmp_path, name, files):
    text = run(name, tmp_path, status=1)
    for file, where in files.items():
        line = next(line for line in text.splitlines() if file in line)
        assert where in line and "http" in line
    assert f"not complete in {tmp_path}" in text
    assert f"segmenter-fast prepare {name} {tmp_path}" in text


def test_only_what_is_missing_is_asked_for(tmp_path):
    write_cityscapes(tmp_path)
    shutil.rmtree(tmp_path / "leftImg8bit")
    text = run("cityscapes", tmp_path, status=1)
    assert "leftImg8bit_trainvaltest.zip" in text and "gtFine_trainvaltest.zip" not in text
    maps = context_categories()
    write_context_annotations(tmp_path / "trainval_merged.json", maps)
    text = run("pascal-context", tmp_path, status=1)
    assert "VOCtrainval" in text and "trainval_merged.json from" not in text


def test_counts(tmp_path):
    folder = write_ade20k(tmp_path, train=3, val=1)
    text = run("ade20k", tmp_path, status=1)
    assert "error: val: expected 2 pictures with label maps, found 1" in text
    assert "train: 3 pictures" in text and "is ready" not in text
    assert "ADEChallengeData2016.zip" in text  # what to unpack again
    next((folder / "annotations/training").iterdir()).unlink()
    assert "error: train: 1 of 3 images" in run("ade20k", tmp_path, status=1)


def test_a_sample_is_read(tmp_path):
    folder = write_ade20k(tmp_path)
    label_map(folder / "annotations/training/ADE_train_00000002.png", [200])
    (folder / "images/validation/ADE_val_00000001.jpg").write_bytes(b"cut")
    text = run("ade20k", tmp_path, status=1)
    assert "error: train: " in text and "ADE_train_00000002.png holds label 200" in text
    assert "error: val: cannot read image" in text and "ADE_val_00000001.jpg" in text
    assert "is ready" in run("ade20k", tmp_path, "--sample", 0)
    assert "error: val" in run("ade20k", tmp_path, "--sample", 1, status=1)  # the first of each


def test_many_bad_files_are_summed_up(tmp_path, monkeypatch):
    monkeypatch.setattr(ADE20K, "counts", {"train": 8})
    folder = write_ade20k(tmp_path, train=8)
    for path in (folder / "images/training").iterdir():
        path.write_bytes(b"")
    report = prepare("ade20k", tmp_path)
    assert sum("cannot read image" in problem for problem in report.problems) == 5
    assert "train: 8 of 8 samples read were bad" in report.problems


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"<html>log in</html>"])
def test_damaged_archives(tmp_path, content):
    """A log-in page saved under the archive's name is the usual one."""
    (tmp_path / "ADEChallengeData2016.zip").write_bytes(content)
    text = run("ade20k", tmp_path, status=1)
    assert "ADEChallengeData2016.zip is damaged" in text and "download it again from http" in text
    write_voc2010(tmp_path, ["2008_000000"])
    (tmp_path / "trainval_merged.json").write_bytes(content)
    text = run("pascal-context", tmp_path, status=1)
    assert "trainval_merged.json is damaged" in text
    shutil.rmtree(tmp_path / "VOCdevkit")
    (tmp_path / "VOCtrainval_03-May-2010.tar").write_bytes(content + b" " * 600)
    assert "2010.tar is damaged" in run("pascal-context", tmp_path, status=1)


def test_other_archives(tmp_path):
    with zipfile.ZipFile(tmp_path / "gtFine_trainvaltest.zip", "w") as file:
        file.writestr("README", "")
    text = run("cityscapes", tmp_path, status=1)
    assert "does not hold gtFine/val" in text


def test_annotations_of_another_kind(tmp_path):
    write_voc2010(tmp_path, ["2008_000000"])
    file = tmp_path / "trainval_merged.json"
    write_context_annotations(file, {"2008_000000": ("train", np.full((20, 30), 3))})
    assert "category 3 in 2008_000000 is none of the 60" in run(
        "pascal-context", tmp_path, status=1
    )
    file.write_text('{"images": []}')
    assert "trainval_merged.json is damaged ('annos_segmentation')" in run(
        "pascal-context", tmp_path, status=1
    )


def test_unknown_name(tmp_path):
    with pytest.raises(ValueError, match="expected one of ade20k, cityscapes, pascal-context, got"):
        prepare("coco", tmp_path)


def test_loaders_point_here(tmp_path):
    """The command that a loader's error names is one that exists."""
    for loader in (ADE20K, Cityscapes, PascalContext):
        with pytest.raises(FileNotFoundError) as caught:
            loader(tmp_path)
        command = str(caught.value).split("segmenter-fast prepare ")[1].split("'")[0]
        assert "not complete" in run(*command.split(" ", 1), status=1)


def test_complete_copies_need_no_archives(tmp_path):
    write_pascal_context(tmp_path)
    write_cityscapes(tmp_path / "city", train_ids=True)
    assert "is ready" in run("pascal-context", tmp_path)
    assert "is ready" in run("cityscapes", tmp_path / "city")
