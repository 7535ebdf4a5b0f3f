"""Labels in Triton, called directly so that no other code can stand in for the kernels."""

import pytest
import torch
from checks import assert_labels
from dense_cases import GOOD, STRIDED_LAYOUTS, bad_geometry, noise, shapes, strided_as
from triton_cases import DEVICE, DTYPES, dtypes, few_shapes, on_device

from segmenter_fast.ops import _triton
from segmenter_fast.ops.upsample_argmax import upsample_argmax

pytestmark = on_device

ARGMAX = torch.ops.segmenter_fast.upsample_argmax_triton


def labels_of(logits, size, crop=None):
    return ARGMAX(logits.to(DEVICE), size, crop or (0, 0, *size))


def torch_labels(logits, size):
    full = torch.nn.functional.interpolate(logits.float(), size, mode="bilinear")
    return full.argmax(1)


@shapes
def test_matches_reference(case):
    shape, size, crop = case
    assert_labels(labels_of(noise(shape), size, crop), noise(shape), size, crop)


@dtypes
@few_shapes
def test_every_dtype(case, dtype):
    shape, size, crop = case
    logits = noise(shape, dtype)
    assert_labels(labels_of(logits, size, crop), logits, size, crop)


def test_float64_is_as_exact_as_its_input():
    logits = noise((1, 6, 3, 4), torch.float64) * 1e-9 + 1  # all equal in float32
    assert_labels(labels_of(logits, (20, 31)), logits, (20, 31))


@pytest.mark.parametrize("candidate", [0, 1])
def test_every_configuration(candidate):
    logits = noise((1, 7, 3, 4))
    with _triton.use_candidate(candidate):
        assert_labels(labels_of(logits, (48, 50)), logits, (48, 50))


def test_opcheck():
    logits = noise((1, 5, 2, 3)).to(DEVICE)
    torch.library.opcheck(ARGMAX, (logits, (9, 14), (1, 2, 5, 7)))


def test_compile_fullgraph():
    logits = noise((1, 5, 2, 3)).to(DEVICE)
    function = torch.compile(
        lambda x: upsample_argmax(x * 2, (9, 14), backend="triton"),
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(function(logits), labels_of(logits, (9, 14)))


@pytest.mark.parametrize("layout", STRIDED_LAYOUTS)
def test_strided_inputs(layout):
    dense = noise((2, 5, 4, 3))
    shown = strided_as(layout, dense)
    labels = labels_of(shown.contiguous(), (30, 22))
    # `.to` keeps the strides, but for the broadcast ones on another device.
    assert torch.equal(labels_of(shown, (30, 22)), labels)


def test_empty():
    assert labels_of(noise((2, 3, 2, 2))[:0], (8, 8)).shape == (0, 8, 8)


@bad_geometry
def test_rejects_bad_input(logits, size, crop, error, text):
    with pytest.raises(error, match=text):
        upsample_argmax(logits, size, crop, backend="triton")


def test_rejects_what_does_not_fit_in_32_bits():
    with pytest.raises(ValueError, match="upsamples 3000 patches"):
        ARGMAX(torch.zeros(1, 1, 1, 3000, device=DEVICE), (1, 500_000), (0, 0, 1, 4))


@pytest.mark.skipif(DEVICE == "cuda", reason="needs a tensor that kernels cannot run on")
def test_rejects_a_device_without_kernels(monkeypatch):
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    with pytest.raises(_triton.BackendError, match="runs on a GPU; the input is on 'cpu'"):
        ARGMAX(GOOD, (8, 8), (0, 0, 8, 8))


# --------------------------------------------------------------------------- properties
def test_the_first_class_wins_ties():
    logits = torch.zeros(1, 40, 2, 2)
    assert (labels_of(logits, (20, 20)) == 0).all()
    logits[:, 33:] = 1.0  # in the second block of classes
    assert (labels_of(logits, (20, 20)) == 33).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("k", [0, 36])
def test_special_values_as_in_torch(value, k):
    logits = noise((1, 37, 3, 4))
    logits[0, k, 1, 2] = value  # also read, with weight 0, by the pixels of the upper border
    assert torch.equal(labels_of(logits, (40, 50)).cpu(), torch_labels(logits, (40, 50)).byte())


def test_a_far_class_is_never_dropped():
    """Every class wins somewhere: one patch each, so that tiles have many candidates."""
    logits = torch.eye(24).reshape(1, 24, 4, 6) * 9
    labels = labels_of(logits, (64, 96))
    assert set(labels.unique().tolist()) == set(range(24))
    assert_labels(labels, logits, (64, 96))


def test_agrees_with_native():
    logits = noise((2, 9, 5, 4))
    ours = labels_of(logits, (37, 61)).cpu()
    native = torch.ops.segmenter_fast.upsample_argmax(logits, (37, 61), (0, 0, 37, 61))
    assert (ours != native).float().mean() < 2e-3  # ties but for rounding


def test_launches_are_recorded():
    """What the compile report relies on: nothing runs, and every launch is written down."""
    with _triton.Recorder(90) as recorder:
        for dtype in DTYPES:
            ARGMAX(noise((1, 5, 2, 3), dtype), (9, 14), (0, 0, 9, 14))
    names = [launch.kernel.name for launch in recorder.launches]
    assert names == ["candidates", "labels"] * len(DTYPES)
    assert recorder.launches[1].arguments["K"] == 5
