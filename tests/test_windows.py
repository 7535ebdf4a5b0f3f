"""Windows, scales and flips from tap tables, held to the protocol's own full-resolution steps."""

import itertools

import pytest
import torch

from segmenter_fast.ops.windows import (
    CPU_TILE,
    WindowLogits,
    WindowView,
    axis_taps,
    window_anchors,
    window_logits_reference,
    window_probabilities_reference,
)

# image, window, stride, patch, output, flip: strides that no patch divides, padding, both resizes
CASES = {
    "one window": ((64, 64), (64, 64), 64, 8, (64, 64), False),
    "aligned": ((64, 96), (32, 32), 16, 16, (64, 96), False),
    "unaligned stride": ((70, 101), (48, 48), 31, 16, (70, 101), False),
    "smaller and flipped": ((70, 101), (48, 48), 31, 16, (53, 47), True),
    "larger and flipped": ((90, 77), (50, 50), 37, 16, (120, 177), True),
    "much smaller": ((97, 133), (41, 41), 13, 8, (5, 3), False),
    "many overlaps": ((40, 61), (24, 24), 5, 8, (41, 61), True),
    "whole image": ((37, 53), (37, 53), 53, 16, (37, 53), True),
    "one pixel": ((1, 1), (1, 1), 1, 16, (3, 2), False),
    "thin": ((5, 300), (5, 5), 4, 4, (5, 300), False),
}


