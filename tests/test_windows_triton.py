"""Windows, scales and flips in Triton, held to the protocol's own steps."""

import pytest
import torch
from checks import assert_close
from test_windows import cast
from torch import Tensor
from triton_cases import DEVICE, DTYPES, on_device
from window_cases import CASES, make_view

from segmenter_fast.ops import _triton, windows_triton
from segmenter_fast.ops.window_geometry import WindowView, axis_taps
from segmenter_fast.ops.windows import (
    WindowLogits,
    window_logits_reference,
    window_probabilities_reference,
)
from segmenter_fast.ops.windows_triton import evaluate_windows, taps_of

pytestmark = on_device

# The shared cases, drawn smaller: the interpreter goes through every block of every row.
SMALL = {
    "one window": ((12, 16), (12, 16), 16, 8, (12, 16), False),
    "aligned": ((8, 16), (8, 8), 8, 4, (8, 16), False),
    "unaligned stride": ((11, 17), (7, 7), 5, 4, (11, 17), False),
    "smaller and flipped": ((21, 30), (14, 14), 9, 4, (7, 11), True),
    "larger and flipped": ((9, 8), (5, 5), 4, 4, (13, 19), True),
    "many overlaps": ((7, 9), (4, 4), 1, 2, (6, 9), True),
    "one pixel": CASES["one pixel"],
    "wide": ((3, 70), (3, 3), 2, 2, (3, 70), False),
}
each_small_case = pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)


def moved(view: WindowView) -> WindowView:
    return WindowView(
        view.logits.to(DEVICE),
        view.image_size,
        view.window,
        view.stride,
        view.patch_size,
        view.flip,
    )


def labels_of(view: WindowView, size: tuple[int, int]) -> Tensor:
    """The operator for a single view's labels; the result comes back to the CPU."""
    labels, nothing = evaluate_windows([moved(view)], size, True, "none")
    assert nothing is None
    return labels.cpu()


def probabilities_of(
    views: list[WindowView], size: tuple[int, int], probabilities: str = "all"
) -> tuple[Tensor, Tensor]:
    results = evaluate_windows([moved(view) for view in views], size, True, probabilities)
    return tuple(result.cpu() for result in results)


def hold_to_oracle(views: list[WindowView], size: tuple[int, int]) -> None:
    exact = window_probabilities_reference([cast(v, torch.float64) for v in views], size)
    theirs = window_probabilities_reference(views, size)
    labels, ours = probabilities_of(views, size)
    if ours.dtype == torch.float64:
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)
    else:
        # PyTorch's own error may be small by chance on few pixels: a source coordinate's rounding
        # moves logits by eps x patches x the step between two, and probabilities by a quarter.
        spread = max((v.logits.max() - v.logits.min()).item() for v in views)
        patches = max(max(v.image_size) / v.patch_size for v in views)
        floor = torch.finfo(torch.float32).eps * (16 + (4 + patches) * spread)
        if (ours - exact).abs().max() > floor:
            assert_close("probabilities", ours, theirs, exact)
    error = (ours - exact).abs().max() + 2 * torch.finfo(ours.dtype).eps
    each = [labels] if len(views) > 1 else [labels, labels_of(views[0], size)]
    for chosen in each:
        gap = exact.amax(0) - exact.gather(0, chosen.long()[None])[0]
        assert gap.max() <= 2 * error


@each_small_case
def test_matches_reference(case):
    hold_to_oracle([make_view(case, 19, torch.float32)], case[4])


@pytest.mark.parametrize("n_cls", [1, 19])
def test_several_views_match_reference(n_cls):
    cases = [SMALL[name] for name in ("unaligned stride", "smaller and flipped", "one window")]
    views = [make_view(case, n_cls, torch.float32, i) for i, case in enumerate(cases)]
    hold_to_oracle(views, (11, 19))


