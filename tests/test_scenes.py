"""Procedural scenes: reproducible, exactly labelled, and not solved by colour."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from segmenter_fast.data.scenes import CLASS_NAMES, PALETTE, Scenes

EXPECTED_COUNTS = [3460, 0, 0, 1827, 324, 12, 1020, 2039, 528, 0, 6]
EXPECTED_MEAN = [132.9, 116.3, 105.2]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("size", [32, 33, (48, 80), (90, 41), (32, 200), (200, 32)])
@pytest.mark.parametrize("split", ["train", "val"])
def test_shapes_and_values(size, split):
    height, width = (size, size) if isinstance(size, int) else size
    for image, target in Scenes(4, size, seed=3, split=split):
        assert image.dtype == target.dtype == torch.uint8
        assert image.shape == (3, height, width) and target.shape == (height, width)
        assert image.is_contiguous() and target.is_contiguous()
        assert int(target.max()) < len(CLASS_NAMES)


def test_attributes():
    assert Scenes.num_classes == len(CLASS_NAMES) == len(PALETTE) == len(set(PALETTE)) == 11
    assert tuple(Scenes.class_names) == CLASS_NAMES
    assert Scenes.ignore_index == 255
    dataset = Scenes(7, 40, seed=2, split="val")
    assert len(dataset) == 7
    assert repr(dataset) == "Scenes(count=7, size=(40, 40), seed=2, split='val')"


def test_iteration_ends_and_indices_are_checked():
    dataset = Scenes(3, 32)
    assert len(list(dataset)) == 3
    assert same(dataset[-1], dataset[2])
    for index in (3, -4):
        with pytest.raises(IndexError, match="there are 3"):
            dataset[index]
    assert list(Scenes(0, 32)) == []


def test_depends_on_seed_split_and_index_alone():
    dataset = Scenes(50, 48, seed=5)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - the global state is what must not matter
    forwards = [dataset[i] for i in range(6)]
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    backwards = [Scenes(6, (48, 48), seed=5)[i] for i in reversed(range(6))][::-1]
    assert all(same(a, b) for a, b in zip(forwards, backwards, strict=True))
    others = [Scenes(6, 48, seed=6)[0], Scenes(6, 48, seed=5, split="val")[0], forwards[1]]
    assert not any(torch.equal(forwards[0][0], other[0]) for other in others)


def test_workers_do_not_matter():
    dataset = Scenes(8, 32, seed=1)
    loader = DataLoader(dataset, batch_size=4, num_workers=2)
    images, targets = (torch.cat(part) for part in zip(*loader, strict=True))
    for i in range(8):
        assert same((images[i], targets[i]), dataset[i])


def test_a_scene_keeps_its_shapes_at_every_resolution():
    small, large = Scenes(12, 64, seed=4), Scenes(12, 256, seed=4)
    agreement = [float((small[i][1] == large[i][1][2::4, 2::4]).double().mean()) for i in range(12)]
    assert np.median(agreement) > 0.9 and min(agreement) > 0.6, agreement


def test_every_class_occurs_often_enough():
    targets = [target.numpy() for _, target in Scenes(150, 64, seed=9)]
    counts = np.array([np.bincount(t.ravel(), minlength=11) for t in targets])
    pixels, images = counts.sum(0) / counts.sum(), (counts > 0).mean(0)
    assert pixels.min() > 0.005 and pixels.max() < 0.5, pixels
    assert images.min() > 0.3, images
    # Whole scenes differ: nobody has most of the pixels everywhere.
    assert len({t.tobytes() for t in targets}) == 150


def test_labels_lie_on_the_picture():
    """The picture changes most where the class does, and one pixel beside it no longer."""
    steps = {0: [], 3: []}
    for image, target in Scenes(30, 96, seed=8):
        jump = (image[:, :, 1:].float() - image[:, :, :-1].float()).abs().mean(0)
        border = target[:, 1:] != target[:, :-1]
        for shift, values in steps.items():
            values.append(jump[:, shift:][border[:, : border.shape[1] - shift]].mean().item())
    assert np.nanmean(steps[0]) > 1.5 * np.nanmean(steps[3]), steps


def test_colour_alone_does_not_solve_it():
    """The best class for each colour (8 levels per channel), fitted on the same pixels."""
    scenes = [Scenes(60, 64, seed=7)[i] for i in range(60)]
    codes = np.concatenate(
        [(image.numpy() >> 5).reshape(3, -1).T @ [64, 8, 1] for image, _ in scenes]
    )
    target = np.concatenate([target.numpy().ravel() for _, target in scenes])
    votes = np.zeros((512, 11), dtype=np.int64)
    np.add.at(votes, (codes, target), 1)
    guess = votes.argmax(1)[codes]
    confusion = np.zeros((11, 11), dtype=np.int64)
    np.add.at(confusion, (target, guess), 1)
    union = confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    assert np.mean(np.diag(confusion) / union) < 0.35


def test_scenes_stay_what_bundled_weights_were_trained_on():
    """Class counts and mean colour of one scene, up to how Pillow rounds a polygon's edge."""
    image, target = Scenes(1, 96, seed=0, split="val")[0]
    counts = np.bincount(target.numpy().ravel(), minlength=11)
    expected = np.array(EXPECTED_COUNTS)
    assert np.abs(counts - expected).sum() < 0.03 * target.numel(), counts.tolist()
    mean = image.double().mean((1, 2)).tolist()
    assert mean == pytest.approx(EXPECTED_MEAN, abs=2.0)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"count": -1}, ValueError, "count must be 0 or more, got -1"),
        ({"count": 2.5}, TypeError, "count must be an int, got 2.5"),
        ({"count": True}, TypeError, "count must be an int"),
        ({"size": 31}, ValueError, "at least 32 on both sides, got 31"),
        ({"size": (64, 16)}, ValueError, "at least 32"),
        ({"size": (64, 64, 3)}, TypeError, "size must be an int or"),
        ({"size": 64.0}, TypeError, "size must be an int or"),
        ({"seed": -3}, ValueError, "seed must be 0 or more, got -3"),
        ({"seed": "a"}, TypeError, "seed must be an int"),
        ({"split": "test"}, ValueError, "'test'"),
    ],
)
def test_rejects_bad_input(options, error, text):
    with pytest.raises(error, match=text):
        Scenes(**options)
