"""Bilinear upsampling and its consumers: labels, probabilities, cross-entropy, confusion."""

import math

import pytest
import torch
import torch.nn.functional as F
from checks import assert_labels, assert_matches
from dense_cases import (
    GOOD,
    HALF,
    LABELS,
    STRIDED_LAYOUTS,
    bad_geometry,
    bad_target,
    noise,
    plain_logits,
    random_target,
    shapes,
    strided_as,
)
from torch import Tensor

from segmenter_fast.backend import BackendError
from segmenter_fast.ops.confusion import upsample_confusion
from segmenter_fast.ops.upsample import upsample_logits
from segmenter_fast.ops.upsample_argmax import upsample_argmax
from segmenter_fast.ops.upsample_cross_entropy import upsample_cross_entropy
from segmenter_fast.ops.upsample_probabilities import upsample_probabilities


def native_labels(logits: Tensor, size: tuple[int, int], crop: tuple | None = None) -> Tensor:
    """The kernel itself, so that nothing can stand in for it."""
    return torch.ops.segmenter_fast.upsample_argmax(logits, size, crop or (0, 0, *size))


# ------------------------------------------------------------------------------------- reference
@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
def test_matches_reference(case, dtype):
    shape, size, crop = case
    logits = noise(shape, dtype)
    labels = native_labels(logits, size, crop)
    n_cls = shape[1]
    assert labels.dtype == (torch.uint8 if n_cls <= 256 else torch.int16)
    assert_labels(labels, logits, size, crop)
    assert_labels(upsample_argmax(logits, size, crop, backend="reference"), logits, size, crop)
    assert torch.equal(upsample_argmax(logits, size, crop), labels)


def test_int32_labels():
    logits = torch.zeros(1, 32768, 1, 2)
    logits[0, -1] = 1.0
    for backend in ("reference", "native"):
        labels = upsample_argmax(logits, (2, 3), backend=backend)
        assert labels.dtype == torch.int32
        assert labels.eq(32767).all()


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("top1", [False, True])
def test_probabilities_match_reference(case, dtype, top1):
    shape, size, crop = case

    def reference(logits: Tensor) -> Tensor:
        p = plain_logits(logits, size, crop).softmax(dim=1)
        return p.amax(dim=1) if top1 else p

    assert_matches(
        lambda logits: upsample_probabilities(logits, size, crop, top1=top1),
        reference,
        lambda dtype: {"logits": noise(shape, dtype)},
        dtype,
    )


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_cross_entropy_matches_reference(case, dtype):
    shape, size, crop = case
    output = crop[2:] if crop else size
    target = random_target((shape[0], *output), shape[1])
    target[:, 0, 0] = shape[1] - 1  # never all ignored
    assert_matches(
        lambda logits: upsample_cross_entropy(logits, target, size, crop),
        lambda logits: F.cross_entropy(plain_logits(logits, size, crop), target, ignore_index=255),
        lambda dtype: {"logits": noise(shape, dtype)},
        dtype,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_cross_entropy_options(reduction, label_smoothing, weighted, dtype):
    target = random_target((2, 23, 29), 7, dtype)
    weight = torch.linspace(0.1, 2.0, 7, dtype=torch.float64) if weighted else None
    options = {"label_smoothing": label_smoothing, "reduction": reduction}

    def reference(logits: Tensor) -> Tensor:
        full = plain_logits(logits, (23, 29))
        scale = None if weight is None else weight.to(full.dtype)
        return F.cross_entropy(full, target.long(), weight=scale, ignore_index=255, **options)

    assert_matches(
        lambda logits: upsample_cross_entropy(logits, target, weight=weight, **options),
        reference,
        lambda dtype: {"logits": noise((2, 7, 3, 4), dtype)},
        torch.float32,
    )


def test_logits_are_interpolate_and_crop():
    logits = noise((2, 5, 4, 3), torch.bfloat16)
    result = upsample_logits(logits, (33, 29), (2, 3, 30, 20))
    assert result.dtype == torch.float32
    assert torch.equal(result, plain_logits(logits, (33, 29), (2, 3, 30, 20)))


# ------------------------------------------------------------------------------------- machinery
def test_gradcheck():
    logits = noise((1, 3, 2, 3), torch.float64).requires_grad_()
    target = torch.randint(0, 3, (1, 4, 5), generator=torch.Generator().manual_seed(0))
    target[0, 0, 0] = 255
    weight = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    crop = (1, 0, 4, 5)
    for function in (
        lambda x: upsample_cross_entropy(x, target, weight=weight, label_smoothing=0.1),
        lambda x: upsample_cross_entropy(x, target, (6, 5), crop, reduction="none"),
        lambda x: upsample_probabilities(x, (4, 5)),
        lambda x: upsample_probabilities(x, (4, 5), top1=True),
    ):
        assert torch.autograd.gradcheck(function, (logits,))


@pytest.mark.parametrize("n_cls", [5, 300])
def test_opcheck(n_cls):
    op = torch.ops.segmenter_fast.upsample_argmax.default
    torch.library.opcheck(op, (noise((2, n_cls, 3, 4)), [13, 17], [1, 2, 5, 7]))


def test_compile_fullgraph():
    logits = noise((2, 5, 3, 4))
    target = random_target((2, 13, 17), 5)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            upsample_cross_entropy(logits, target, label_smoothing=0.1),
            upsample_argmax(logits, (13, 17)),
            upsample_probabilities(logits, (13, 17), top1=True),
        )

    loss, labels, top1 = compiled(logits, target)
    assert torch.allclose(loss, upsample_cross_entropy(logits, target, label_smoothing=0.1))
    assert torch.equal(labels, native_labels(logits, (13, 17)))
    assert torch.allclose(top1, upsample_probabilities(logits, (13, 17)).amax(dim=1))


