"""Cross-entropy of upsampled patch logits: the kernel itself against PyTorch, loss and gradient."""

import platform

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checks import assert_close, assert_matches
from dense_cases import (
    GOOD,
    HALF,
    LABELS,
    STRIDED_LAYOUTS,
    bad_target,
    noise,
    plain_logits,
    random_target,
    shapes,
    strided_as,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segmenter_fast import _C
from segmenter_fast.backend import BackendError
from segmenter_fast.ops.upsample_cross_entropy import upsample_cross_entropy

GUARD = 64
SIMD_LEVELS = _C.build_info()["simd_levels"]
# PyTorch's kernels for plain x86-64 compute the source index with two roundings instead of one.
FUSED = platform.machine() not in {"x86_64", "AMD64"} or (
    torch.backends.cpu.get_cpu_capability() in {"AVX2", "AVX512"}
)


def native(
    logits: Tensor,
    target: Tensor,
    size: tuple[int, int] | None = None,
    crop: tuple[int, int, int, int] | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = 255,
    reduction: str = "mean",
) -> Tensor:
    """The registered operator itself, so that nothing can stand in for the kernel."""
    size = size or tuple(target.shape[1:])
    crop = crop or (0, 0, *size)
    weight = None if weight is None else weight.to(logits.dtype)
    options = (label_smoothing, ignore_index, reduction, logits.requires_grad)
    return torch.ops.segmenter_fast.upsample_cross_entropy(
        logits, target, weight, size, crop, *options
    )[0]


def plain(
    logits: Tensor,
    target: Tensor,
    size: tuple[int, int] | None = None,
    crop: tuple[int, int, int, int] | None = None,
    weight: Tensor | None = None,
    ignore_index: int = 255,
    **options,
) -> Tensor:
    """The definition, written apart from the library."""
    full = plain_logits(logits, size or tuple(target.shape[1:]), crop)
    weight = None if weight is None else weight.to(full.dtype)
    return F.cross_entropy(full, target.long(), weight, ignore_index=ignore_index, **options)


def assert_within_rounding(name: str, ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """The oracle, or a bound of many roundings where it would be one of none.

    That is in float64, where `exact` is no better than `ours`, and where `exact` is 0 for all that
    the terms of a loss or a gradient, which are about 1, can tell.
    """
    if ours.dtype == torch.float32 and (exact.abs() > 1e-20).any():
        assert_close(name, ours, theirs, exact)
    else:
        scale = exact.abs().max().clamp(min=1).item() if exact.numel() else 1.0
        torch.testing.assert_close(
            ours, exact.to(ours.dtype), rtol=0, atol=200 * torch.finfo(ours.dtype).eps * scale
        )


def loss_and_gradient(function, logits: Tensor, upstream: Tensor | None = None) -> tuple:
    leaf = logits.detach().requires_grad_()
    loss = function(leaf)
    if upstream is None:
        upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(0))
    return loss.detach(), *torch.autograd.grad(loss, leaf, upstream.to(loss.dtype))


def hold_to_oracle(logits: Tensor, target: Tensor, *geometry, **options) -> None:
    """Loss and gradient of the operator within rounding of float64."""
    ours = loss_and_gradient(lambda x: native(x, target, *geometry, **options), logits)
    theirs, exact = (
        loss_and_gradient(lambda x: plain(x, target, *geometry, **options), logits.to(dtype))
        for dtype in (logits.dtype, torch.float64)
    )
    for name, *results in zip(("loss", "gradient"), ours, theirs, exact, strict=True):
        assert_within_rounding(name, *results)


def hold_to_torch(logits: Tensor, target: Tensor, *geometry, **options) -> None:
    """Loss and gradient are NaN or infinite where PyTorch's are, and close elsewhere."""
    results = []
    for function in (native, plain):
        leaf = logits.clone().requires_grad_()
        loss = function(leaf, target, *geometry, **options)
        results += [loss.detach(), *torch.autograd.grad(loss.sum(), leaf)]
    for ours, theirs in ((results[0], results[2]), (results[1], results[3])):
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-4, atol=1e-4)


