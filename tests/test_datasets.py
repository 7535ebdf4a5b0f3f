"""The public data sets, each on a miniature copy in its true layout, and anybody's folders."""

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
from test_data import write_pair
from typer.testing import CliRunner

from segmenter_fast import SegmenterModel
from segmenter_fast.cli import app
from segmenter_fast.data import ADE20K, Cityscapes, FolderDataset, PascalContext
from segmenter_fast.data.folder import read_classes


def stored(labels):
    """What `data_trees.label_map` wrote, as a tensor."""
    return torch.from_numpy(np.resize(np.asarray(labels), SIZE))


def check(dataset, count, classes):
    """What holds for every data set."""
    assert len(dataset) == count
    assert dataset.num_classes == len(dataset.class_names) == len(dataset.palette) == classes
    assert dataset.ignore_index == 255
    long, short = dataset.base_size
    assert long >= short
    for index in range(count):
        image, target = dataset[index]
        assert image.shape == (3, *SIZE) and image.dtype == torch.uint8
        assert target.shape == SIZE and target.dtype == torch.uint8
        assert image.is_contiguous()
    assert not torch.equal(dataset[0][0], dataset[-1][0]) or count == 1


# --- ADE20K --------------------------------------------------------------------------------------


def test_ade20k(tmp_path):
    folder = write_ade20k(tmp_path)
    check(ADE20K(tmp_path), 3, 150)
    check(ADE20K(folder, "val"), 2, 150)
    data = ADE20K(tmp_path)
    raw = stored(range(151))
    target = data[0][1]
    assert (target[raw == 0] == 255).all()
    assert torch.equal(target[raw > 0].long(), raw[raw > 0] - 1)
    assert data.class_names[0] == "wall" and data.palette[0] == (120, 120, 120)
    assert data.counts == {"train": 20_210, "val": 2_000} and data.base_size == (2048, 512)


def test_ade20k_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no ADE20K in .*segmenter-fast prepare ade20k"):
        ADE20K(tmp_path)
    folder = write_ade20k(tmp_path)
    with pytest.raises(ValueError, match='must be "train", "val" or "test", got \'training\''):
        ADE20K(tmp_path, "training")
    label_map(folder / "annotations/training/ADE_train_00000002.png", [3] * 7 + [151])
    with pytest.raises(
        ValueError, match=r"ADE_train_00000002\.png holds label 151 at 75 pixels; expected 0 to 150"
    ):
        ADE20K(tmp_path)[1]
    (folder / "annotations/training/ADE_train_00000003.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 images .* no label map .* ADE_train_00000003"):
        ADE20K(tmp_path)


# --- Cityscapes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("train_ids", [False, True])
def test_cityscapes(tmp_path, train_ids):
    root = write_cityscapes(tmp_path, train=4, train_ids=train_ids)
    check(Cityscapes(root), 4, 19)
    check(Cityscapes(root, "val"), 1, 19)
    data = Cityscapes(root)
    target = data[0][1]
    if train_ids:
        assert torch.equal(target.long(), stored([*range(19), 255]))
    else:
        raw = stored(range(34))
        for train_id, label_id in enumerate(CITYSCAPES_IDS):
            assert (target[raw == label_id] == train_id).all(), label_id
        void = ~torch.isin(raw, torch.tensor(CITYSCAPES_IDS))
        assert void.any() and (target[void] == 255).all()
        assert (Cityscapes(root, "test")[0][1] == 255).all()
    assert data.class_names[11] == "person" and data.palette[11] == (220, 20, 60)
    assert data.counts == {"train": 2_975, "val": 500, "test": 1_525}
    assert data.base_size == (2048, 1024)