@pytest.mark.parametrize("layout", STRIDED_LAYOUTS)
def test_strided_inputs(layout):
    strided = strided_as(layout, noise((2, 11, 5, 6)))
    assert not strided.is_contiguous()
    dense = strided.contiguous()
    target = random_target((2, 31, 37), 11)
    assert torch.equal(native_labels(strided, (31, 37)), native_labels(dense, (31, 37)))
    for consumer in (
        lambda x: upsample_logits(x, (31, 37)),
        lambda x: upsample_probabilities(x, (31, 37), top1=True),
        lambda x: upsample_cross_entropy(x, target),
        lambda x: upsample_confusion(x, target),
        lambda x: upsample_confusion(x, target.mT.contiguous().mT),
    ):
        assert torch.equal(consumer(strided), consumer(dense))


def test_empty():
    logits = torch.empty(0, 5, 3, 4)
    target = torch.empty(0, 8, 9, dtype=torch.int64)
    assert native_labels(logits, (8, 9)).shape == (0, 8, 9)
    assert upsample_argmax(logits, (8, 9), backend="reference").shape == (0, 8, 9)
    assert upsample_logits(logits, (8, 9)).shape == (0, 5, 8, 9)
    assert upsample_probabilities(logits, (8, 9), top1=True).shape == (0, 8, 9)
    assert upsample_cross_entropy(logits, target).isnan()
    assert upsample_cross_entropy(logits, target, reduction="sum") == 0
    assert upsample_confusion(logits, target).eq(0).all()


@bad_geometry
@pytest.mark.parametrize("function", [upsample_argmax, upsample_logits, upsample_probabilities])
def test_rejects_bad_input(function, logits, size, crop, error, text):
    with pytest.raises(error, match=text):
        function(logits, size, crop)


@bad_target
@pytest.mark.parametrize("function", [upsample_cross_entropy, upsample_confusion])
def test_rejects_bad_target(function, target, options, error, text):
    with pytest.raises(error, match=text):
        function(GOOD, target, **options)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"reduction": "average"}, ValueError, "'mean', 'sum' or 'none', got 'average'"),
        ({"label_smoothing": 1.5}, ValueError, r"\[0, 1\], got 1.5"),
        ({"weight": torch.ones(4)}, ValueError, r"\(3,\), got \(4,\)"),
        ({"weight": torch.ones(3, dtype=torch.int64)}, TypeError, "floating point, got .*int64"),
        ({"weight": torch.ones(3, device="meta")}, ValueError, "weight is on meta"),
        ({"backend": "fast"}, ValueError, "backend must be one of .*got 'fast'"),
    ],
)
def test_cross_entropy_rejects_bad_options(options, error, text):
    with pytest.raises(error, match=text):
        upsample_cross_entropy(GOOD, LABELS, **options)


