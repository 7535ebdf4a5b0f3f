"""Datasets, the training stream and its augmentation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segmenter_fast.data import Augmentation, CamVid, FolderDataset, InMemory, make_loader
from segmenter_fast.data.transforms import TrainStream, TrainTransform, distort_colours
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


@pytest.fixture
def sample():
    """Colour encodes the label, so that image and label can be checked to move together."""
    label = torch.zeros(40, 60, dtype=torch.uint8)
    label[:, 30:] = 1
    label[20:, :] += 2
    return (label * 60).expand(3, -1, -1).contiguous(), label


@pytest.mark.parametrize("scale", [(0.4, 0.4), (1.0, 1.0), (2.3, 2.3), (0.5, 2.0)])
@pytest.mark.parametrize("crop", [(32, 32), (24, 72), (64, 96)])
def test_image_and_labels_move_together(sample, crop, scale):
    transform = TrainTransform(crop, (0.0,) * 3, (1.0,) * 3, scale, jitter=0.0, max_class_share=1.0)
    for seed in range(8):
        image, target = transform(*sample, np.random.default_rng(seed))
        assert image.shape == (3, *crop) and image.dtype == torch.float32
        assert target.shape == crop and target.dtype == torch.uint8
        inside = target != 255
        agree = ((image[0] * 255 / 60) - target).abs()[inside] < 0.3
        assert agree.float().mean() > 0.8  # but for blended borders
        assert (image[:, ~inside] == 0).all()


def test_overhang_is_void_and_zero_after_normalisation(sample):
    transform = TrainTransform((64, 64), (0.5,) * 3, (0.5,) * 3, (0.5, 0.5))
    image, target = transform(*sample, np.random.default_rng(0))
    assert (target[20:] == 255).all() and (target[:, 30:] == 255).all()
    assert (target[:20, :30] != 255).all()
    assert (image[:, 20:] == 0).all()


def test_crops_with_one_class_are_drawn_again():
    """Half the image is one class: without the rule many crops hold nothing else."""
    label = torch.zeros(64, 64, dtype=torch.uint8)
    label[:, 34:] = 1
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)

    def single(share):
        transform = TrainTransform((24, 24), scale=(1, 1), max_class_share=share, jitter=0.0)
        draws = [transform(image, label, np.random.default_rng(s))[1] for s in range(100)]
        return sum(len(t.unique()) == 1 for t in draws)

    assert single(1.0) > 20
    assert single(0.75) < 5


def test_distort_colours_identity_and_range():
    x = torch.rand(3, 8, 9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(distort_colours(x, np.random.default_rng(0), 0.0), x)
    outputs = [distort_colours(x, np.random.default_rng(s)) for s in range(20)]
    assert all(o.min() >= 0 and o.max() <= 1 and o.shape == x.shape for o in outputs)
    assert len({round(o.mean().item(), 6) for o in outputs}) > 10
    grey = torch.full((3, 2, 2), 0.4)
    for seed in range(20):  # a grey pixel has neither hue nor saturation to change
        out = distort_colours(grey, np.random.default_rng(seed))
        torch.testing.assert_close(out[0], out[1])
        torch.testing.assert_close(out[0], out[2])


def test_stream_is_the_same_for_any_workers_and_start(sample):
    transform = TrainTransform((16, 16), scale=(0.5, 2))
    data = [(sample[0] + i, sample[1]) for i in range(5)]
    stream = TrainStream(data, transform, seed=3, length=23)

    def read(numbers, workers):
        loader = torch.utils.data.DataLoader(
            torch.utils.data.Subset(stream, numbers), 4, num_workers=workers
        )
        return [torch.cat(parts) for parts in zip(*loader, strict=True)]

    images, targets = read(range(23), 0)
    for workers, start in ((2, 0), (0, 8)):
        again, labels = read(range(start, 23), workers)
        assert torch.equal(again, images[start:]) and torch.equal(labels, targets[start:])
    other = TrainStream(data, transform, seed=4, length=23)
    assert not torch.equal(other[0][0], stream[0][0])


def test_stream_visits_every_sample_once_an_epoch():
    data = [(i, i) for i in range(7)]
    stream = TrainStream(data, lambda image, target, rng: image, seed=0, length=21)
    epochs = [[stream[e * 7 + i] for i in range(7)] for e in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
