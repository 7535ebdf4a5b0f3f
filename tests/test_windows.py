"""Windows, scales and flips read from patch logits, held to the protocol's own steps."""

import itertools

import numpy as np
import pytest
import torch
from checks import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from window_cases import CASES, each_case, make_view

from segmenter_fast import _C
from segmenter_fast.backend import BackendError
from segmenter_fast.ops.upsample_argmax import upsample_argmax
from segmenter_fast.ops.window_geometry import WindowView, axis_taps, window_anchors
from segmenter_fast.ops.windows import (
    WindowLogits,
    window_logits_reference,
    window_probabilities_reference,
)

GUARD = 64
SIMD_LEVELS = _C.build_info()["simd_levels"]
BACKENDS = ("native", "reference")


def cast(view: WindowView, dtype: torch.dtype) -> WindowView:
    return WindowView(
        view.logits.to(dtype),
        view.image_size,
        view.window,
        view.stride,
        view.patch_size,
        view.flip,
    )


def operator_arguments(views: list[WindowView], size: tuple[int, int]) -> tuple:
    """(logits, taps, windows) as the operators take them."""
    logits = WindowLogits(views, size)
    taps = [table for view in views for axis in logits.axes(view) for table in axis[:3]]
    windows = [len(anchors) for view in views for anchors in view.anchors]
    return [view.logits for view in views], taps, windows


def native_labels(view: WindowView, size: tuple[int, int]) -> Tensor:
    """The operator itself, so that nothing can stand in for the kernel."""
    (logits,), taps, windows = operator_arguments([view], size)
    return torch.ops.segmenter_fast.window_labels(logits, taps, windows, size)


def native_probabilities(
    views: list[WindowView], size: tuple[int, int], probabilities: str = "all"
) -> tuple[Tensor, Tensor]:
    arguments = operator_arguments(views, size)
    return torch.ops.segmenter_fast.window_probabilities(*arguments, size, True, probabilities)


def guarded(size: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """(memory with guard words at both ends, the part between them)."""
    memory = np.full(size + 2 * GUARD, 77, dtype=dtype)
    return memory, memory[GUARD : GUARD + size]


def run_kernels(views: list[WindowView], size: tuple[int, int], threads: int) -> list[np.ndarray]:
    """Everything that the two kernels write, straight from the compiled module."""
    logits, taps, windows = operator_arguments(views, size)
    dtype = str(logits[0].dtype).removeprefix("torch.")
    n_cls = logits[0].shape[1]
    native = [
        _C.WindowView(
            view.data_ptr(),
            windows[2 * i : 2 * i + 2],
            view.shape[2:],
            view.stride(),
            [table.data_ptr() for table in taps[6 * i : 6 * i + 3]],
            [table.data_ptr() for table in taps[6 * i + 3 : 6 * i + 6]],
        )
        for i, view in enumerate(logits)
    ]
    pixels = size[0] * size[1]
    kinds = (("int32", pixels), ("int32", pixels), (dtype, pixels), (dtype, n_cls * pixels))
    outputs = [guarded(count, kind) for kind, count in kinds]
    pointers = [part.ctypes.data for _, part in outputs]
    if len(views) == 1:
        _C.window_labels(native[0], dtype, n_cls, size, threads, pointers[0], "int32")
    _C.window_probabilities(
        native, dtype, n_cls, size, threads, pointers[1], "int32", pointers[2], pointers[3]
    )
    for memory, _ in outputs:
        assert (memory[:GUARD] == 77).all() and (memory[-GUARD:] == 77).all(), "stray write"
    return [part for _, part in outputs]


def assert_best_class(labels: Tensor, view: WindowView, size: tuple[int, int]) -> None:
    """The chosen class's exact logit is within rounding of the largest."""
    exact = window_logits_reference(cast(view, torch.float64), size)
    gap = exact.amax(0) - exact.gather(0, labels.long()[None])[0]
    eps = torch.finfo(view.logits.dtype).eps
    # Weights carry the rounding of a coordinate of up to that many patches.
    coordinate = max(view.logits.shape[2:]) + 16
    assert gap.max() <= 4 * coordinate * eps * view.logits.abs().max().double()


def hold_to_oracle(views: list[WindowView], size: tuple[int, int]) -> None:
    exact = window_probabilities_reference([cast(v, torch.float64) for v in views], size)
    theirs = window_probabilities_reference(views, size)
    labels, ours = native_probabilities(views, size)
    _, top1 = native_probabilities(views, size, "top1")
    if views[0].logits.dtype == torch.float64:
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)
        torch.testing.assert_close(top1, exact.amax(0), rtol=0, atol=1e-12)
    else:
        # PyTorch's own error may be small by chance on few pixels: a source coordinate's rounding
        # moves logits by eps x patches x the step between two, and probabilities by a quarter.
        spread = max((v.logits.max() - v.logits.min()).item() for v in views)
        patches = max(max(v.image_size) / v.patch_size for v in views)
        floor = torch.finfo(torch.float32).eps * (16 + (4 + patches) * spread)
        if (ours - exact).abs().max() > floor:
            assert_close("probabilities", ours, theirs, exact)
        if (top1 - exact.amax(0)).abs().max() > floor:
            assert_close("top-1", top1, theirs.amax(0), exact.amax(0))
    gap = exact.amax(0) - exact.gather(0, labels.long()[None])[0]
    assert gap.max() <= 2 * (ours - exact).abs().max() + 4 * torch.finfo(ours.dtype).eps
    if len(views) == 1:
        assert_best_class(native_labels(views[0], size), views[0], size)


