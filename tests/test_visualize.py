"""Label maps as files and pictures: values survive, nothing is covered, errors are clear."""

import os
import stat

import numpy as np
import pytest
import torch
from PIL import Image

from segmenter_fast.visualize import (
    colorize,
    default_palette,
    overlay,
    save_image,
    save_label_png,
    side_by_side,
)

PALETTE = [[10, 20, 30], [200, 0, 0], [0, 200, 0], [0, 0, 250]]


def blocks(height=40, width=60):
    """Classes 0 to 3 in quarters, and a void corner."""
    labels = np.zeros((height, width), dtype=np.uint8)
    labels[: height // 2, width // 2 :] = 1
    labels[height // 2 :, : width // 2] = 2
    labels[height // 2 :, width // 2 :] = 3
    labels[:5, :5] = 255
    return labels


def grey(height=40, width=60, value=100):
    return np.full((height, width, 3), value, dtype=np.uint8)


# Palettes and colours


@pytest.mark.parametrize("n", [1, 2, 19, 150, 3000])
def test_default_palette_is_distinct_and_stable(n):
    palette = default_palette(n)
    assert len({tuple(colour) for colour in palette}) == n
    assert all(len(colour) == 3 and 0 <= min(colour) <= max(colour) <= 255 for colour in palette)
    assert palette == default_palette(n)
    assert palette == default_palette(n + 7)[:n]


def test_default_palette_colours_are_told_apart():
    colours = np.array(default_palette(20)).astype(float)
    distance = np.abs(colours[:, None] - colours[None]).sum(-1) + 1e9 * np.eye(20)
    assert distance.min() > 90
    assert colours.sum(1).min() > 110, "near-black is void's"


@pytest.mark.parametrize("n", [0, -2, 70000])
def test_default_palette_rejects(n):
    with pytest.raises(ValueError, match="1 to 65536"):
        default_palette(n)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64, np.uint16])
def test_colorize(dtype):
    labels = blocks().astype(dtype)
    for given in (labels, torch.from_numpy(labels.astype(np.int64))):
        painted = colorize(given, PALETTE)
        assert painted.dtype == np.uint8 and painted.shape == (40, 60, 3)
        for k in range(4):
            assert (painted[labels == k] == PALETTE[k]).all()
        assert (painted[labels == 255] == 0).all()
    assert (colorize(labels, PALETTE, void_color=(9, 8, 7))[0, 0] == [9, 8, 7]).all()


def test_colorize_void_may_be_a_class_or_negative():
    labels = np.array([[255, 3]])
    assert (colorize(labels, default_palette(256))[0, 0] == default_palette(256)[255]).all()
    assert (colorize(np.array([[-1, 2]]), PALETTE, void=-1)[0] == [[0, 0, 0], PALETTE[2]]).all()


# Files


def test_label_png_round_trip(tmp_path):
    path, labels = tmp_path / "a.png", blocks()
    save_label_png(path, torch.from_numpy(labels), PALETTE, void_color=(1, 2, 3))
    with Image.open(path) as image:
        assert image.mode == "P"
        assert np.array_equal(np.asarray(image), labels)
        entries = np.array(image.getpalette()).reshape(-1, 3)
        assert entries[:4].tolist() == PALETTE and entries[255].tolist() == [1, 2, 3]
        shown = np.asarray(image.convert("RGB"))
    assert np.array_equal(shown, colorize(labels, PALETTE, void_color=(1, 2, 3)))
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_label_png_of_256_classes_keeps_the_last_colour(tmp_path):
    labels = np.arange(256).reshape(16, 16)
    save_label_png(tmp_path / "a.png", labels, default_palette(256))
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "P" and np.array_equal(np.asarray(image), labels)
        assert np.array(image.getpalette()).reshape(-1, 3).tolist() == default_palette(256)


def test_label_png_of_more_classes_is_16_bit(tmp_path):
    labels = np.arange(300).reshape(10, 30)
    save_label_png(tmp_path / "a.png", labels, default_palette(300))
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode.startswith("I") and np.array_equal(np.asarray(image), labels)


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_label_png(path, blocks(), PALETTE)
    before = path.read_bytes()

    def broken(self, file, **options):
        file.write(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", broken)
        with pytest.raises(OSError, match="disk full"):
            save_label_png(path, blocks(20, 20), PALETTE)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    save_label_png(path, blocks(20, 20), PALETTE)
    with Image.open(path) as image:
        assert image.size == (20, 20)


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    save_image(tmp_path / "a.png", Image.new("RGB", (4, 4)))
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "a.png")]
    assert modes[0] == modes[1]