def make_view(case, n_cls=6, dtype=torch.float64, seed=0):
    image_size, window, stride, patch, _, flip = case
    count = 1
    for length, side in zip(image_size, window, strict=True):
        count *= len(window_anchors(length, side, stride))
    grid = [-(-side // patch) for side in window]
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, n_cls, *grid, generator=generator, dtype=torch.float64)
    return WindowView(logits.to(dtype), image_size, window, stride, patch, flip)


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


# -------------------------------------------------------------------------------- anchors and taps
@pytest.mark.parametrize(
    ("length", "window", "stride", "expected"),
    [
        (64, 64, 64, [0]),
        (64, 64, 100, [0]),
        (65, 64, 64, [0, 1]),
        (128, 64, 64, [0, 64]),
        (134, 64, 48, [0, 48, 70]),
        (10, 4, 3, [0, 3, 6]),
    ],
)
def test_anchors(length, window, stride, expected):
    assert window_anchors(length, window, stride) == expected


def test_anchors_cover_every_pixel_and_stay_inside():
    for length in range(1, 40):
        for window in range(1, length + 1):
            for stride in range(1, window + 1):
                anchors = window_anchors(length, window, stride)
                assert anchors[0] == 0 and anchors[-1] == length - window
                steps = [b - a for a, b in itertools.pairwise(anchors)]
                assert all(0 < step <= window for step in steps)


def test_taps_are_the_composed_matrices(case):
    image_size, window, stride, patch, output, flip = case
    for axis in (0, 1):
        length, side = image_size[axis], window[axis]
        taps = axis_taps(length, side, stride, patch, output[axis], flip, torch.float64)
        # The same operator from the reference: one class, the other axis one pixel and one patch.
        anchors = window_anchors(length, side, stride)
        grid = len(anchors) * -(-side // patch)
        basis = torch.eye(grid, dtype=torch.float64).reshape(grid, len(anchors), -1, 1)
        view = WindowView(basis.transpose(0, 1), (length, 1), (side, 1), stride, patch)
        columns = window_logits_reference(view, (output[axis], 1))[..., 0]
        expected = columns.T.flip(0) if flip else columns.T
        torch.testing.assert_close(taps.dense(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tap_weights_are_positive_and_sum_to_one(case, dtype):
    image_size, window, stride, patch, output, flip = case
    for axis in (0, 1):
        taps = axis_taps(image_size[axis], window[axis], stride, patch, output[axis], flip, dtype)
        assert taps.weight.dtype == dtype and taps.start.dtype == taps.index.dtype == torch.int32
        assert taps.start[0] == 0 and taps.start[-1] == len(taps.index) == len(taps.weight)
        assert (taps.start.diff() > 0).all()
        assert (taps.weight > 0).all()
        assert 0 <= int(taps.index.min()) and int(taps.index.max()) < taps.grid
        ones = torch.ones(output[axis], dtype=dtype)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(taps.dense().sum(1), ones, rtol=0, atol=8 * eps)


# -------------------------------------------------------------------------------------- evaluation
def test_matches_reference_in_float64(case):
    view, size = make_view(case), case[4]
    expected = window_probabilities_reference([view], size)
    logits = WindowLogits([view], size, tile=(7, 19))
    torch.testing.assert_close(logits.probabilities(), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        logits.probabilities(top1=True), expected.amax(0), rtol=0, atol=1e-12
    )
    assert torch.equal(logits.labels().long(), expected.argmax(0))


def test_several_views_match_reference_in_float64():
    cases = [CASES[name] for name in ("unaligned stride", "smaller and flipped", "whole image")]
    views, size = [make_view(case, seed=i) for i, case in enumerate(cases)], (66, 93)
    expected = window_probabilities_reference(views, size)
    labels, probabilities = WindowLogits(views, size).labels_and_probabilities()
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-12)
    assert torch.equal(labels.long(), expected.argmax(0))
    assert torch.equal(WindowLogits(views, size).labels(), labels)
    torch.testing.assert_close(probabilities.sum(0), torch.ones(size).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matches_reference_within_rounding(case, dtype):
    view, size = make_view(case, n_cls=19, dtype=dtype), case[4]
    expected = window_logits_reference(view, size)
    assert expected.dtype == torch.float32
    top = expected.topk(2, dim=0).values
    labels, probabilities = WindowLogits([view], size).labels_and_probabilities()
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities, expected.softmax(0), rtol=0, atol=1e-4)
    clear = top[0] - top[1] > 1e-3
    assert torch.equal(labels.long()[clear], expected.argmax(0)[clear])


def test_pruned_labels_equal_unpruned():
    # Smooth logits: most classes can be dropped from most tiles, and which ones differs by tile.
    case = ((96, 144), (64, 64), 40, 8, (96, 144), False)
    view = make_view(case, n_cls=40)
    smooth = torch.nn.functional.interpolate(view.logits[:, :, :2, :2], (8, 8), mode="bicubic")
    view = WindowView(smooth, *case[:4])
    expected = window_logits_reference(view, case[4])
    for tile in ((8, 8), (16, 48), (96, 144)):
        assert torch.equal(WindowLogits([view], case[4], tile).labels().long(), expected.argmax(0))


@pytest.mark.parametrize("tile", [(1, 1), (3, 200), (200, 3), (64, 64), CPU_TILE])
def test_tile_does_not_matter(tile):
    case = CASES["unaligned stride"]
    views = [make_view(case), make_view(CASES["smaller and flipped"], seed=1)]
    size = (31, 44)
    expected = WindowLogits(views, size, tile=(16, 128)).probabilities()
    tiled = WindowLogits(views, size, tile).probabilities()
    torch.testing.assert_close(tiled, expected, rtol=0, atol=1e-13)


def test_first_class_wins_ties():
    case = CASES["unaligned stride"]
    view = make_view(case, n_cls=5)
    tied = WindowView(view.logits[:, :1].expand(-1, 5, -1, -1), *case[:4])
    assert not WindowLogits([tied], case[4]).labels().any()
    assert not WindowLogits([tied, tied], case[4]).labels().any()


def test_nan_counts_as_largest_where_it_is_read_and_nowhere_else():
    case = ((64, 64), (32, 32), 32, 16, (64, 64), False)
    view = make_view(case, n_cls=4)
    clean = WindowLogits([view], case[4], tile=(8, 8)).labels()
    logits = view.logits.clone()
    logits[0, 2, 0, 0] = float("nan")
    labels = WindowLogits([WindowView(logits, *case[:4])], case[4], tile=(8, 8)).labels()
    rows, columns = (
        axis_taps(64, 32, 32, 16, 64, dtype=torch.float64).dense()[:, 0] > 0 for _ in range(2)
    )
    read = rows[:, None] & columns
    assert read.any() and not read.all()
    assert (labels[read] == 2).all()
    # A tile that reads the patch spreads it to the tile's pixels of weight 0 (0 x NaN), no further.
    assert torch.equal(labels[32:], clean[32:]) and torch.equal(labels[:, 32:], clean[:, 32:])


def test_label_dtype_grows_with_classes():
    case = ((8, 8), (8, 8), 8, 8, (8, 8), False)
    for n_cls, dtype in ((256, torch.uint8), (257, torch.int16), (32768, torch.int32)):
        view = make_view(case, n_cls=n_cls, dtype=torch.float32)
        labels = WindowLogits([view], (8, 8)).labels()
        assert labels.dtype == dtype
        assert (labels == int(view.logits[0, :, 0, 0].argmax())).all()


def test_strided_logits():
    case = CASES["unaligned stride"]
    view = make_view(case)
    last = view.logits.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    strided = WindowView(last, *case[:4])
    assert not last.is_contiguous()
    ours = WindowLogits([strided], case[4]).probabilities()
    assert torch.equal(ours, WindowLogits([view], case[4]).probabilities())


def test_autocast_does_not_round_the_weights():
    case = CASES["unaligned stride"]
    logits = WindowLogits([make_view(case, dtype=torch.float32)], case[4])
    plain = logits.probabilities()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logits.probabilities(), plain)


# --------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((10, 11, 5), ValueError, "does not fit"),
        ((10, 4, 5), ValueError, "no prediction"),
        ((10, 0, 1), ValueError, "window must be at least 1"),
        ((0, 1, 1), ValueError, "length must be at least 1"),
        ((10, 4, 0), ValueError, "stride must be at least 1"),
        ((10.0, 4, 4), TypeError, "length must be an int"),
        ((10, True, 4), TypeError, "window must be an int"),
    ],
)
def test_rejects_bad_anchors(arguments, error, message):
    with pytest.raises(error, match=message):
        window_anchors(*arguments)


