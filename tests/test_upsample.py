"""Bilinear upsampling: geometry, targets, and the upsampled logits themselves."""

import pytest
import torch
import torch.nn.functional as F
from checks import interpolation_matrix
from dense_cases import (
    GOOD,
    HALF,
    LABELS,
    STRIDED_LAYOUTS,
    bad_geometry,
    bad_target,
    noise,
    plain_logits,
    shapes,
    strided_as,
)

from segmenter_fast.backend import BackendError
from segmenter_fast.ops.upsample import (
    check_geometry,
    check_labels,
    check_target,
    label_dtype,
    upcast,
    upsample_logits,
)


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
def test_matches_reference(case, dtype):
    shape, size, crop = case
    logits = noise(shape, dtype)
    result = upsample_logits(logits, size, crop)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(result, plain_logits(logits, size, crop))
    top, left, height, width = crop or (0, 0, *size)
    rows = interpolation_matrix(size[0], shape[2], result.dtype)[top : top + height]
    columns = interpolation_matrix(size[1], shape[3], result.dtype)[left : left + width]
    exact = torch.einsum("yh,bkhw,xw->bkyx", rows, logits.double(), columns)
    scale = exact.abs().max()
    assert (result - exact).abs().max() <= 64 * torch.finfo(result.dtype).eps * scale


def test_gradient_is_that_of_interpolate():
    logits = noise((1, 3, 2, 3), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: upsample_logits(x, (6, 5), (1, 0, 4, 5)), (logits,))


@pytest.mark.parametrize("layout", STRIDED_LAYOUTS)
def test_strided_inputs(layout):
    strided = strided_as(layout, noise((2, 11, 5, 6)))
    assert not strided.is_contiguous()
    assert torch.equal(
        upsample_logits(strided, (31, 37)), upsample_logits(strided.contiguous(), (31, 37))
    )


def test_empty():
    assert upsample_logits(torch.empty(0, 5, 3, 4), (8, 9)).shape == (0, 5, 8, 9)


def test_compile_fullgraph():
    function = torch.compile(upsample_logits, fullgraph=True, backend="aot_eager")
    logits = noise((2, 5, 3, 4))
    torch.testing.assert_close(function(logits, (13, 17)), upsample_logits(logits, (13, 17)))


def test_label_dtype_is_the_smallest_that_holds_the_classes():
    for n_cls, dtype in (
        (1, torch.uint8),
        (256, torch.uint8),
        (257, torch.int16),
        (32767, torch.int16),
        (32768, torch.int32),
    ):
        assert label_dtype(n_cls) == dtype
        assert n_cls - 1 <= torch.iinfo(dtype).max


def test_upcast():
    for dtype in HALF:
        assert upcast(GOOD.to(dtype)).dtype == torch.float32
    for dtype in (torch.float32, torch.float64):
        assert upcast(GOOD.to(dtype)).dtype == dtype


def test_geometry_is_filled_in():
    assert check_geometry(GOOD, [8, 9], None) == ((8, 9), (0, 0, 8, 9))
    assert check_geometry(GOOD, (8, 9), [1, 2, 3, 4]) == ((8, 9), (1, 2, 3, 4))
    assert check_target(LABELS, GOOD, None, None) == ((8, 8), (0, 0, 8, 8))


@bad_geometry
def test_rejects_bad_input(logits, size, crop, error, text):
    with pytest.raises(error, match=text):
        upsample_logits(logits, size, crop)


@bad_target
def test_rejects_bad_target(target, options, error, text):
    geometry = {name: options.get(name) for name in ("size", "crop")}
    with pytest.raises(error, match=text):
        check_target(target, GOOD, **geometry)
        check_labels(target, 3, options.get("ignore_index", 255))


def test_refuses_a_backend_that_cannot_run():
    with pytest.raises(BackendError, match="triton"):
        upsample_logits(GOOD, (8, 8), backend="triton")


def test_same_size_is_the_logits():
    logits = noise((2, 5, 3, 4))
    assert torch.equal(upsample_logits(logits, (3, 4)), logits)
    assert torch.equal(upsample_logits(logits, (3, 4), (1, 1, 2, 3)), logits[:, :, 1:, 1:])
    shifted = upsample_logits(logits + 3, (9, 11)) - 3
    assert torch.allclose(shifted, F.interpolate(logits, (9, 11), mode="bilinear"), atol=1e-5)