def run_kernel(
    logits: Tensor,
    target: Tensor,
    size: tuple[int, int],
    crop: tuple[int, int, int, int] | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = 255,
    mean: bool = False,
    upstream: Tensor | None = None,
    threads: int = 1,
) -> tuple[float, np.ndarray, np.ndarray]:
    """(loss, losses, gradient) from one call, with guard words around what is written."""
    dtype = str(logits.dtype).removeprefix("torch.")
    outputs = []
    for count in (target.numel(), logits.numel()):
        memory = np.full(count + 2 * GUARD, 77, dtype=dtype)
        memory[GUARD : GUARD + count] = np.nan  # whatever is not written shows
        outputs.append(memory)
    losses, gradient = outputs
    upsampling = _C.Upsampling(
        logits.data_ptr(),
        dtype,
        logits.shape,
        logits.stride(),
        size,
        crop or (0, 0, *size),
        threads,
    )
    _, K, h, w = logits.shape
    loss, wrong_labels = _C.upsample_cross_entropy(
        upsampling,
        target.data_ptr(),
        str(target.dtype).removeprefix("torch."),
        weight_ptr=0 if weight is None else weight.data_ptr(),
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        mean=mean,
        upstream_ptr=0 if upstream is None else upstream.data_ptr(),
        losses_ptr=losses[GUARD:].ctypes.data,
        gradient_ptr=gradient[GUARD:].ctypes.data,
        gradient_strides=(K * h * w, h * w, w, 1),
    )
    assert wrong_labels == 0
    for memory in outputs:
        assert (memory[:GUARD] == 77).all() and (memory[-GUARD:] == 77).all(), "stray write"
    return (
        loss,
        losses[GUARD:-GUARD].reshape(target.shape),
        gradient[GUARD:-GUARD].reshape(logits.shape),
    )