def test_rejects_bad_taps():
    with pytest.raises(ValueError, match="size must be at least 1"):
        axis_taps(10, 4, 4, 2, 0)
    with pytest.raises(ValueError, match="patch_size must be at least 1"):
        axis_taps(10, 4, 4, 0, 10)


def test_rejects_bad_views():
    logits = torch.zeros(4, 3, 2, 2)
    WindowView(logits, (48, 48), (32, 32), 16, 16)
    for bad in (logits[0], logits[:3], logits[:, :, :1]):
        with pytest.raises(ValueError, match=r"logits must be \(4, K, 2, 2\)"):
            WindowView(bad, (48, 48), (32, 32), 16, 16)
    with pytest.raises(TypeError, match="floating point"):
        WindowView(logits.long(), (48, 48), (32, 32), 16, 16)
    with pytest.raises(ValueError, match="at least one class"):
        WindowView(logits[:, :0], (48, 48), (32, 32), 16, 16)
    with pytest.raises(ValueError, match=r"window must be \(H, W\)"):
        WindowView(logits, (48, 48), 32, 16, 16)
    with pytest.raises(ValueError, match="does not fit"):
        WindowView(logits, (48, 48), (64, 64), 16, 16)


def test_rejects_bad_collections():
    view = WindowView(torch.zeros(4, 3, 2, 2), (48, 48), (32, 32), 16, 16)
    other = WindowView(torch.zeros(4, 5, 2, 2), (48, 48), (32, 32), 16, 16)
    with pytest.raises(ValueError, match="views is empty"):
        WindowLogits([], (4, 4))
    with pytest.raises(ValueError, match="views differ"):
        WindowLogits([view, other], (4, 4))
    with pytest.raises(ValueError, match="size"):
        WindowLogits([view], (4, 0))
    with pytest.raises(ValueError, match=r"size must be \(H, W\)"):
        WindowLogits([view], 4)
    with pytest.raises(ValueError, match="tile"):
        WindowLogits([view], (4, 4), tile=(0, 4))