@each_small_case
def test_labels_in_float64(case):
    view = make_view(case)
    exact = window_logits_reference(view, case[4])
    assert torch.equal(labels_of(view, case[4]).long(), exact.argmax(0))
    _, ours = probabilities_of([view], case[4])
    torch.testing.assert_close(ours, exact.softmax(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["much smaller", "one pixel", "whole image"])
def test_labels_agree_with_native(name):
    """At the sizes of the other backends' tests."""
    case = CASES[name]
    view = make_view(case, 7)
    native = WindowLogits([view], case[4], "native").labels()
    assert torch.equal(labels_of(view, case[4]), native)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision_is_float32_of_the_same_numbers(dtype):
    case = SMALL["unaligned stride"]
    view = make_view(case, 19, dtype)
    upcast = cast(view, torch.float32)
    assert torch.equal(labels_of(view, case[4]), labels_of(upcast, case[4]))
    labels, probabilities = probabilities_of([view, view], case[4])
    assert probabilities.dtype == torch.float32
    expected = probabilities_of([upcast, upcast], case[4])
    assert torch.equal(labels, expected[0]) and torch.equal(probabilities, expected[1])


@pytest.mark.parametrize("n_cls", [65, 129, 300])
def test_more_classes_than_a_block_takes(n_cls):
    case = ((4, 5), (3, 3), 1, 2, (3, 5), True)
    view = make_view(case, n_cls, torch.float32)
    logits = view.logits.clone()
    logits[0, -1, 0, 0] += 20
    hold_to_oracle([WindowView(logits, *case[:4], flip=True), view], case[4])
    hold_to_oracle([WindowView(logits, *case[:4], flip=True)], case[4])


def test_spikes_in_the_last_row_column_and_class():
    case = SMALL["larger and flipped"]
    view = make_view(case, 37, torch.float32)
    logits = view.logits.clone()
    logits[-1, -1, -1, -1] += 40
    logits[0, -1, 0, 0] += 40
    hold_to_oracle([WindowView(logits, *case[:4], flip=case[5])], case[4])


@pytest.mark.parametrize("candidate", [0, 1])
def test_every_configuration(candidate):
    case = SMALL["unaligned stride"]
    views = [make_view(case, 19, torch.float32, seed) for seed in (0, 1)]
    with _triton.use_candidate(candidate):
        hold_to_oracle(views[:1], case[4])
        hold_to_oracle(views, case[4])


def test_strips_do_not_change_a_bit(monkeypatch):
    case = SMALL["smaller and flipped"]
    views = [make_view(case, 19, torch.float32, seed) for seed in (0, 1)]
    expected = labels_of(views[0], case[4]), *probabilities_of(views, case[4])
    for rows in (1, 5):
        bytes_of_rows = rows * 4 * 19 * (8 + 11)
        monkeypatch.setattr(windows_triton, "STRIP_BYTES", bytes_of_rows)
        again = labels_of(views[0], case[4]), *probabilities_of(views, case[4])
        for ours, theirs in zip(again, expected, strict=True):
            assert torch.equal(ours, theirs)


# ------------------------------------------------------------------------------------- properties
def test_first_class_wins_ties():
    case = SMALL["unaligned stride"]
    view = make_view(case, n_cls=5)
    tied = WindowView(view.logits[:, :1].expand(-1, 70, -1, -1), *case[:4])
    assert not labels_of(tied, case[4]).any()
    assert not probabilities_of([tied, tied], case[4])[0].any()


@pytest.mark.parametrize("k", [0, 2, 39])
def test_nan_counts_as_largest_where_it_is_read_and_nowhere_else(k):
    case = ((16, 16), (8, 8), 8, 4, (16, 16), False)
    view = make_view(case, n_cls=40)
    logits = view.logits.clone()
    logits[0, k:, 0, 0] = float("nan")
    logits[0, 1, 0, 0] = float("inf")
    broken = WindowView(logits, *case[:4])
    tap = axis_taps(16, 8, 8, 4, 16, dtype=torch.float64).dense()[:, 0] > 0
    read = tap[:, None] & tap
    assert read.any() and not read.all()
    labels = labels_of(broken, case[4])
    assert (labels[read] == k).all()
    assert torch.equal(labels[~read], labels_of(view, case[4])[~read])
    _, probabilities = probabilities_of([broken, view], case[4])
    _, clean = probabilities_of([view, view], case[4])
    assert probabilities[:, read].isnan().all()
    assert torch.equal(probabilities[:, ~read], clean[:, ~read])


def test_infinite_logits():
    case = ((16, 16), (8, 8), 8, 4, (16, 16), False)
    logits = make_view(case, n_cls=4).logits.clone()
    logits[:, 1] = -torch.inf  # a class that is never allowed
    view = WindowView(logits, *case[:4])
    labels, probabilities = probabilities_of([view], case[4])
    assert (probabilities[1] == 0).all() and not (labels == 1).any()
    torch.testing.assert_close(probabilities.sum(0), torch.ones(16, 16).double())
    assert torch.equal(labels_of(view, case[4]), labels)
    nothing = WindowView(torch.full_like(logits, -torch.inf), *case[:4])
    assert not labels_of(nothing, case[4]).any()


# ------------------------------------------------------------------------------------- machinery
def test_window_logits_dispatches_here():
    case = SMALL["unaligned stride"]
    views = [moved(make_view(case, 5, torch.float32, seed)) for seed in (0, 1)]
    for chosen in (views[:1], views):
        logits = WindowLogits(chosen, case[4], "triton")
        expected = WindowLogits([cast(v, torch.float64) for v in chosen], case[4], "reference")
        assert (logits.labels() == expected.labels()).all()
        torch.testing.assert_close(
            logits.probabilities().double(), expected.probabilities(), rtol=0, atol=1e-5
        )
        labels, top1 = logits.labels_and_probabilities(top1=True)
        assert torch.equal(labels, logits.labels())
        assert torch.equal(top1, logits.probabilities().amax(0))


def test_tables_are_made_once_for_a_geometry():
    view = moved(make_view(SMALL["aligned"], 5, torch.float32))
    first, _ = taps_of(view, (8, 16))
    again, _ = taps_of(moved(make_view(SMALL["aligned"], 5, torch.float32, 1)), (8, 16))
    assert all(one is other for one, other in zip(first, again, strict=True))


def test_opcheck():
    size = (4, 5)
    views = [moved(make_view(SMALL[name])) for name in ("aligned", "smaller and flipped")]
    taps, most = zip(*(taps_of(view, size) for view in views), strict=True)
    columns = [len(view.anchors[1]) for view in views]
    ops = torch.ops.segmenter_fast
    torch.library.opcheck(
        ops.window_labels_triton.default, (views[0].logits, taps[0], columns[0], most[0], size)
    )
    tables = [table for each in taps for table in each]
    logits = [view.logits for view in views]
    for labels, probabilities in ((True, "none"), (False, "top1"), (True, "all")):
        torch.library.opcheck(
            ops.window_probabilities_triton.default,
            (logits, tables, columns, most, size, labels, probabilities),
        )


def test_compile_fullgraph():
    view, size = moved(make_view(SMALL["aligned"], dtype=torch.float32)), (8, 16)
    taps, most = taps_of(view, size)
    columns = len(view.anchors[1])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(logits: Tensor) -> tuple[Tensor, Tensor]:
        ops = torch.ops.segmenter_fast
        top1 = ops.window_probabilities_triton(
            [logits], taps, [columns], [most], size, False, "top1"
        )[1]
        return ops.window_labels_triton(logits, taps, columns, most, size), top1

    labels, top1 = function(view.logits)
    assert torch.equal(labels.cpu(), labels_of(view, size))
    assert torch.equal(top1.cpu(), probabilities_of([view], size, "top1")[1])


def test_strided_inputs():
    case = SMALL["unaligned stride"]
    view = make_view(case)
    big = torch.zeros(*(2 * n for n in view.logits.shape), dtype=torch.float64)
    big[::2, ::2, ::2, ::2] = view.logits
    for strided in (
        view.logits.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        big[::2, ::2, ::2, ::2],
    ):
        assert not strided.is_contiguous()
        other = WindowView(strided, *case[:4])
        assert torch.equal(labels_of(other, case[4]), labels_of(view, case[4]))
        ours, theirs = (probabilities_of([v, v], case[4])[1] for v in (other, view))
        assert torch.equal(ours, theirs)


def test_empty():
    # There is no empty case: a view has a window, an output a pixel.
    with pytest.raises(ValueError, match="at least 1"):
        WindowLogits([moved(make_view(SMALL["aligned"]))], (0, 4), "triton")


def test_autocast_does_not_round_the_weights():
    case = SMALL["unaligned stride"]
    logits = WindowLogits([moved(make_view(case, dtype=torch.float32))], case[4], "triton")
    plain = logits.probabilities()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(logits.probabilities(), plain)


def test_rejects_bad_input():
    views = [moved(WindowView(torch.zeros(4, n, 2, 2), (48, 48), (32, 32), 16, 16)) for n in (3, 5)]
    with pytest.raises(ValueError, match="views is empty"):
        WindowLogits([], (4, 4), "triton")
    with pytest.raises(ValueError, match="views differ"):
        WindowLogits(views, (4, 4), "triton")
    with pytest.raises(ValueError, match="size"):
        WindowLogits(views[:1], (4, 0), "triton")
