"""The compiled upsample + argmax, called directly so that no other code can stand in for it.

Two oracles. A scan of all classes in NumPy with the kernel's own arithmetic: labels must be equal
bit for bit, ties included, which is what "the pruning is exact" means. And PyTorch: the chosen
class's exact logit must be within rounding of the largest, and where an interpolation touches a NaN
or an infinity the label must be PyTorch's.
"""

import math
import multiprocessing
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checks import assert_labels
from dense_cases import (
    GOOD,
    HALF,
    STRIDED_LAYOUTS,
    bad_geometry,
    noise,
    shapes,
    strided_as,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segmenter_fast import _C
from segmenter_fast.backend import BackendError
from segmenter_fast.ops.upsample_argmax import upsample_argmax

GUARD = 64
SIMD_LEVELS = _C.build_info()["simd_levels"]
# PyTorch's kernels for plain x86-64 compute the source index with two roundings instead of one.
FUSED = platform.machine() not in {"x86_64", "AMD64"} or (
    torch.backends.cpu.get_cpu_capability() in {"AVX2", "AVX512"}
)

# (h, w) -> (H, W): whole and odd ratios, the same size, smaller than the grid, single patches.
SIZES = [
    ((4, 4), (64, 64)),
    ((5, 7), (83, 41)),
    ((3, 9), (100, 31)),
    ((6, 6), (6, 6)),
    ((6, 5), (6, 50)),
    ((12, 10), (5, 4)),
    ((12, 3), (7, 60)),
    ((1, 1), (70, 45)),
    ((1, 6), (9, 96)),
    ((7, 1), (1, 1)),
]
UNEVEN = {((5, 7), (83, 41)), ((3, 9), (100, 31)), ((12, 10), (5, 4)), ((12, 3), (7, 60))}


def random_logits(B, K, h, w, dtype=torch.float32, seed=0):
    return torch.randn(B, K, h, w, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def class_last(logits):
    return logits.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def kernel_labels(logits, size, crop=None, threads=1, out_dtype=np.uint8):
    """Labels from the kernel, with a guard around the output to catch stray writes."""
    B = len(logits)
    top, left, height, width = crop or (0, 0, *size)
    n = B * height * width
    memory = np.full(n + 2 * GUARD, 77, dtype=out_dtype)
    out = memory[GUARD : GUARD + n]
    upsampling = _C.Upsampling(
        logits.data_ptr(),
        str(logits.dtype).removeprefix("torch."),
        logits.shape,
        logits.stride(),
        size,
        (top, left, height, width),
        threads,
    )
    _C.upsample_argmax(upsampling, out.ctypes.data, np.dtype(out_dtype).name)
    assert (memory[:GUARD] == 77).all() and (memory[GUARD + n :] == 77).all(), "stray write"
    return out.reshape(B, height, width).astype(np.int64)


def axis(in_size, out_size, dtype):
    i0, i1, w0, w1 = zip(*_C.source_indices(in_size, out_size, dtype.name), strict=True)
    return np.array(i0), np.array(i1), np.array(w0, dtype), np.array(w1, dtype)


def full_scan_labels(logits, size, crop=None):
    """Every class at every pixel, in the kernel's arithmetic; finite logits only."""
    x = logits.numpy()
    top, left, height, width = crop or (0, 0, *size)
    i0, i1, wy0, wy1 = (t[top : top + height] for t in axis(x.shape[2], size[0], x.dtype))
    j0, j1, wx0, wx1 = (t[left : left + width] for t in axis(x.shape[3], size[1], x.dtype))
    rows = x[:, :, i0] * wy0[:, None] + x[:, :, i1] * wy1[:, None]
    values = rows[..., j0] * wx0 + rows[..., j1] * wx1
    return values.argmax(1)


def torch_labels(logits, size):
    full = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    return full.argmax(1).numpy()


def assert_best_class(labels, logits, size):
    """The chosen class's logit, in float64, is within rounding of the largest."""
    exact = F.interpolate(logits.double(), size, mode="bilinear", align_corners=False)
    chosen = exact.gather(1, torch.from_numpy(labels)[:, None])[:, 0]
    largest = exact.amax(1)
    # The weights' error: an index of up to max(h, w) rounded in the logits' precision.
    ulp = torch.finfo(logits.dtype).eps * max(logits.shape[2:])
    assert (largest - chosen).max() <= 4 * ulp * logits.abs().max().double()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_source_indices_are_torchs(dtype):
    for in_size, out_size in [(1, 5), (2, 3), (7, 100), (32, 512), (40, 683), (9, 9), (50, 7)]:
        one_hot = torch.eye(in_size, dtype=getattr(torch, dtype))[:, None, :, None]
        expected = F.interpolate(one_hot, (out_size, 1), mode="bilinear", align_corners=False)[
            :, 0, :, 0
        ].T.numpy()
        i0, i1, w0, w1 = axis(in_size, out_size, np.dtype(dtype))
        weights = np.zeros_like(expected)
        np.add.at(weights, (np.arange(out_size), i0), w0)
        np.add.at(weights, (np.arange(out_size), i1), w1)
        tolerance = 0 if FUSED else 2 * in_size * np.finfo(dtype).eps
        np.testing.assert_allclose(weights, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("layout", ["class-first", "class-last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grid, size", SIZES)
def test_is_the_full_scan(grid, size, dtype, layout):
    for K in (1, 3, 16, 37):
        logits = random_logits(2, K, *grid, dtype=dtype, seed=K)
        labels = kernel_labels(class_last(logits) if layout == "class-last" else logits, size)
        np.testing.assert_array_equal(labels, full_scan_labels(logits, size))
        assert_best_class(labels, logits, size)


def test_150_classes():
    noise = random_logits(1, 150, 16, 16)
    smooth = F.interpolate(random_logits(1, 150, 4, 4), (16, 16), mode="bicubic")
    for logits in (noise, smooth):
        labels = kernel_labels(logits, (256, 256), threads=2)
        np.testing.assert_array_equal(labels, full_scan_labels(logits, (256, 256)))
        assert (labels != torch_labels(logits, (256, 256))).mean() < 1e-4


@pytest.mark.parametrize(
    "K, out_dtype", [(256, np.uint8), (300, np.int16), (32768, np.int16), (65535, np.int32)]
)
def test_many_classes(K, out_dtype):
    logits = random_logits(1, K, 2, 3)
    logits[:, K - 1, 1, 1] = 9.0  # the last class wins somewhere
    labels = kernel_labels(logits, (9, 20), out_dtype=out_dtype)
    np.testing.assert_array_equal(labels, full_scan_labels(logits, (9, 20)))
    assert labels.max() == K - 1


def label_drawn_case(data: st.DataObject) -> None:
    def draw(low, high):
        return data.draw(st.integers(low, high))

    B, K, h, w = draw(1, 3), draw(1, 40), draw(1, 9), draw(1, 9)
    H, W = draw(1, 60), draw(1, 60)
    top, left = draw(0, H - 1), draw(0, W - 1)
    crop = (top, left, draw(1, H - top), draw(1, W - left))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, *HALF]))
    logits = random_logits(B, K, h, w, seed=draw(0, 10**6)).to(dtype)
    # Few distinct values make ties; a large offset makes values that differ by an ulp or two.
    kind = data.draw(st.sampled_from(["noise", "ties", "offset", "tiny"]))
    if kind == "ties":
        logits = logits.round()
    elif kind == "offset":
        logits = logits * 4 * torch.finfo(dtype).eps + 1
    elif kind == "tiny":
        logits = logits * torch.finfo(dtype).tiny
    layout = data.draw(st.sampled_from(["dense", *STRIDED_LAYOUTS]))
    shown = logits if layout == "dense" else strided_as(layout, logits)
    exact = shown.contiguous() if dtype == torch.float64 else shown.float().contiguous()
    expected = full_scan_labels(exact, (H, W), crop)
    if dtype in HALF:
        labels = torch.ops.segmenter_fast.upsample_argmax(shown, (H, W), crop).numpy()
    else:
        labels = kernel_labels(shown, (H, W), crop, threads=draw(1, 3))
    np.testing.assert_array_equal(labels, expected)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_input(data):
    label_drawn_case(data)


@pytest.mark.nightly
@settings(max_examples=2000, deadline=None, database=None)
@given(data=st.data())
def test_any_input_at_length(data):
    label_drawn_case(data)


def test_crop_is_a_part_of_the_whole():
    logits = random_logits(2, 11, 6, 8)
    whole = kernel_labels(logits, (90, 130))
    for top, left, height, width in [
        (0, 0, 90, 130),
        (3, 5, 40, 41),
        (89, 129, 1, 1),
        (17, 0, 1, 130),
        (0, 64, 90, 2),
    ]:
        part = kernel_labels(logits, (90, 130), (top, left, height, width))
        np.testing.assert_array_equal(part, whole[:, top : top + height, left : left + width])


def test_strides():
    big = random_logits(4, 26, 12, 15)
    views = {
        "every other": big[::2, ::2, ::2, ::3],
        "transposed": big.transpose(2, 3),
        "part": big[1:3, 5:20, 3:7, 2:9],
        "same image and column twice": big[:1, :, :, :1].expand(2, -1, -1, 4),
    }
    for name, logits in views.items():
        np.testing.assert_array_equal(
            kernel_labels(logits, (70, 60)),
            full_scan_labels(logits.contiguous(), (70, 60)),
            err_msg=name,
        )


def test_ties_anywhere():
    logits = torch.zeros(1, 21, 4, 5)
    assert (kernel_labels(logits, (30, 40)) == 0).all()
    logits[:, 7:] = 1.0
    for size in [(30, 40), (4, 5), (3, 2)]:
        assert (kernel_labels(logits, size) == 7).all()
    logits[:, 3] = logits[:, 9] = random_logits(1, 1, 4, 5)[:, 0] + 10
    assert (kernel_labels(logits, (30, 40)) == 3).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grid, size", SIZES)
@pytest.mark.parametrize("values", [["nan"], ["inf"], ["-inf"], ["nan", "inf", "-inf"]])
def test_non_finite_logits_as_torch(grid, size, values, dtype):
    if (grid, size) in UNEVEN and not FUSED:
        pytest.skip("PyTorch's kernels for this CPU round the source index differently")
    for K, share in [(1, 0.3), (19, 0.02), (19, 0.5)]:
        generator = torch.Generator().manual_seed(K)
        logits = random_logits(2, K, *grid, dtype=dtype)
        for value in values:
            hit = torch.rand(logits.shape, generator=generator) < share
            logits[hit] = float(value)
        np.testing.assert_array_equal(kernel_labels(logits, size), torch_labels(logits, size))


@pytest.mark.parametrize("value, label", [("nan", 0), ("inf", 0), ("-inf", 0)])
def test_all_logits_the_same_non_finite_value(value, label):
    logits = torch.full((1, 5, 3, 3), float(value))
    for size in [(20, 24), (3, 3), (2, 2)]:
        assert (kernel_labels(logits, size) == label).all()


def test_logits_close_to_overflow_as_torch():
    largest = torch.finfo(torch.float32).max
    logits = random_logits(1, 9, 4, 4) * largest / 8
    logits[:, 4] = largest
    logits[:, 2, 1:3] = -largest
    np.testing.assert_array_equal(kernel_labels(logits, (64, 64)), torch_labels(logits, (64, 64)))


@pytest.mark.parametrize("level", SIMD_LEVELS)
def test_simd_levels_agree(level, monkeypatch):
    cases = [
        (random_logits(1, 150, 8, 9), (128, 99)),
        (random_logits(1, 23, 8, 9, torch.float64), (50, 140)),
        (random_logits(2, 23, 9, 9), (7, 4)),
    ]
    broken = random_logits(1, 23, 8, 9)
    broken[0, 5, 2, 3], broken[0, 8, 5, 5] = float("nan"), float("inf")
    cases.append((broken, (70, 71)))
    expected = [kernel_labels(logits, size) for logits, size in cases]
    monkeypatch.setenv("SEGMENTER_FAST_SIMD", level)
    try:
        assert _C.simd_level() == level
    except RuntimeError as error:
        pytest.skip(str(error))
    for (logits, size), labels in zip(cases, expected, strict=True):
        np.testing.assert_array_equal(kernel_labels(logits, size), labels)


def test_threads_do_not_change_labels():
    for B, grid, size in [(1, (8, 8), (128, 128)), (3, (1, 1), (100, 20)), (5, (9, 4), (3, 3))]:
        logits = random_logits(B, 30, *grid)
        alone = kernel_labels(logits, size)
        for threads in (2, 4, 7, 64):
            for _ in range(5):
                np.testing.assert_array_equal(kernel_labels(logits, size, threads=threads), alone)


def test_calls_from_several_threads():
    inputs = [random_logits(2, 20, 6, 6, seed=seed) for seed in range(6)]
    expected = [kernel_labels(logits, (90, 90)) for logits in inputs]
    with ThreadPoolExecutor(6) as executor:
        for _ in range(10):
            results = executor.map(lambda x: kernel_labels(x, (90, 90), threads=3), inputs)
            for labels, alone in zip(results, expected, strict=True):
                np.testing.assert_array_equal(labels, alone)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_works_in_a_forked_child():
    logits = random_logits(1, 20, 6, 6)
    expected = kernel_labels(logits, (90, 90), threads=4)  # the parent's pool has threads now

    def in_child():
        np.testing.assert_array_equal(kernel_labels(logits, (90, 90), threads=4), expected)
        threads = Path("/proc/self/task")
        assert not threads.exists() or len(list(threads.iterdir())) >= 4, "no threads of its own"

    child = multiprocessing.get_context("fork").Process(target=in_child)
    child.start()
    child.join(timeout=60)
    hung = child.is_alive()
    if hung:
        child.kill()
        child.join()
    assert not hung, "the child waited for threads that it does not have"
    assert child.exitcode == 0
    np.testing.assert_array_equal(kernel_labels(logits, (90, 90), threads=4), expected)


def test_kernel_with_nothing_to_do():
    assert kernel_labels(torch.zeros(0, 4, 3, 3), (12, 12)).shape == (0, 12, 12)
    assert kernel_labels(torch.zeros(2, 4, 3, 3), (12, 12), (2, 2, 0, 5)).shape == (2, 0, 5)


UPSAMPLING = {
    "dtype": "float32",
    "shape": (1, 4, 3, 3),
    "strides": (36, 9, 3, 1),
    "size": (12, 12),
    "crop": (0, 0, 12, 12),
    "threads": 1,
}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dtype": "float16"}, 'dtype: expected one of "float32", "float64", got "float16"'),
        ({"shape": (-1, 4, 3, 3)}, r"expected logits \(B, K, h, w\).* got \(-1, 4, 3, 3\)"),
        ({"shape": (1, 0, 3, 3)}, r"got \(1, 0, 3, 3\)"),
        ({"shape": (1, 4, 0, 3)}, r"got \(1, 4, 0, 3\)"),
        ({"shape": (1, 4, 3, -3)}, r"got \(1, 4, 3, -3\)"),
        ({"size": (0, 12)}, r"expected size \(H, W\).* got \(0, 12\)"),
        ({"size": (12, -1)}, r"got \(12, -1\)"),
        (
            {"crop": (1, 0, 12, 12)},
            r"expected crop .* size \(12, 12\), got \(1, 0, 12, 12\)",
        ),
        ({"crop": (0, -1, 12, 12)}, r"got \(0, -1, 12, 12\)"),
        ({"crop": (0, 0, -1, 12)}, r"got \(0, 0, -1, 12\)"),
        ({"crop": (0, 0, 12, 13)}, r"got \(0, 0, 12, 13\)"),
        ({"crop": (2**62, 0, 2**62, 12)}, "expected crop"),
        ({"threads": 0}, "expected threads >= 1, got 0"),
        ({"logits_ptr": 0}, "expected a pointer to logits, got null"),
    ],
)
def test_upsampling_rejects_bad_input(change, message):
    good = {"logits_ptr": torch.zeros(1, 4, 3, 3).data_ptr()} | UPSAMPLING
    _C.Upsampling(**good)
    with pytest.raises(ValueError, match=message):
        _C.Upsampling(**(good | change))


