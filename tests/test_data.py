"""Datasets in folders."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segmenter_fast.data import Augmentation, CamVid, FolderDataset, InMemory, make_loader
from segmenter_fast.images import load_image, load_mask

REAL_CAMVID = Path(__file__).parents[2] / "shared" / "camvid"


def write_pair(root, stem="a", size=(20, 30), label=1, split="train"):
    for kind, suffix in (("images", ".jpg"), ("annotations", ".png")):
        (root / kind / split).mkdir(parents=True, exist_ok=True)
        array = np.full((*size, 3), 90) if kind == "images" else np.full(size, label)
        image = Image.fromarray(array.astype(np.uint8))
        image.save(root / kind / split / f"{stem}{suffix}")


def folder(root, **options):
    return FolderDataset(root / "images/train", root / "annotations/train", ["x", "y"], **options)


def test_folder_dataset(tmp_path):
    write_pair(tmp_path, "b", label=255)
    write_pair(tmp_path, "a")
    data = folder(tmp_path)
    assert len(data) == 2 and data.num_classes == 2
    image, target = data[0]
    assert image.shape == (3, 20, 30) and image.dtype == torch.uint8
    assert target.shape == (20, 30) and target.dtype == torch.uint8 and (target == 1).all()
    assert (data[1][1] == 255).all()


def test_camvid_layout(tmp_path):
    write_pair(tmp_path, "s1", label=10, split="val")
    data = CamVid(tmp_path, "val")
    assert data.class_names[10] == "bicyclist" and len(data.palette) == 11
    assert (data[0][1] == 10).all()


@pytest.mark.skipif(not REAL_CAMVID.is_dir(), reason="CamVid is not beside the checkout")
def test_real_camvid():
    for split, count in (("train", 367), ("val", 101)):
        data = CamVid(REAL_CAMVID, split)
        assert len(data) == count
        image, target = data[count - 1]
        assert image.shape == (3, 360, 480) and target.shape == (360, 480)
        assert set(target.unique().tolist()) <= {*range(11), 255}
    batch = next(iter(make_loader(data, Augmentation((96, 128)), 2, 1)))
    assert batch.images.shape == (2, 3, 96, 128) and len(batch.target.unique()) > 2


def test_folder_dataset_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        folder(tmp_path)
    write_pair(tmp_path, "a", label=2)
    with pytest.raises(ValueError, match=r"a\.png holds label 2 at 600 pixels; expected 0 to 1"):
        folder(tmp_path)[0]
    write_pair(tmp_path, "b", size=(20, 30))
    Image.new("L", (30, 21)).save(tmp_path / "annotations/train/b.png")
    with pytest.raises(ValueError, match=r"b\.jpg is 30 x 20 pixels and .*b\.png 30 x 21"):
        folder(tmp_path)[1]
    (tmp_path / "annotations/train/b.png").unlink()
    with pytest.raises(
        ValueError, match=r"1 of 2 images in .* have no label map in .* such as b\.jpg"
    ):
        folder(tmp_path)


def test_unreadable_files(tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"cannot read image .*broken\.png"):
        load_image(broken)
    with pytest.raises(ValueError, match=r"cannot read label map .*broken\.png"):
        load_mask(broken)
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8)).save(whole)
    broken.write_bytes(whole.read_bytes()[:900])
    with pytest.raises(ValueError, match="cannot read image"):
        load_image(broken)
    with pytest.raises(ValueError, match=r"one channel .* got mode RGB with shape \(60, 60, 3\)"):
        load_mask(whole)


def test_palette_masks_keep_their_indices(tmp_path):
    mask = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3), "P")
    mask.putpalette([7, 8, 9] * 256)
    mask.save(tmp_path / "m.png")
    assert load_mask(tmp_path / "m.png").tolist() == [[0, 1, 2], [3, 4, 5]]


def test_in_memory_forwards_attributes(tmp_path):
    write_pair(tmp_path)
    kept = InMemory(folder(tmp_path, ignore_index=7))
    assert (kept.ignore_index, kept.class_names, len(kept)) == (7, ("x", "y"), 1)
    assert kept[0][0] is kept[0][0]
    with pytest.raises(AttributeError):
        kept.nothing  # noqa: B018