# --------------------------------------------------------------------------------------- oracle
@each_case
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_reference_in_float64(case, backend):
    view, size = make_view(case), case[4]
    expected = window_probabilities_reference([view], size)
    logits = WindowLogits([view], size, backend, tile=(7, 19))
    torch.testing.assert_close(logits.probabilities(), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        logits.probabilities(top1=True), expected.amax(0), rtol=0, atol=1e-12
    )
    assert torch.equal(logits.labels().long(), expected.argmax(0))


@each_case
@pytest.mark.parametrize("n_cls", [1, 19, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_matches_reference(case, n_cls, dtype):
    view = make_view(case, n_cls, dtype)
    hold_to_oracle([view], case[4])
    hold_to_oracle([view, make_view(CASES["smaller and flipped"], n_cls, dtype, 1)], case[4])


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_views_match_reference_in_float64(backend):
    cases = [CASES[name] for name in ("unaligned stride", "smaller and flipped", "whole image")]
    views, size = [make_view(case, seed=i) for i, case in enumerate(cases)], (66, 93)
    expected = window_probabilities_reference(views, size)
    labels, probabilities = WindowLogits(views, size, backend).labels_and_probabilities()
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-12)
    assert torch.equal(labels.long(), expected.argmax(0))
    assert torch.equal(WindowLogits(views, size, backend).labels(), labels)
    torch.testing.assert_close(probabilities.sum(0), torch.ones(size).double(), rtol=0, atol=1e-12)


@each_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_float32_of_the_same_numbers(case, dtype):
    view, size = make_view(case, 19, dtype), case[4]
    labels, probabilities = WindowLogits([view], size).labels_and_probabilities()
    assert probabilities.dtype == torch.float32
    expected = WindowLogits([cast(view, torch.float32)], size).labels_and_probabilities()
    assert torch.equal(labels, expected[0]) and torch.equal(probabilities, expected[1])


def test_spikes_in_the_last_row_column_and_class():
    case = CASES["larger and flipped"]
    view = make_view(case, 37, torch.float32)
    logits = view.logits.clone()
    logits[-1, -1, -1, -1] += 40
    logits[0, -1, 0, 0] += 40
    hold_to_oracle([WindowView(logits, *case[:4], flip=case[5])], case[4])


def test_pruned_labels_equal_unpruned():
    # Smooth logits: most classes are dropped from most blocks, and which ones differs by block.
    case = ((96, 144), (64, 64), 40, 8, (96, 144), False)
    view = make_view(case, n_cls=40)
    smooth = torch.nn.functional.interpolate(view.logits[:, :, :2, :2], (8, 8), mode="bicubic")
    view = WindowView(smooth, *case[:4])
    assert torch.equal(
        native_labels(view, case[4]).long(), window_logits_reference(view, case[4]).argmax(0)
    )


@pytest.mark.parametrize("level", SIMD_LEVELS)
def test_every_simd_level(level, monkeypatch):
    cases = [CASES[name] for name in ("unaligned stride", "larger and flipped", "many overlaps")]
    views = [
        make_view(case, 37, dtype) for case in cases for dtype in (torch.float32, torch.double)
    ]
    expected = [native_labels(view, (61, 77)) for view in views]
    monkeypatch.setenv("SEGMENTER_FAST_SIMD", level)
    try:
        assert _C.simd_level() == level
    except RuntimeError as error:
        pytest.skip(str(error))
    for view, labels in zip(views, expected, strict=True):
        assert torch.equal(native_labels(view, (61, 77)), labels)
        hold_to_oracle([view], (61, 77))


def test_threads_do_not_change_a_bit():
    for names in (["unaligned stride"], ["larger and flipped", "whole image", "many overlaps"]):
        views = [make_view(CASES[name], 30, torch.float32) for name in names]
        alone = run_kernels(views, (83, 71), 1)
        for threads in (2, 3, 7):
            for ours, theirs in zip(run_kernels(views, (83, 71), threads), alone, strict=True):
                np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("spread", [1, 60, 200, 1e4])
def test_neighbours_sure_of_different_classes(spread):
    case = CASES["unaligned stride"]
    view = make_view(case, 5, torch.float32)
    logits = view.logits.clone()
    for i, (n, y, x) in enumerate(itertools.product(*map(range, (len(logits), 3, 3)))):
        logits[n, i % 5, y, x] += spread
    hold_to_oracle([WindowView(logits, *case[:4])], case[4])


# ------------------------------------------------------------------------------------- properties
def test_first_class_wins_ties():
    case = CASES["unaligned stride"]
    view = make_view(case, n_cls=5)
    tied = WindowView(view.logits[:, :1].expand(-1, 5, -1, -1), *case[:4])
    for views in ([tied], [tied, tied]):
        assert not WindowLogits(views, case[4], "native").labels().any()


def test_first_class_wins_ties_of_the_reference():
    """Of logits that are exact: a matrix product may round equal rows differently."""
    case = ((64, 64), (32, 32), 32, 16, (64, 64), False)
    view = make_view(case, n_cls=5)
    tied = WindowView(view.logits[:, :1].round().expand(-1, 5, -1, -1), *case[:4])
    for views in ([tied], [tied, tied]):
        assert not WindowLogits(views, case[4], "reference").labels().any()


def test_nan_counts_as_largest_where_it_is_read_and_nowhere_else():
    case = ((64, 64), (32, 32), 32, 16, (64, 64), False)
    view = make_view(case, n_cls=4)
    logits = view.logits.clone()
    logits[0, 2, 0, 0] = float("nan")
    broken = WindowView(logits, *case[:4])
    tap = axis_taps(64, 32, 32, 16, 64, dtype=torch.float64).dense()[:, 0] > 0
    read = tap[:, None] & tap
    assert read.any() and not read.all()
    labels = native_labels(broken, case[4])
    assert (labels[read] == 2).all()
    assert torch.equal(labels[~read], native_labels(view, case[4])[~read])
    _, probabilities = native_probabilities([broken, view], case[4])
    _, clean = native_probabilities([view, view], case[4])
    assert probabilities[:, read].isnan().all()
    assert torch.equal(probabilities[:, ~read], clean[:, ~read])


def test_infinite_logits():
    case = ((64, 64), (32, 32), 32, 16, (64, 64), False)
    logits = make_view(case, n_cls=4).logits.clone()
    logits[:, 1] = -torch.inf  # a class that is never allowed
    view = WindowView(logits, *case[:4])
    labels, probabilities = native_probabilities([view], case[4])
    assert (probabilities[1] == 0).all() and not (labels == 1).any()
    torch.testing.assert_close(probabilities.sum(0), torch.ones(64, 64).double())
    assert torch.equal(native_labels(view, case[4]), labels)
    logits[1, 3, 1, 1] = torch.inf
    labels, probabilities = native_probabilities([WindowView(logits, *case[:4])], case[4])
    assert (
        probabilities[:, 16:32, 56:64].isnan().all() and probabilities[:, :, :32].isfinite().all()
    )


def test_label_dtype_grows_with_classes():
    case = ((8, 8), (8, 8), 8, 8, (8, 8), False)
    for n_cls, dtype in ((256, torch.uint8), (257, torch.int16), (65535, torch.int32)):
        view = make_view(case, n_cls=n_cls, dtype=torch.float32)
        best = int(view.logits[0, :, 0, 0].argmax())
        for labels in (
            native_labels(view, (8, 8)),
            native_probabilities([view], (8, 8), "none")[0],
        ):
            assert labels.dtype == dtype
            assert (labels == best).all()


def test_one_window_is_plain_upsampling():
    logits = torch.randn(1, 11, 5, 7, generator=torch.Generator().manual_seed(0))
    view = WindowView(logits, (75, 107), (75, 107), 107, 16)
    plain = upsample_argmax(logits, (80, 112), (0, 0, 75, 107), backend="native")[0]
    assert torch.equal(native_labels(view, (75, 107)), plain)


# -------------------------------------------------------------------------------------- any input
def hold_drawn_case_to_oracle(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    n_cls, dtype = draw(1, 40), data.draw(st.sampled_from([torch.float32, torch.float64]))
    views = []
    for _ in range(draw(1, 3)):
        patch = draw(1, 9)
        image = (draw(1, 40), draw(1, 40))
        window = tuple(draw(1, side) for side in image)
        case = (image, window, draw(1, min(window)), patch, None, data.draw(st.booleans()))
        view = make_view(case, n_cls, torch.float64, seed=draw(0, 10**6))
        logits = view.logits * data.draw(st.sampled_from([0.01, 1, 10]))
        if data.draw(st.booleans()):
            logits = logits.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        views.append(WindowView(logits.to(dtype), *case[:4], flip=case[5]))
    size = (draw(1, 50), draw(1, 50))
    hold_to_oracle(views, size)
    run_kernels(views, size, draw(1, 3))


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_input(data):
    hold_drawn_case_to_oracle(data)


@pytest.mark.nightly
@settings(max_examples=2000, deadline=None, database=None)
@given(data=st.data())
def test_any_input_at_length(data):
    hold_drawn_case_to_oracle(data)


# -------------------------------------------------------------------------------------- machinery
@pytest.mark.parametrize("tile", [(1, 1), (3, 200), (200, 3), (64, 64)])
def test_tile_does_not_matter(tile):
    case = CASES["unaligned stride"]
    views = [make_view(case), make_view(CASES["smaller and flipped"], seed=1)]
    size = (31, 44)
    expected = WindowLogits(views, size, "reference").probabilities()
    tiled = WindowLogits(views, size, "reference", tile).probabilities()
    torch.testing.assert_close(tiled, expected, rtol=0, atol=1e-13)


def test_opcheck():
    views, size = [make_view(CASES["aligned"]), make_view(CASES["smaller and flipped"])], (9, 11)
    logits, taps, windows = operator_arguments(views[:1], size)
    torch.library.opcheck(
        torch.ops.segmenter_fast.window_labels.default, (logits[0], taps, windows, size)
    )
    arguments = operator_arguments(views, size)
    for labels, probabilities in ((True, "none"), (False, "top1"), (True, "all")):
        torch.library.opcheck(
            torch.ops.segmenter_fast.window_probabilities.default,
            (*arguments, size, labels, probabilities),
        )


def test_compile_fullgraph():
    view, size = make_view(CASES["aligned"], dtype=torch.float32), (64, 96)
    (logits,), taps, windows = operator_arguments([view], size)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(logits: Tensor) -> tuple[Tensor, Tensor]:
        ops = torch.ops.segmenter_fast
        top1 = ops.window_probabilities([logits], taps, windows, size, False, "top1")[1]
        return ops.window_labels(logits, taps, windows, size), top1

    labels, top1 = function(logits)
    assert torch.equal(labels, native_labels(view, size))
    assert torch.equal(top1, native_probabilities([view], size, "top1")[1])


def test_strided_inputs():
    case = CASES["unaligned stride"]
    view = make_view(case)
    big = torch.zeros(*(2 * n for n in view.logits.shape), dtype=torch.float64)
    big[::2, ::2, ::2, ::2] = view.logits
    for strided in (
        view.logits.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        big[::2, ::2, ::2, ::2],
    ):
        assert not strided.is_contiguous()
        other = WindowView(strided, *case[:4])
        assert torch.equal(native_labels(other, case[4]), native_labels(view, case[4]))
        ours, theirs = (native_probabilities([v, v], case[4])[1] for v in (other, view))
        assert torch.equal(ours, theirs)


def test_empty():
    # There is no empty case: a view has a window, an output a pixel.
    with pytest.raises(ValueError, match="at least 1"):
        WindowLogits([make_view(CASES["aligned"])], (0, 4))


def test_autocast_does_not_round_the_weights():
    case = CASES["unaligned stride"]
    for backend in BACKENDS:
        logits = WindowLogits([make_view(case, dtype=torch.float32)], case[4], backend)
        plain = logits.probabilities()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(logits.probabilities(), plain)


# --------------------------------------------------------------------------------------- bad input
def test_rejects_bad_input():
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
    with pytest.raises(BackendError, match="triton"):
        WindowLogits([view], (4, 4), "triton")


def test_kernels_reject_bad_tables():
    size = (12, 9)
    view = make_view(((12, 9), (12, 9), 12, 4, size, False), 3, torch.float32)
    (logits,), taps, _ = operator_arguments([view], size)
    labels = np.zeros(size, np.uint8)
    assert window_anchors(12, 12, 12) == [0]

    def run(change: dict) -> None:
        tables = {
            name: change.get(name, taps[i])
            for i, name in enumerate(
                ("start y", "index y", "weight y", "start x", "index x", "weight x")
            )
        }
        addresses = [0 if table is None else table.data_ptr() for table in tables.values()]
        native = _C.WindowView(
            change.get("logits", logits.data_ptr()),
            change.get("windows", (1, 1)),
            logits.shape[2:],
            logits.stride(),
            addresses[:3],
            addresses[3:],
        )
        _C.window_labels(
            native,
            change.get("dtype", "float32"),
            change.get("K", 3),
            change.get("size", size),
            change.get("threads", 1),
            change.get("labels", labels.ctypes.data),
            change.get("labels_dtype", "uint8"),
        )

    run({})
    beyond, before, bare = taps[1].clone(), taps[1].clone(), taps[0].clone()
    beyond[-1], before[0], bare[3] = 3, -1, bare[2]
    for change, text in (
        ({"index y": beyond}, r"taps in \[0, 3\) along y, got 3"),
        ({"index y": before}, r"taps in \[0, 3\) along y, got -1"),
        ({"start y": bare}, "at least one tap for every output y, got none at 2"),
        ({"start y": taps[0] + 1}, r"start\[0\] = 0, got 1"),
        ({"weight x": None}, "expected tables of taps, got null"),
        ({"logits": 0}, "expected a pointer to logits, got null"),
        ({"labels": 0}, "expected a pointer to labels, got null"),
        ({"windows": (0, 1)}, r"all >= 1, got \(0, 1, 3, 3\)"),
        ({"K": 0}, r"\(K, H, W\) >= 1, got \(0, 12, 9\)"),
        ({"K": 300}, "at most 256 classes"),
        ({"threads": 0}, "threads >= 1, got 0"),
        ({"dtype": "float16"}, "dtype: expected one of"),
        ({"labels_dtype": "int64"}, "labels_dtype: expected one of"),
    ):
        with pytest.raises(ValueError, match=text):
            run(change)
    with pytest.raises(ValueError, match="expected at least one view, got none"):
        _C.window_probabilities([], "float32", 3, size, 1)