@pytest.mark.parametrize(
    "n_cls, out_dtype, message",
    [
        (4, "int64", 'out_dtype: expected one of .*"uint8", got "int64"'),
        (257, "uint8", "expected at most 256 classes for this type of label, got 257"),
        (32769, "int16", "expected at most 32768 classes"),
        (4, "uint8", "expected a pointer to labels, got null"),
    ],
)
def test_kernel_rejects_bad_input(n_cls, out_dtype, message):
    logits = torch.zeros(1, n_cls, 1, 1)
    geometry = {"shape": logits.shape, "strides": logits.stride()}
    upsampling = _C.Upsampling(logits.data_ptr(), **(UPSAMPLING | geometry))
    with pytest.raises(ValueError, match=message):
        _C.upsample_argmax(upsampling, 0, out_dtype)


def test_source_indices_reject_bad_input():
    with pytest.raises(ValueError, match="dtype: expected one of"):
        _C.source_indices(3, 4, "int8")
    with pytest.raises(ValueError, match="expected sizes >= 1, got 0 and 4"):
        _C.source_indices(0, 4, "float32")


# ------------------------------------------------------------------------ the registered operator
def native_labels(logits: Tensor, size: tuple[int, int], crop: tuple | None = None) -> Tensor:
    """The operator itself, so that nothing can stand in for the kernel."""
    return torch.ops.segmenter_fast.upsample_argmax(logits, size, crop or (0, 0, *size))


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