def test_cityscapes_prefers_the_official_label_ids(tmp_path):
    """A converted file beside the official one changes nothing; alone, it stands in for it."""
    root = write_cityscapes(tmp_path)
    for path in root.glob("gtFine/train/*/*_labelIds.png"):
        label_map(path.with_name(path.name.replace("labelIds", "labelTrainIds")), [3])
    before = [target for _, target in Cityscapes(root)]
    assert all(len(target.unique()) == 20 for target in before)
    next(root.glob("gtFine/train/zurich/*_labelIds.png")).unlink()
    after = [target for _, target in Cityscapes(root)]
    assert torch.equal(after[0], before[0]) and (after[1] == 3).all()


def test_cityscapes_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected leftImg8bit/train.* prepare cityscapes"):
        Cityscapes(tmp_path)
    root = write_cityscapes(tmp_path)
    with pytest.raises(ValueError, match='must be "train", "val" or "test"'):
        Cityscapes(root, "demoVideo")
    path = next(root.glob("gtFine/val/*/*_labelIds.png"))
    label_map(path, [7, 34])
    with pytest.raises(ValueError, match=r"_labelIds\.png holds label 34 .* label ids 0 to 33"):
        Cityscapes(root, "val")[0]
    path.unlink()
    label_map(path.with_name(path.name.replace("labelIds", "labelTrainIds")), [19])
    with pytest.raises(ValueError, match=r"TrainIds\.png holds label 19 .* train ids 0 to 18 or"):
        Cityscapes(root, "val")[0]
    next(root.glob("leftImg8bit/train/aachen/*")).unlink()
    with pytest.raises(ValueError, match=r"1 of 2 label maps .* no image .* aachen_000000_000019"):
        Cityscapes(root)


# --- Pascal Context ------------------------------------------------------------------------------


def test_pascal_context(tmp_path):
    folder = write_pascal_context(tmp_path)
    for root in (tmp_path, tmp_path / "VOCdevkit", folder):
        check(PascalContext(root), 3, 60)
    check(PascalContext(tmp_path, "val"), 2, 60)
    data = PascalContext(tmp_path)
    assert torch.equal(data[0][1].long(), stored(range(60)))  # the background is a class
    assert data.class_names[0] == "background"
    assert list(data.class_names[1:]) == sorted(data.class_names[1:])
    assert data.base_size == (512, 512)
    assert data.counts == {"train": 4_996, "val": 5_104}
    # What a split holds is its list's, not the folder's.
    names = [picture.stem for picture, _ in PascalContext(tmp_path, "val").files]
    assert names == ["2008_000003", "2008_000004"]


def test_pascal_context_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no Pascal Context .* prepare pascal-context"):
        PascalContext(tmp_path)
    folder = write_pascal_context(tmp_path)
    with pytest.raises(ValueError, match='must be "train" or "val"'):
        PascalContext(tmp_path, "test")
    label_map(folder / "SegmentationClassContext/2008_000000.png", [60])
    with pytest.raises(
        ValueError, match=r"2008_000000\.png holds label 60 at 600 pixels; .*0 to 5"
    ):
        PascalContext(tmp_path)[0]
    (folder / "SegmentationClassContext/2008_000001.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 images .* no label map .* 2008_000001\.jpg"):
        PascalContext(tmp_path)
    (folder / "JPEGImages/2008_000001.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 names .* neither .* 2008_000001"):
        PascalContext(tmp_path)
    (folder / "ImageSets/SegmentationContext/val.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no such file: .*val\.txt"):
        PascalContext(tmp_path, "val")


@pytest.mark.parametrize(("name", "count"), [("ade20k", 150), ("cityscapes", 19)])
def test_class_lists(name, count):
    names, palette = read_classes(name)
    assert len(set(names)) == len(palette) == count
    assert all(len(colour) == 3 and 0 <= min(colour) <= max(colour) <= 255 for colour in palette)


# --- Anybody's folders ---------------------------------------------------------------------------


