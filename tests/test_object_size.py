"""Connected components of label maps against a flood fill."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segmenter_fast.object_size import AREAS, SIZES, object_sizes

IGNORED = 255


def flood_fill(target, areas):
    """(sizes, objects) by walking from pixel to pixel."""
    height, width = target.shape
    sizes = torch.full((height, width), 255, dtype=torch.uint8)
    objects = [0, 0, 0]
    seen = set()
    for start in np.ndindex(height, width):
        label = int(target[start])
        if start in seen or label == IGNORED:
            continue
        region, queue = {start}, [start]
        while queue:
            row, col = queue.pop()
            for near in np.ndindex(3, 3):
                place = (row + near[0] - 1, col + near[1] - 1)
                inside = 0 <= place[0] < height and 0 <= place[1] < width
                if inside and place not in region and int(target[place]) == label:
                    region.add(place)
                    queue.append(place)
        seen |= region
        size = sum(len(region) >= area for area in areas)
        objects[size] += 1
        for place in region:
            sizes[place] = size
    return sizes, torch.tensor(objects)


def assert_as_flood_fill(target, areas):
    sizes, objects = object_sizes(target, IGNORED, areas)
    expected, counted = flood_fill(target, areas)
    assert torch.equal(sizes, expected)
    assert torch.equal(objects, counted)


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    labels=st.sampled_from([(0,), (0, 1), (0, 1, IGNORED), (IGNORED,), (3, 7, 9, IGNORED)]),
    areas=st.sampled_from([(1, 1), (2, 5), (4, 30), (1000, 2000)]),
    seed=st.integers(0, 10**6),
    smooth=st.booleans(),
)
def test_matches_a_flood_fill(shape, labels, areas, seed, smooth):
    target = np.random.default_rng(seed).choice(np.array(labels, np.uint8), shape)
    if smooth:
        target = target.repeat(3, 0).repeat(2, 1)[: shape[0], : shape[1]]
    assert_as_flood_fill(torch.from_numpy(np.ascontiguousarray(target)), areas)


def winding_path(height, width):
    """One component that fills every second row, joined at alternate ends."""
    path = np.zeros((height, width), np.uint8)
    path[::2] = 1
    path[1::4, -1] = path[3::4, 0] = 1
    return path


@pytest.mark.parametrize("turn", [lambda x: x, np.transpose, np.rot90, np.fliplr])
def test_long_paths_are_one_object(turn):
    target = torch.from_numpy(np.ascontiguousarray(turn(winding_path(41, 37))))
    assert_as_flood_fill(target, (5, 700))
    sizes, objects = object_sizes(target, IGNORED, (5, 700))
    assert objects[2] == 1 and (sizes[target == 1] == 2).all()


def test_thresholds_are_the_first_area_of_the_larger_size():
    target = torch.full((100, 230), IGNORED)
    target[0, :1] = 4
    target[2:33, :33] = 1  # 31 x 33 = 1023
    target[2:34, 40:72] = 1  # 32 x 32 = 1024
    target[2:97, 80:177] = 1  # 95 x 97 = 9215
    sizes, objects = object_sizes(target)
    assert AREAS == (1024, 9216) and SIZES == ("small", "medium", "large")
    assert [int(sizes[place]) for place in ((0, 0), (2, 0), (2, 40), (2, 80))] == [0, 0, 1, 1]
    assert objects.tolist() == [2, 2, 0]
    target[97, 80] = 1  # one pixel more: 9216
    assert int(object_sizes(target)[0][2, 80]) == 2


def test_what_touches_and_what_does_not():
    touching = torch.tensor([[1, 0], [0, 1]])  # both diagonals
    assert object_sizes(touching, areas=(2, 3))[1].tolist() == [0, 2, 0]
    parted = torch.tensor([[5, 255, 5]])
    assert object_sizes(parted, areas=(2, 3))[1].tolist() == [2, 0, 0]
    # The end of one row is no neighbour of the beginning of the next but one.
    rows = torch.tensor([[0, 0, 1], [2, 2, 2], [1, 0, 0]])
    assert object_sizes(rows, areas=(1, 4))[1].tolist() == [0, 5, 0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_types_and_any_ignore_index(dtype):
    target = torch.tensor([[0, 0, 3, 3], [3, 3, 3, 0]], dtype=dtype)
    sizes, objects = object_sizes(target, ignore_index=3, areas=(2, 5))
    assert sizes.tolist() == [[1, 1, 255, 255], [255, 255, 255, 0]] and objects.tolist() == [
        1,
        1,
        0,
    ]


def test_empty_and_bad_input():
    for shape in ((0, 5), (5, 0)):
        sizes, objects = object_sizes(torch.zeros(shape, dtype=torch.uint8))
        assert sizes.shape == shape and objects.sum() == 0
    with pytest.raises(ValueError, match=r"target must be \(H, W\), got \(1, 2, 3\)"):
        object_sizes(torch.zeros(1, 2, 3))
    for areas in ((5,), (5, 4), (0, 3), (1, 2, 3)):
        with pytest.raises(ValueError, match=r"two numbers of pixels.*such as 1024,9216"):
            object_sizes(torch.zeros(2, 2), areas=areas)