@pytest.mark.parametrize(
    "function",
    [
        lambda **options: upsample_argmax(GOOD, (8, 8), **options),
        lambda **options: upsample_logits(GOOD, (8, 8), **options),
        lambda **options: upsample_probabilities(GOOD, (8, 8), **options),
        lambda **options: upsample_cross_entropy(GOOD, LABELS, **options),
        lambda **options: upsample_confusion(GOOD, LABELS, **options),
    ],
)
def test_refuses_a_backend_without_kernels(function):
    with pytest.raises(BackendError, match="triton"):
        function(backend="triton")


# ------------------------------------------------------------------------------------- properties
def test_probabilities_sum_to_one():
    p = upsample_probabilities(noise((2, 150, 3, 4)), (37, 41))
    assert torch.allclose(p.sum(dim=1), torch.ones(2, 37, 41), atol=1e-6)
    assert p.min() >= 0


def test_top1_strips_cover_every_row(monkeypatch):
    logits = noise((2, 6, 5, 4))
    expected = upsample_probabilities(logits, (61, 43), (2, 3, 57, 39)).amax(dim=1)
    for strip_elements in (1, 6 * 43 * 2 * 10, 1 << 30):
        monkeypatch.setattr(
            "segmenter_fast.ops.upsample_probabilities.STRIP_ELEMENTS", strip_elements
        )
        top1 = upsample_probabilities(logits, (61, 43), (2, 3, 57, 39), top1=True)
        assert torch.allclose(top1, expected, atol=1e-6)


def test_cross_entropy_ignores_a_shift_common_to_all_classes():
    logits, target = noise((1, 9, 3, 4)), random_target((1, 29, 31), 9)
    shift = 5 * torch.randn(1, 1, 3, 4, generator=torch.Generator().manual_seed(2))
    loss = upsample_cross_entropy(logits, target)
    assert torch.allclose(upsample_cross_entropy(logits + shift, target), loss, rtol=1e-5)


def test_cross_entropy_gradient_sums_to_zero_over_classes():
    logits = noise((2, 9, 3, 4)).requires_grad_()
    target = random_target((2, 29, 31), 9)
    upsample_cross_entropy(logits, target, label_smoothing=0.2).backward()
    assert logits.grad.abs().max() > 1e-3
    assert logits.grad.sum(dim=1).abs().max() < 1e-6


def test_confusion_counts_every_valid_pixel_once():
    logits, target = noise((2, 9, 3, 4)), random_target((2, 29, 31), 9, torch.uint8)
    labels = upsample_argmax(logits, (29, 31))
    expected = torch.zeros(9, 9, dtype=torch.int64)
    for truth, label in zip(target.flatten().tolist(), labels.flatten().tolist(), strict=True):
        if truth != 255:
            expected[truth, label] += 1
    for backend in ("reference", "native"):
        counts = upsample_confusion(logits, target, backend=backend)
        assert counts.dtype == torch.int64
        assert torch.equal(counts, expected)
    assert counts.sum() == (target != 255).sum()


def test_confusion_of_a_crop():
    logits, target = noise((1, 4, 3, 4)), random_target((1, 10, 11), 4)
    counts = upsample_confusion(logits, target, (24, 32), (3, 5, 10, 11))
    labels = upsample_argmax(logits, (24, 32), (3, 5, 10, 11))
    for c in range(4):
        assert counts[c].sum() == (target == c).sum()
        assert counts[:, c].sum() == ((labels == c) & (target != 255)).sum()


def test_everything_ignored():
    logits = noise((1, 3, 2, 2)).requires_grad_()
    target = torch.full((1, 8, 8), 255)
    assert upsample_cross_entropy(logits, target).isnan()
    assert upsample_cross_entropy(logits, target, reduction="sum") == 0
    assert upsample_cross_entropy(logits, target, reduction="none").eq(0).all()
    assert upsample_confusion(logits, target).sum() == 0