def test_save_image_formats(tmp_path):
    for name in ("a.png", "a.JPG", "a.webp"):
        save_image(tmp_path / name, Image.new("RGB", (8, 6), (250, 0, 0)))
        with Image.open(tmp_path / name) as image:
            assert image.size == (8, 6)
    with pytest.raises(ValueError, match="no picture format"):
        save_image(tmp_path / "a.xyz", Image.new("RGB", (8, 6)))


# Overlays


def test_overlay_blends_exactly():
    labels = blocks()
    plain = overlay(grey(), labels, PALETTE, alpha=0.5, legend=False, contours=False)
    array = np.asarray(plain)
    for k, colour in enumerate(PALETTE):
        expected = (100 + np.array(colour)) // 2
        assert (array[labels == k] == expected).all()
    assert (array[labels == 255] == 100).all(), "void shows the bare picture"
    solid = overlay(grey(), labels, PALETTE, alpha=1.0, legend=False, contours=False)
    assert (np.asarray(solid)[labels == 1] == PALETTE[1]).all()
    clear = overlay(grey(), labels, PALETTE, alpha=0.0, legend=False)
    assert np.array_equal(np.asarray(clear), grey())


def test_overlay_takes_every_kind_of_picture():
    labels = blocks()
    colours = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    expected = np.asarray(overlay(colours, labels, PALETTE))
    tensor = torch.from_numpy(colours.transpose(2, 0, 1).copy())
    kinds = (Image.fromarray(colours), tensor, colours.transpose(2, 0, 1))
    for picture in kinds:
        given = torch.from_numpy(labels)
        assert np.array_equal(np.asarray(overlay(picture, given, PALETTE)), expected)
    grey_level = overlay(colours[:, :, 0], labels, PALETTE)
    triple = overlay(np.repeat(colours[:, :, :1], 3, axis=2), labels, PALETTE)
    assert np.array_equal(np.asarray(grey_level), np.asarray(triple))


def test_contours_darken_borders_only():
    labels = blocks(64, 64)
    labels[labels == 255] = 0
    bare = np.asarray(overlay(grey(64, 64), labels, PALETTE, legend=False, contours=False))
    lines = np.asarray(overlay(grey(64, 64), labels, PALETTE, legend=False))
    changed = (bare != lines).any(-1)
    assert changed[31].all() and changed[:, 31].all()
    changed[31] = changed[:, 31] = False
    assert not changed.any()


@pytest.mark.parametrize(
    ("height", "width"), [(40, 60), (64, 64), (400, 700), (700, 400), (90, 1500)]
)
def test_legend_never_covers_the_picture(height, width):
    labels = blocks(height, width)
    names = ["sky", "a rather long class name", "tree", "house"]
    bare = overlay(grey(height, width), labels, PALETTE, legend=False)
    full = overlay(grey(height, width), labels, PALETTE, class_names=names)
    assert full.width > width or full.height > height
    assert np.array_equal(np.asarray(full)[:height, :width], np.asarray(bare))
    # The swatches: every class's colour is found outside of the picture.
    outside = np.asarray(full).copy()
    outside[:height, :width] = 255
    for colour in PALETTE:
        assert (outside == colour).all(-1).sum() > 50


def test_legend_leaves_out_specks_and_absent_classes():
    labels = np.zeros((100, 100), dtype=np.int64)
    labels[0, 0] = 1
    full = np.asarray(overlay(grey(100, 100), labels, PALETTE, min_share=0.001))[:, 100:]
    assert (full == PALETTE[0]).all(-1).any()
    assert not (full == PALETTE[1]).all(-1).any()
    assert not (full == PALETTE[2]).all(-1).any()
    with_speck = np.asarray(overlay(grey(100, 100), labels, PALETTE, min_share=0.0))[:, 100:]
    assert (with_speck == PALETTE[1]).all(-1).any()