@pytest.mark.parametrize("layout", STRIDED_LAYOUTS)
def test_strided_inputs(layout):
    strided = strided_as(layout, noise((2, 11, 5, 6)))
    expected = native_labels(strided.contiguous(), (31, 37))
    assert torch.equal(native_labels(strided, (31, 37)), expected)


def test_empty():
    logits = torch.empty(0, 5, 3, 4)
    for backend in ("reference", "native"):
        assert upsample_argmax(logits, (8, 9), backend=backend).shape == (0, 8, 9)


@pytest.mark.parametrize("n_cls", [5, 300])
def test_opcheck(n_cls):
    op = torch.ops.segmenter_fast.upsample_argmax.default
    torch.library.opcheck(op, (noise((2, n_cls, 3, 4)), [13, 17], [1, 2, 5, 7]))


def test_compile_fullgraph():
    logits = noise((2, 5, 3, 4))
    function = torch.compile(upsample_argmax, fullgraph=True, backend="aot_eager")
    assert torch.equal(function(logits, (13, 17)), native_labels(logits, (13, 17)))


def test_export():
    class Labels(torch.nn.Module):
        def forward(self, logits: Tensor) -> Tensor:
            return upsample_argmax(logits, (13, 17))

    logits = noise((2, 5, 3, 4))
    program = torch.export.export(Labels(), (logits,))
    assert "segmenter_fast.upsample_argmax" in program.graph_module.code
    assert torch.equal(program.module()(logits), native_labels(logits, (13, 17)))


@bad_geometry
def test_rejects_bad_input(logits, size, crop, error, text):
    with pytest.raises(error, match=text):
        upsample_argmax(logits, size, crop)


def test_refuses_a_backend_that_cannot_run():
    with pytest.raises(BackendError, match="triton"):
        upsample_argmax(GOOD, (8, 8), backend="triton")


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