def test_folder_with_a_suffix_and_other_numbers(tmp_path):
    """Masks NAME_mask.png beside other files, which count 0, 128, 255 for void and two classes."""
    picture(tmp_path / "images/a.jpg")
    label_map(tmp_path / "masks/a_mask.png", [0, 128, 255])
    label_map(tmp_path / "masks/a_preview.png", [9])
    options = {"mask_suffix": "_mask", "label_map": {0: 255, 128: 0, 255: 1}}
    data = FolderDataset(tmp_path / "images", tmp_path / "masks", ["x", "y"], **options)
    assert torch.equal(data[0][1].long(), stored([255, 0, 1]))
    label_map(tmp_path / "masks/a_mask.png", [0, 1])
    with pytest.raises(ValueError, match=r"a_mask\.png holds label 1 at 300 .* expected 0, 128, 2"):
        data[0]
    with pytest.raises(ValueError, match="leads to 2, but there are 2 classes"):
        FolderDataset(tmp_path / "images", tmp_path / "masks", ["x", "y"], label_map={0: 2})
    with pytest.raises(ValueError, match="0 to 255, got 256"):
        FolderDataset(
            tmp_path / "images", tmp_path / "masks", "x", mask_suffix="_mask", label_map={256: 0}
        )


def test_folder_errors_name_the_file(tmp_path):
    def data():
        return FolderDataset(tmp_path / "images", tmp_path / "masks", ["x", "y"])

    picture(tmp_path / "images/a.jpg")
    picture(tmp_path / "images/b.jpg")
    label_map(tmp_path / "masks/a.png", [1])
    with pytest.raises(ValueError, match=r"1 of 2 images .* have no label map in .*, such as b\.j"):
        data()
    label_map(tmp_path / "masks/b.png", [0])
    (tmp_path / "images/b.jpg").write_bytes((tmp_path / "images/b.jpg").read_bytes()[:300])
    with pytest.raises(ValueError, match=r"cannot read image .*b\.jpg"):
        data()[1]
    (tmp_path / "masks/a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot read label map .*a\.png"):
        data()[0]
    picture(tmp_path / "images/a.png")
    with pytest.raises(ValueError, match=r"a\.jpg and a\.png share a stem"):
        data()
    with pytest.raises(ValueError, match="1 to 256 class names are expected, got 0"):
        (tmp_path / "images/a.png").unlink()
        FolderDataset(tmp_path / "images", tmp_path / "masks", [])


def test_label_maps_of_one_bit(tmp_path):
    """Black and white masks, as drawing programs write them, hold 0 and 1."""
    picture(tmp_path / "images/a.jpg")
    (tmp_path / "masks").mkdir()
    Image.fromarray(stored([0, 1]).numpy().astype(bool)).save(tmp_path / "masks/a.png")
    data = FolderDataset(tmp_path / "images", tmp_path / "masks", ["x", "y"])
    assert torch.equal(data[0][1].long(), stored([0, 1]))


# --- On the command line -------------------------------------------------------------------------


def write_camvid(root):
    for split in ("train", "val"):
        write_pair(root, label=10, split=split)


@pytest.mark.parametrize(
    ("kind", "write", "classes", "name"),
    [
        ("ade20k", write_ade20k, 150, "wall"),
        ("cityscapes", write_cityscapes, 19, "rider"),
        ("pascal-context", write_pascal_context, 60, "background"),
        ("camvid", write_camvid, 11, "bicyclist"),
    ],
)
def test_train_and_evaluate_by_name(tmp_path, kind, write, classes, name):
    write(tmp_path)
    data = ["--dataset", kind, "--root", str(tmp_path)]
    words = ["--model", "Seg-N/32", "--image-size", "32", "--steps", "1", "--batch-size", "1"]
    run = str(tmp_path / "run")
    result = CliRunner().invoke(app, ["train", *data, *words, "-o", run])
    assert result.exit_code == 0, result.output
    config = SegmenterModel.from_pretrained(f"{run}/best").config
    assert config.n_cls == classes and config.dataset == kind.replace("-", "_")
    assert name in config.class_names and len(config.palette) == classes
    words = ["evaluate", *data, "-w", f"{run}/best", "--protocol", "weights"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert name in result.output and f"{kind}, split val" in result.output