def test_long_legends_wrap_into_columns():
    labels = np.kron(np.arange(150).reshape(10, 15), np.ones((20, 20), dtype=np.int64))
    palette = default_palette(150)
    full = overlay(grey(200, 300), labels, palette)
    outside = np.asarray(full).astype(np.int64) @ [65536, 256, 1]
    outside[:200, :300] = 0
    found = dict(zip(*np.unique(outside, return_counts=True), strict=True))
    assert all(found.get(r * 65536 + g * 256 + b, 0) > 20 for r, g, b in palette)
    assert full.height < 900 and full.width < 900


def test_a_picture_without_classes_has_no_legend():
    labels = np.full((30, 30), 255)
    assert overlay(grey(30, 30), labels, PALETTE, min_share=2.0).size == (30, 30)
    assert overlay(grey(30, 30), labels, PALETTE).width > 30, "void is named"


def test_side_by_side_keeps_every_picture():
    first = np.random.default_rng(1).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    second = torch.full((3, 80, 40), 17, dtype=torch.uint8)
    third = Image.new("L", (10, 10), 90)
    page = np.asarray(side_by_side([("input", first), ("a longer title", second), ("", third)]))
    windows = np.lib.stride_tricks.sliding_window_view(page, (50, 70, 3))[:, :, 0]
    assert (windows[:, :10] == first).all((-3, -2, -1)).any()
    assert (page == 17).all(-1).sum() >= 80 * 40
    assert page.shape[1] > 70 + 40 + 10
    taller = side_by_side([("a", first)], legend=[((1, 2, 3), "sky", "IoU 9 %")])
    assert taller.height > side_by_side([("a", first)]).height
    assert (np.asarray(taller) == [1, 2, 3]).all(-1).sum() > 50


# Errors


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: colorize(np.array([[4]]), PALETTE),
            ValueError,
            r"\[0, 4\) or 255 for void, got 4",
        ),
        (lambda: colorize(np.array([[-1]]), PALETTE), ValueError, "got -1"),
        (lambda: colorize(np.zeros((2, 2)), PALETTE), TypeError, "integers, got float64"),
        (lambda: colorize([[1]], PALETTE), TypeError, "array or a tensor, got list"),
        (lambda: colorize(np.zeros((1, 2, 2), int), PALETTE), ValueError, r"\(H, W\), got shape"),
        (lambda: colorize(np.zeros((0, 2), int), PALETTE), ValueError, "no pixels"),
        (lambda: colorize(np.zeros((2, 2), int), [1, 2, 3]), ValueError, "RGB triples"),
        (lambda: colorize(np.zeros((2, 2), int), [[1, 2, 300]]), ValueError, "1 ... 300"),
        (lambda: colorize(np.zeros((2, 2), int), [[0.1, 1, 1]]), TypeError, "palette .* float64"),
        (lambda: overlay(grey(), blocks(40, 61), PALETTE), ValueError, "40 x 60 .* 40 x 61"),
        (lambda: overlay(grey(), blocks(), PALETTE, alpha=1.5), ValueError, "got 1.5"),
        (
            lambda: overlay(grey(), blocks(), PALETTE, class_names="ab"),
            ValueError,
            "4 colours but 2",
        ),
        (lambda: overlay(grey() / 255.0, blocks(), PALETTE), TypeError, "uint8 .* got float64"),
        (lambda: overlay(grey()[:, :, :2], blocks(), PALETTE), ValueError, "got shape"),
        (lambda: overlay("a.png", blocks(), PALETTE), TypeError, "got str"),
        (lambda: overlay(Image.new("F", (60, 40)), blocks(), PALETTE), TypeError, "mode 'F'"),
        (lambda: side_by_side([]), ValueError, "at least one"),
    ],
)
def test_rejects_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize(
    ("name", "labels", "palette", "options", "text"),
    [
        ("a.jpg", blocks(), PALETTE, {}, "written as .png, got 'a.jpg'"),
        ("a.png", np.array([[7]]), PALETTE, {}, "got 7"),
        ("a.png", np.array([[300]]), default_palette(256), {}, "got 300"),
        ("a.png", np.array([[1]]), PALETTE, {"void": -1}, r"void must be in \[0, 255\]"),
        ("a.png", np.array([[1]]), default_palette(257), {"void": -1}, r"\[0, 65535\]"),
    ],
)
def test_label_png_rejects(tmp_path, name, labels, palette, options, text):
    with pytest.raises(ValueError, match=text):
        save_label_png(tmp_path / name, labels, palette, **options)
    assert list(tmp_path.iterdir()) == []