def smooth(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(*shape[:2], 2, 2, generator=generator)
    return F.interpolate(coarse, shape[2:], mode="bicubic", align_corners=False)


# ------------------------------------------------------------------------------------- oracle
@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_matches_reference(case, dtype, reduction):
    shape, size, crop = case
    target = random_target((shape[0], *(crop[2:] if crop else size)), shape[1])
    target[:, 0, 0] = shape[1] - 1  # never all ignored
    hold_to_oracle(noise(shape, dtype), target, size, crop, reduction=reduction)


@pytest.mark.parametrize("scale", [1e-3, 1, 5, 30])
@pytest.mark.parametrize("kind", ["noise", "smooth"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [(48, 64), (37, 101), (96, 8)], ids=str)
def test_scales(scale, kind, dtype, size):
    shape = (2, 37, 3, 4)
    logits = noise(shape) if kind == "noise" else smooth(shape)
    hold_to_oracle((logits * scale).to(dtype), random_target((2, *size), 37), size)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_options(reduction, label_smoothing, weighted, dtype):
    weight = torch.linspace(0.0, 2.0, 7, dtype=torch.float64) if weighted else None
    options = {"label_smoothing": label_smoothing, "reduction": reduction, "weight": weight}
    target = random_target((2, 23, 29), 7, dtype)
    target[:, :9, :20] = 3  # stretches of one label beside single pixels
    hold_to_oracle(noise((2, 7, 3, 4)), target, **options)
    hold_to_oracle(noise((2, 7, 3, 4)) * 60, target, **options)


@pytest.mark.parametrize("level", SIMD_LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_simd_level(level, dtype, monkeypatch):
    monkeypatch.setenv("SEGMENTER_FAST_SIMD", level)
    try:
        assert _C.simd_level() == level
    except RuntimeError as error:
        pytest.skip(str(error))
    options = {"weight": torch.linspace(0.5, 1, 37), "label_smoothing": 0.1, "reduction": "none"}
    # Cells of 1 to 18 columns: every number of pixels that a kernel takes.
    for width in range(3, 55, 3):
        target = random_target((1, 14, width), 37)
        hold_to_oracle(noise((1, 37, 2, 3), dtype) * 3, target)
        hold_to_oracle(noise((1, 37, 2, 3), dtype) * 3, target, **options)
    broken = noise((1, 37, 2, 3), dtype) * 50
    broken[0, 5, 1, 2] = float("nan")
    hold_to_torch(broken, random_target((1, 14, 24), 37), reduction="none")


@pytest.mark.parametrize("n_cls", [1, 2, 15, 16, 17, 33, 4097])
def test_any_number_of_classes(n_cls):
    logits = noise((1, n_cls, 2, 3))
    target = random_target((1, 11, 19), n_cls, torch.int32).masked_fill_(
        torch.rand(1, 11, 19) < 0.2, n_cls - 1
    )
    hold_to_oracle(logits, target, weight=torch.linspace(1, 2, n_cls), label_smoothing=0.1)


def test_65535_classes():
    logits = torch.zeros(1, 65535, 1, 1)
    logits[0, -1] = 3.0
    hold_to_oracle(logits, torch.full((1, 1, 2), 65534))
    with pytest.raises(ValueError, match=r"at most 65,?535 classes, got 65536"):
        native(torch.zeros(1, 65536, 1, 1), torch.zeros(1, 1, 2, dtype=torch.int64))


# ------------------------------------------------------------------------------------- spreads
@pytest.mark.parametrize("spread", [20, 60, 82, 84, 90, 110, 112, 120, 650, 700, 900, 1e4, 1e30])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_neighbours_sure_of_different_classes(spread, reduction, dtype):
    logits = noise((1, 5, 3, 4), dtype)
    for i in range(12):
        logits[0, i % 5, i // 4, i % 4] += spread
    for size in ((24, 32), (31, 45), (7, 8), (2, 9), (2, 3)):  # up to kMaxStep, and beyond
        target = random_target((1, *size), 5)
        options = {"label_smoothing": 0.1, "reduction": reduction}
        hold_to_oracle(logits, target)
        hold_to_oracle(logits, target, weight=torch.linspace(1, 2, 5), **options)


@pytest.mark.parametrize("spread", [80, 95, 100, 105, 110, 115])
@pytest.mark.parametrize("n_cls", [2, 4])
@pytest.mark.parametrize("width", [5, 6, 7, 8, 9, 10, 11, 12, 64])
def test_ratios_stay_numbers(spread, n_cls, width):
    logits = torch.zeros(1, n_cls, 4, 4)
    for i in range(16):
        logits[0, (i % 2 + 2 * (i // 4)) % n_cls, i // 4, i % 4] = spread
    hold_to_torch(logits, random_target((1, 9, width), n_cls), reduction="none")


@pytest.mark.parametrize("low", [-60, -80, -84, -110, -112, -120, -1e4, -1e37])
def test_classes_of_no_importance(low):
    logits = noise((1, 21, 3, 4))
    logits[:, 3:9] += low  # everywhere
    logits[0, 12, 1, 1] += low  # in one patch
    for size in ((24, 32), (5, 9)):
        hold_to_oracle(logits, random_target((1, *size), 21), reduction="none")


@pytest.mark.parametrize("factor", [1e-30, 1e5, 1e12, 1e30])
def test_large_upstream_and_weights(factor):
    logits = noise((1, 6, 3, 4))
    for i in range(12):
        logits[0, i % 5, i // 4, i % 4] += 60
    target = random_target((1, 24, 32), 6)
    upstream = torch.full((1, 24, 32), factor)
    upstream[0, ::2] /= 3

    def gradient(function, dtype):
        leaf = logits.to(dtype).requires_grad_()
        loss = function(leaf, target, reduction="none")
        return torch.autograd.grad(loss, leaf, upstream.to(dtype))[0]

    exact = gradient(plain, torch.float64)
    assert_close("gradient", gradient(native, torch.float32), gradient(plain, torch.float32), exact)
    hold_to_oracle(logits, target, reduction="sum", weight=torch.full((6,), factor))


# ------------------------------------------------------------------------------------- not finite
@pytest.mark.skipif(not FUSED, reason="PyTorch rounds the source index differently on this CPU")
@pytest.mark.parametrize("values", [["nan"], ["inf"], ["-inf"], ["nan", "inf", "-inf"]], ids=str)
@pytest.mark.parametrize("size", [(32, 48), (9, 12), (3, 4), (2, 3), (27, 31)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_non_finite_logits_as_torch(values, size, dtype):
    for seed, share in ((0, 0.02), (1, 0.3)):
        logits = noise((2, 7, 3, 4), dtype)
        generator = torch.Generator().manual_seed(seed)
        for value in values:
            logits[torch.rand(logits.shape, generator=generator) < share] = float(value)
        target = random_target((2, *size), 7)
        for options in (
            {"reduction": "mean"},
            {"reduction": "none"},
            {"reduction": "none", "label_smoothing": 0.1},
            {"reduction": "sum", "weight": torch.linspace(1, 2, 7)},
        ):
            hold_to_torch(logits, target, **options)


def test_nan_stays_in_its_cells():
    logits = noise((1, 5, 4, 6)).requires_grad_()
    with torch.no_grad():
        logits[0, 2, 1, 4] = float("nan")
    target = random_target((1, 32, 48), 5)
    loss = native(logits, target, reduction="none")
    expected = torch.zeros(1, 32, 48, dtype=torch.bool)
    expected[:, :20, 28:44] = True  # rows 0 to 3 read it too, with weight 0
    assert torch.equal(loss.isnan(), expected & (target != 255))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    touched = torch.zeros(1, 5, 4, 6, dtype=torch.bool)
    touched[:, :, 0:3, 3:6] = True
    assert torch.equal(gradient.isnan(), touched)


def test_non_finite_upstream_and_weights_as_torch():
    logits, target = noise((1, 5, 3, 4)), random_target((1, 24, 32), 5)
    for value in (float("nan"), float("inf")):
        upstream = torch.ones(1, 24, 32)
        upstream[0, 9, 9] = value
        gradients = []
        for function in (native, plain):
            leaf = logits.clone().requires_grad_()
            loss = function(leaf, target, reduction="none")
            gradients += torch.autograd.grad(loss, leaf, upstream)
        torch.testing.assert_close(*gradients, equal_nan=True)
        weight = torch.ones(5)
        weight[2] = value
        ours, theirs = (f(logits, target, weight=weight, reduction="none") for f in (native, plain))
        torch.testing.assert_close(ours, theirs, equal_nan=True)


# ------------------------------------------------------------------------------------- nothing
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_all_ignored(label_smoothing):
    target = torch.full((2, 24, 32), 255, dtype=torch.uint8)
    for reduction, expected in (("mean", float("nan")), ("sum", 0.0), ("none", 0.0)):
        hold_to_torch(
            noise((2, 5, 3, 4)), target, reduction=reduction, label_smoothing=label_smoothing
        )
        loss = native(noise((2, 5, 3, 4)), target, reduction=reduction)
        torch.testing.assert_close(loss, torch.full_like(loss, expected), equal_nan=True)


def test_weights_that_sum_to_zero():
    target = torch.zeros(1, 24, 32, dtype=torch.uint8)
    weight = torch.tensor([0.0, 1.0, 1.0])
    hold_to_torch(noise((1, 3, 3, 4)), target, weight=weight)
    hold_to_torch(noise((1, 3, 3, 4)), target, weight=weight, reduction="sum")


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_empty(backend):
    logits = torch.empty(0, 5, 3, 4, requires_grad=True)
    target = torch.empty(0, 8, 9, dtype=torch.int64)
    assert upsample_cross_entropy(logits, target, backend=backend).isnan()
    total = upsample_cross_entropy(logits, target, reduction="sum", backend=backend)
    assert total == 0
    assert torch.autograd.grad(total, logits)[0].shape == logits.shape
    losses = upsample_cross_entropy(logits, target, reduction="none", backend=backend)
    assert losses.shape == (0, 8, 9)
    assert torch.autograd.grad(losses.sum(), logits)[0].shape == logits.shape


# ------------------------------------------------------------------------------------- labels
def test_ignore_index_may_be_a_class():
    target = random_target((2, 23, 29), 7) % 7
    for ignore_index in (0, 3, 6, -100, 7):
        hold_to_oracle(noise((2, 7, 3, 4)), target, ignore_index=ignore_index)
    hold_to_oracle(noise((2, 7, 3, 4)), target.where(target > 2, -1), ignore_index=-1)


@pytest.mark.parametrize(
    ("dtype", "label"),
    [
        (torch.uint8, 7),
        (torch.uint8, 254),
        (torch.int16, -1),
        (torch.int16, 32767),
        (torch.int32, -(2**31)),
        (torch.int64, 2**63 - 1),
        (torch.int64, -(2**63)),
    ],
    ids=str,
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_wrong_labels_index_nothing(dtype, label, reduction):
    for scale in (1, 100):  # both ways through a cell
        target = random_target((1, 24, 32), 7, dtype)
        target[0, 5, 5:8] = label
        logits = (noise((1, 7, 3, 4)) * scale).requires_grad_()
        with pytest.raises(ValueError, match=rf"3 pixels .*outside \[0, 7\).*: {label}\."):
            native(logits, target, reduction=reduction)


# ------------------------------------------------------------------------------------- properties
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_constant_shift_changes_nothing(reduction):
    logits, target = noise((2, 11, 4, 5)), random_target((2, 50, 61), 11)
    for options in ({}, {"label_smoothing": 0.2, "weight": torch.linspace(1, 2, 11)}):
        results = []
        for shift in (0.0, 64.0):
            leaf = (logits + shift).requires_grad_()
            loss = native(leaf, target, reduction=reduction, **options)
            results += [loss.detach(), *torch.autograd.grad(loss.sum(), leaf)]
        torch.testing.assert_close(results[0], results[2], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(results[1], results[3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("scale", [1, 100])
def test_gradients_sum_to_zero_over_the_classes(label_smoothing, scale):
    logits = (noise((2, 37, 4, 5), torch.float64) * scale).requires_grad_()
    loss = native(
        logits,
        random_target((2, 50, 61), 37),
        label_smoothing=label_smoothing,
        weight=torch.linspace(0, 1, 37),
        reduction="sum",
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.sum(dim=1).abs().max() <= 1e-13 * gradient.abs().max() * 37


def test_losses_are_never_negative():
    logits = torch.zeros(1, 9, 3, 4)
    logits[:, 4] = torch.tensor([3.0, 9.0, 16.0, 30.0])
    target = torch.full((1, 48, 65), 4)
    losses = native(logits, target, reduction="none")
    assert losses.min() >= 0
    assert_close(
        "losses",
        losses,
        plain(logits, target, reduction="none"),
        plain(logits.double(), target, reduction="none"),
    )


def test_reductions_agree():
    logits, target = noise((2, 7, 3, 4)), random_target((2, 23, 29), 7)
    weight = torch.linspace(1, 2, 7)
    none, total, mean = (
        native(logits, target, weight=weight, reduction=name) for name in ("none", "sum", "mean")
    )
    assert torch.equal(none[target == 255], torch.zeros(int((target == 255).sum())))
    torch.testing.assert_close(none.sum(), total)
    valid = target[target != 255]
    torch.testing.assert_close(total / weight[valid].sum(), mean)


def test_a_crop_is_a_part_of_the_whole():
    logits, target = noise((2, 11, 6, 8)), random_target((2, 90, 130), 11)
    whole = native(logits, target, reduction="none")
    for top, left, height, width in ((3, 5, 40, 41), (89, 129, 1, 1), (17, 0, 1, 130)):
        part = target[:, top : top + height, left : left + width].contiguous()
        crop = (top, left, height, width)
        losses = native(logits, part, (90, 130), crop, reduction="none")
        torch.testing.assert_close(
            losses, whole[:, top : top + height, left : left + width], rtol=1e-5, atol=1e-5
        )


def test_patches_out_of_reach_have_no_gradient():
    logits = noise((1, 5, 6, 7)).requires_grad_()
    loss = native(logits, torch.zeros(1, 8, 8, dtype=torch.uint8), (48, 56), (16, 16, 8, 8))
    (gradient,) = torch.autograd.grad(loss, logits)
    reached = torch.zeros(6, 7, dtype=torch.bool)
    reached[1:4, 1:4] = True
    assert torch.equal(gradient[0].abs().sum(dim=0) > 0, reached)


# ------------------------------------------------------------------------------------- determinism
@pytest.mark.parametrize("spread", [1, 100])
def test_threads_do_not_change_a_bit(spread):
    options = {"label_smoothing": 0.1, "mean": True}
    for shape, size in (
        ((2, 30, 8, 8), (128, 100)),
        ((1, 19, 1, 1), (200, 20)),
        ((3, 7, 9, 4), (4, 3)),
    ):
        logits = noise(shape) * spread
        target = random_target((shape[0], *size), shape[1])
        upstream = torch.rand(target.shape)
        for extra in ({}, {"upstream": upstream}):
            alone = run_kernel(logits, target, size, **options, **extra)
            for threads in (2, 3, 7):
                again = run_kernel(logits, target, size, threads=threads, **options, **extra)
                for ours, theirs in zip(alone, again, strict=True):
                    np.testing.assert_array_equal(ours, theirs)


def test_torch_threads_do_not_change_a_bit():
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            logits = noise((2, 19, 6, 5)).requires_grad_()
            loss = native(logits, random_target((2, 96, 80), 19))
            results.append((loss, *torch.autograd.grad(loss, logits)))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


# ------------------------------------------------------------------------------------- any input
def hold_drawn_case_to_oracle(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    B, K, h, w = draw(1, 2), draw(1, 40), draw(1, 7), draw(1, 7)
    H, W = draw(1, 60), draw(1, 60)
    top, left = draw(0, H - 1), draw(0, W - 1)
    crop = (top, left, draw(1, H - top), draw(1, W - left))
    generator = torch.Generator().manual_seed(draw(0, 10**6))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    logits = torch.randn(B, K, h, w, generator=generator, dtype=torch.float64)
    logits = (logits * data.draw(st.sampled_from([1e-3, 1, 5, 30, 200]))).to(dtype)
    logits += draw(-50, 50)
    layout = data.draw(st.sampled_from(["dense", *STRIDED_LAYOUTS]))
    shown = logits if layout == "dense" else strided_as(layout, logits)
    logits = shown.contiguous()
    target_dtype = data.draw(st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64]))
    target = torch.randint(0, K, (B, *crop[2:]), generator=generator)
    if data.draw(st.booleans()):  # as in pictures
        target = target[:, :1, :1].expand(-1, *crop[2:]).clone()
    target[torch.rand(target.shape, generator=generator) < 0.1] = 255
    target = target.to(target_dtype)
    weight = torch.rand(K, generator=generator).to(dtype) if data.draw(st.booleans()) else None
    upstream = torch.randn(target.shape, generator=generator).to(dtype)
    smoothing = data.draw(st.sampled_from([0.0, 0.1, 1.0]))

    def expected(to: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = logits.to(to).requires_grad_()
        losses = plain(
            leaf, target, (H, W), crop, weight, label_smoothing=smoothing, reduction="none"
        )
        return losses.detach(), *torch.autograd.grad(losses, leaf, upstream.to(to))

    _, losses, gradient = run_kernel(
        shown, target, (H, W), crop, weight, smoothing, upstream=upstream, threads=draw(1, 3)
    )
    # One pixel's error in PyTorch may be small by chance. Beside the oracle, allow what is not: the
    # rounding of the terms of a loss or gradient, and that of the logits they are computed from.
    largest = 1.0 if weight is None else weight.max().item()
    rounding = (4 + (logits.max() - logits.min()).item()) * torch.finfo(dtype).eps * largest
    allowed = {"losses": rounding, "gradient": rounding * upstream.abs().max().item()}
    ours = (torch.from_numpy(losses), torch.from_numpy(gradient))
    for name, own, theirs, exact in zip(
        allowed, ours, expected(dtype), expected(torch.float64), strict=True
    ):
        if (own - exact).abs().max() > allowed[name]:
            assert_within_rounding(name, own, theirs, exact)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_input(data):
    hold_drawn_case_to_oracle(data)


@pytest.mark.nightly
@settings(max_examples=2000, deadline=None, database=None)
@given(data=st.data())
def test_any_input_at_length(data):
    hold_drawn_case_to_oracle(data)


# ------------------------------------------------------------------------------------- machinery
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("scale", [1, 400])  # 400: pixel by pixel
def test_gradcheck(reduction, scale):
    logits = (noise((1, 3, 2, 3), torch.float64) * scale).requires_grad_()
    target = torch.randint(0, 3, (1, 4, 5), generator=torch.Generator().manual_seed(0))
    target[0, 0, 0] = 255
    weight = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    for options in ({}, {"weight": weight, "label_smoothing": 0.1}):
        for geometry in ((), ((6, 5), (1, 0, 4, 5))):
            assert torch.autograd.gradcheck(
                lambda x, geometry=geometry, options=options: native(
                    x, target, *geometry, reduction=reduction, **options
                ),
                (logits,),
            )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_refuses_a_second_derivative(reduction):
    logits = noise((1, 3, 2, 3)).requires_grad_()
    loss = native(logits, random_target((1, 4, 5), 3), reduction=reduction).sum()
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("layout", ["dense", "class last", "every second"])
def test_opcheck(reduction, layout):
    dense = noise((2, 5, 3, 4))
    logits = (dense if layout == "dense" else strided_as(layout, dense)).requires_grad_()
    target = random_target((2, 5, 7), 5, torch.uint8)
    options = (target, torch.rand(5), [13, 17], [1, 2, 5, 7], 0.1, 255, reduction)
    op = torch.ops.segmenter_fast.upsample_cross_entropy.default
    torch.library.opcheck(op, (logits, *options, True))
    torch.library.opcheck(op, (logits.detach(), *options, False))
    upstream = torch.rand(2, 5, 7) if reduction == "none" else torch.rand(())
    stored = torch.empty(0) if reduction == "none" else torch.empty_like(logits).normal_()
    torch.library.opcheck(
        torch.ops.segmenter_fast.upsample_cross_entropy_backward.default,
        (upstream, stored, logits.detach(), *options),
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_fullgraph(reduction):
    target = random_target((2, 13, 17), 5)

    def function(logits: Tensor) -> Tensor:
        loss = upsample_cross_entropy(
            logits * 2, target, label_smoothing=0.1, reduction=reduction, backend="native"
        )
        return (loss * loss).sum()

    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        logits = noise((2, 5, 3, 4)).requires_grad_()
        loss = call(logits)
        results += [loss.detach(), *torch.autograd.grad(loss, logits)]
        with torch.no_grad():
            torch.testing.assert_close(call(logits), loss)
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


def test_compiled_graphs_check_labels():
    function = torch.compile(upsample_cross_entropy, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"outside \[0, 3\)"):
        function(GOOD, LABELS + 3)


def test_export():
    class Loss(torch.nn.Module):
        def forward(self, logits: Tensor, target: Tensor) -> Tensor:
            return upsample_cross_entropy(logits, target)

    logits, target = noise((2, 5, 3, 4)), random_target((2, 13, 17), 5)
    program = torch.export.export(Loss(), (logits, target))
    assert "segmenter_fast.upsample_cross_entropy" in program.graph_module.code
    assert torch.equal(program.module()(logits, target), native(logits, target))


@pytest.mark.parametrize("layout", STRIDED_LAYOUTS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_strided_inputs(layout, reduction):
    strided = strided_as(layout, noise((2, 11, 5, 6)))
    assert not strided.is_contiguous()
    target = random_target((2, 31, 37), 11)
    results = []
    for logits, labels in (
        (strided, target),
        (strided.contiguous(), target),
        (strided.contiguous(), target.mT.contiguous().mT),
    ):
        leaf = logits.detach().requires_grad_()
        loss = native(leaf, labels, reduction=reduction)
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaf)))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_logits(dtype):
    target = random_target((2, 23, 29), 7)
    assert_matches(
        lambda logits: upsample_cross_entropy(logits, target, backend="native"),
        lambda logits: plain(logits, target),
        lambda dtype: {"logits": noise((2, 7, 3, 4), dtype)},
        dtype,
    )
    with pytest.raises(TypeError, match=r"float32 or float64, got torch.*float16"):
        native(noise((2, 7, 3, 4), dtype), target)


def test_autocast_computes_in_float32():
    logits, target = noise((2, 7, 3, 4)), random_target((2, 23, 29), 7)
    with torch.autocast("cpu", torch.bfloat16):
        for function in (upsample_cross_entropy, native):
            loss = function(logits.bfloat16(), target)
            assert loss.dtype == torch.float32
            assert torch.equal(loss, native(logits.bfloat16().float(), target))


def test_public_function_is_the_operator():
    logits, target = noise((2, 7, 3, 4)), random_target((2, 23, 29), 7)
    options = {"weight": torch.rand(7), "label_smoothing": 0.1, "ignore_index": 3}
    target = target % 7
    for reduction in ("mean", "sum", "none"):
        result = upsample_cross_entropy(logits, target, reduction=reduction, **options)
        assert torch.equal(result, native(logits, target, reduction=reduction, **options))
        reference = upsample_cross_entropy(
            logits, target, reduction=reduction, backend="reference", **options
        )
        assert torch.equal(reference, plain(logits, target, reduction=reduction, **options))


# ------------------------------------------------------------------------------------- bad input
@bad_target
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_rejects_bad_target(target, options, error, text, backend):
    with pytest.raises(error, match=text):
        upsample_cross_entropy(GOOD, target, **options, backend=backend)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"reduction": "average"}, ValueError, "'mean', 'sum' or 'none', got 'average'"),
        ({"label_smoothing": 1.5}, ValueError, r"\[0, 1\], got 1.5"),
        ({"label_smoothing": float("nan")}, ValueError, r"\[0, 1\], got nan"),
        ({"weight": torch.ones(4)}, ValueError, r"\(3,\), got \(4,\)"),
        ({"weight": torch.ones(3, dtype=torch.int64)}, TypeError, "floating point, got .*int64"),
        ({"weight": torch.ones(3, device="meta")}, ValueError, "weight is on meta"),
        ({"weight": torch.ones(3, requires_grad=True)}, ValueError, "must not require a gradient"),
        ({"backend": "fast"}, ValueError, "backend must be one of .*got 'fast'"),
        ({"backend": "triton"}, BackendError, "triton"),
    ],
)
def test_rejects_bad_input(options, error, text):
    with pytest.raises(error, match=text):
        upsample_cross_entropy(GOOD, LABELS, **options)


def test_operator_rejects_a_gradient_it_was_not_asked_for():
    with pytest.raises(RuntimeError, match="with_gradient=True"):
        torch.ops.segmenter_fast.upsample_cross_entropy(
            GOOD.clone().requires_grad_(),
            LABELS,
            None,
            [8, 8],
            [0, 0, 8, 8],
            0.0,
            255,
            "mean",
            False,
        )


@pytest.mark.parametrize(
    ("target_ptr", "target_dtype", "text"),
    [(0, "uint8", "pointer to a target, got null"), (1, "float32", 'expected one of .*"float32"')],
)
def test_kernel_rejects_bad_input(target_ptr, target_dtype, text):
    upsampling = _C.Upsampling(
        GOOD.data_ptr(), "float32", GOOD.shape, GOOD.stride(), (8, 8), (0, 0, 8, 8), 1
    )
    with pytest.raises(ValueError, match=text):
        _C.upsample_cross_entropy(upsampling, target_ptr, target_dtype)