def test_ignore_index_may_be_a_class():
    logits, target = noise((1, 3, 2, 2)), random_target((1, 8, 8), 3) % 3
    loss = upsample_cross_entropy(logits, target, ignore_index=0)
    assert torch.allclose(
        loss, F.cross_entropy(plain_logits(logits, (8, 8)), target, ignore_index=0)
    )
    assert upsample_confusion(logits, target, ignore_index=0)[0].sum() == 0


def test_first_class_wins_ties():
    logits = torch.zeros(1, 40, 3, 4)
    logits[:, 17:23] = 1.0
    logits[:, 31:] = 1.0
    assert native_labels(logits, (31, 37)).eq(17).all()
    assert native_labels(torch.full((1, 40, 3, 4), -2.5), (31, 37)).eq(0).all()
    assert upsample_argmax(logits, (31, 37), backend="reference").eq(17).all()


@pytest.mark.parametrize("n_cls", [3, 150])
def test_nan_counts_as_largest(n_cls):
    logits = noise((1, n_cls, 5, 6))
    logits[0, n_cls // 2, 1, 2] = math.nan
    logits[0, 1, 2, 2] = math.nan
    logits[0, n_cls - 1, 4, 5] = math.nan
    labels = native_labels(logits, (20, 24))
    assert_labels(labels, logits, (20, 24))
    assert torch.equal(labels, upsample_argmax(logits, (20, 24), backend="reference"))
    assert labels[0, -1, -1] == n_cls - 1


def test_labels_carry_no_gradient():
    labels = upsample_argmax(noise((1, 3, 2, 2)).requires_grad_(), (8, 8))
    assert not labels.requires_grad


def test_labels_do_not_depend_on_threads():
    logits = noise((3, 50, 7, 9))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(native_labels(logits, (111, 93)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# ------------------------------------------------------------------------------------- the oracles
def test_oracle_catches_a_dropped_tail():
    """A wrong operation fails, be it wrong in the last row, the last class or one gradient."""

    def reference(x: Tensor, y: Tensor) -> Tensor:
        return x * y

    def last_row_dropped(x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([(x * y)[:-1], torch.zeros_like(x[-1:])])

    def gradient_of_y_dropped(x: Tensor, y: Tensor) -> Tensor:
        return x * y.detach() + 0 * y

    def small_bias(x: Tensor, y: Tensor) -> Tensor:
        return x * y + 1e-5

    def make_inputs(dtype: torch.dtype) -> dict[str, Tensor]:
        return {"x": noise((13, 17), dtype), "y": noise((13, 17), dtype, seed=3)}

    assert_matches(reference, reference, make_inputs, torch.float32)
    for wrong, text in (
        (last_row_dropped, "output 0: maximum error"),
        (gradient_of_y_dropped, "gradient of y: maximum error"),
        (small_bias, "output 0: "),
        (lambda x, y: (x * y).double(), "float64 != torch.float32"),
        (lambda x, y: (x * y).masked_fill(x == x[0, 0], math.nan), "NaN or infinity"),
    ):
        with pytest.raises(AssertionError, match=text):
            assert_matches(wrong, reference, make_inputs, torch.float32)


def test_label_oracle_catches_a_wrong_pixel():
    logits = noise((2, 9, 3, 4))
    labels = upsample_argmax(logits, (29, 31), (1, 2, 25, 28), backend="reference")
    assert_labels(labels, logits, (29, 31), (1, 2, 25, 28))
    labels[1, -1, -1] = (labels[1, -1, -1] + 1) % 9
    with pytest.raises(AssertionError, match=r"1 wrong labels in image 1; first at \(24, 27\)"):
        assert_labels(labels, logits, (29, 31), (1, 2, 25, 28))
    with pytest.raises(AssertionError, match="wrong labels"):
        shifted = upsample_argmax(logits, (29, 31), (1, 3, 25, 28), backend="reference")
        assert_labels(shifted, logits, (29, 31), (1, 2, 25, 28))
