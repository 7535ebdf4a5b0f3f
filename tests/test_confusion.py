"""Confusion counts: the kernel against a slow plain count, from labels and from patch logits."""

import numpy as np
import pytest
import torch
from dense_cases import GOOD, LABELS, STRIDED_LAYOUTS, bad_target, noise, random_target, strided_as
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segmenter_fast import _C
from segmenter_fast.backend import BackendError
from segmenter_fast.ops.confusion import confusion_matrix, upsample_confusion
from segmenter_fast.ops.upsample_argmax import upsample_argmax

INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)
GUARD = 64


def slow_count(labels: Tensor, target: Tensor, n_cls: int, ignore_index: int = 255) -> Tensor:
    """The definition, pixel by pixel."""
    counts = torch.zeros(n_cls, n_cls, dtype=torch.int64)
    for label, truth in zip(labels.flatten().tolist(), target.flatten().tolist(), strict=True):
        if truth != ignore_index:
            counts[truth, label] += 1
    return counts


def native_count(
    labels: Tensor, target: Tensor, n_cls: int, ignore_index: int = 255, threads: int = 1
) -> tuple[Tensor, tuple[int, int]]:
    """(counts, wrong targets and labels) from the kernel, with guard words around the counts."""
    memory = np.zeros(n_cls * n_cls + 2 * GUARD, dtype=np.int64)
    memory[:GUARD] = memory[-GUARD:] = 77
    errors = _C.confusion_matrix(
        labels.data_ptr(),
        str(labels.dtype).removeprefix("torch."),
        target.data_ptr(),
        str(target.dtype).removeprefix("torch."),
        labels.numel(),
        n_cls,
        ignore_index,
        threads,
        memory[GUARD:].ctypes.data,
    )
    assert (memory[:GUARD] == 77).all() and (memory[-GUARD:] == 77).all(), "stray write"
    return torch.from_numpy(memory[GUARD:-GUARD].reshape(n_cls, n_cls)), errors


def blocks(shape: tuple[int, int], n_cls: int, seed: int) -> Tensor:
    """A label map of blocks, as pictures have."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, n_cls, (-(-shape[0] // 5), -(-shape[1] // 7)), generator=generator)
    fine = coarse.repeat_interleave(5, 0).repeat_interleave(7, 1)
    return fine[: shape[0], : shape[1]].contiguous()


@pytest.mark.parametrize("n_cls", [1, 2, 7, 100])
@pytest.mark.parametrize("labels_dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("target_dtype", INTEGERS, ids=str)
def test_matches_reference(n_cls, labels_dtype, target_dtype):
    for make in (blocks, lambda shape, n, seed: random_target((1, *shape), n)[0] % n):
        labels = make((37, 41), n_cls, 0).to(labels_dtype)
        target = make((37, 41), n_cls, 1)
        target[3:9] = 255
        target = target.to(torch.int64).clamp(max=127 if target_dtype == torch.int8 else 255)
        target = target.to(target_dtype)
        expected = slow_count(labels, target, n_cls)
        counts = torch.ops.segmenter_fast.confusion_matrix(labels, target, n_cls, 255)
        assert torch.equal(counts, expected)
        assert torch.equal(confusion_matrix(labels, target, n_cls), expected)
        assert torch.equal(confusion_matrix(labels, target, n_cls, backend="reference"), expected)


def test_threads_do_not_change_the_counts():
    # More pixels than a task takes, and tables that several threads can and cannot afford.
    for n_cls, ignore_index in ((19, 255), (1500, 3), (3000, -1)):
        labels = blocks((900, 801), n_cls, 0)
        target = blocks((900, 801), n_cls, 1)
        # The last counter, in everybody's share of the pixels.
        labels[:, -1] = target[:, -1] = n_cls - 1
        alone, _ = native_count(labels, target, n_cls, ignore_index)
        assert alone.sum() == (target != ignore_index).sum()
        for threads in (2, 3, 7):
            counts, errors = native_count(labels, target, n_cls, ignore_index, threads)
            assert torch.equal(counts, alone) and errors == (0, 0)


def test_many_classes():
    labels = torch.tensor([9999, 0, 9999], dtype=torch.int32)
    target = torch.tensor([9999, 9999, 7], dtype=torch.int32)
    counts = confusion_matrix(labels, target, 10000)
    assert counts[9999, 9999] == counts[9999, 0] == counts[7, 9999] == 1
    with pytest.raises(MemoryError, match=r"1000000 x 1000000 classes take 7450.6 GiB"):
        confusion_matrix(labels, target, 10**6)


def count_drawn_case(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    n_cls, pixels = draw(1, 40), draw(0, 300)
    generator = np.random.default_rng(draw(0, 10**6))
    labels, target = (
        torch.from_numpy(
            generator.integers(low, n_cls + high, pixels).repeat(draw(1, 4))[:pixels].copy()
        ).to(data.draw(st.sampled_from(INTEGERS)))
        for low, high in ((0, draw(0, 1)), (0, draw(0, 2)))
    )
    ignore_index = data.draw(st.sampled_from([255, 0, n_cls, -1]))
    counts, (wrong_targets, wrong_labels) = native_count(
        labels, target, n_cls, ignore_index, draw(1, 3)
    )
    counted = target.long() != ignore_index
    in_range = counted & (target.long() < n_cls)
    good = in_range & (labels.long() < n_cls)
    assert torch.equal(counts, slow_count(labels[good], target[good], n_cls, ignore_index))
    assert wrong_targets == int((counted & ~in_range).sum())
    assert wrong_labels == int((in_range & ~good).sum())


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_input(data):
    count_drawn_case(data)


@pytest.mark.nightly
@settings(max_examples=2000, deadline=None, database=None)
@given(data=st.data())
def test_any_input_at_length(data):
    count_drawn_case(data)


# ------------------------------------------------------------------------------- from patch logits
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_counts_every_valid_pixel_once(backend):
    logits, target = noise((2, 9, 3, 4)), random_target((2, 29, 31), 9, torch.uint8)
    counts = upsample_confusion(logits, target, backend=backend)
    assert counts.dtype == torch.int64
    assert torch.equal(counts, slow_count(upsample_argmax(logits, (29, 31)), target, 9))
    assert counts.sum() == (target != 255).sum()


def test_crop():
    logits, target = noise((1, 4, 3, 4)), random_target((1, 10, 11), 4)
    counts = upsample_confusion(logits, target, (24, 32), (3, 5, 10, 11))
    labels = upsample_argmax(logits, (24, 32), (3, 5, 10, 11))
    assert torch.equal(counts, slow_count(labels, target, 4))


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_ignored(backend):
    logits = noise((1, 3, 2, 2))
    nothing = upsample_confusion(logits, torch.full((1, 8, 8), 255), backend=backend)
    assert nothing.sum() == 0
    target = random_target((1, 8, 8), 3) % 3
    counts = upsample_confusion(logits, target, ignore_index=0, backend=backend)
    assert counts[0].sum() == 0
    assert counts.sum() == (target != 0).sum()
    # A label is not looked at where the target is ignored.
    labels = torch.tensor([200, 1])
    assert confusion_matrix(labels, torch.tensor([255, 1]), 3, backend=backend).sum() == 1


@pytest.mark.parametrize("layout", STRIDED_LAYOUTS)
def test_strided_inputs(layout):
    strided = strided_as(layout, noise((2, 11, 5, 6)))
    target = random_target((2, 31, 37), 11)
    expected = upsample_confusion(strided.contiguous(), target)
    assert torch.equal(upsample_confusion(strided, target), expected)
    assert torch.equal(upsample_confusion(strided, target.mT.contiguous().mT), expected)


def test_empty():
    target = torch.empty(0, 8, 9, dtype=torch.int64)
    assert upsample_confusion(torch.empty(0, 5, 3, 4), target).eq(0).all()
    assert confusion_matrix(target, target, 3).eq(0).all()


# ------------------------------------------------------------------------------- machinery
def test_opcheck():
    labels, target = blocks((9, 11), 5, 0).byte(), blocks((9, 11), 5, 1)
    op = torch.ops.segmenter_fast.confusion_matrix.default
    torch.library.opcheck(op, (labels, target, 5, 255))


def test_compile_fullgraph():
    logits, target = noise((2, 5, 3, 4)), random_target((2, 13, 17), 5)
    function = torch.compile(upsample_confusion, fullgraph=True, backend="aot_eager")
    assert torch.equal(function(logits, target), upsample_confusion(logits, target))


def test_export():
    class Count(torch.nn.Module):
        def forward(self, logits: Tensor, target: Tensor) -> Tensor:
            return upsample_confusion(logits, target)

    logits, target = noise((2, 5, 3, 4)), random_target((2, 13, 17), 5)
    program = torch.export.export(Count(), (logits, target))
    assert torch.equal(program.module()(logits, target), upsample_confusion(logits, target))


# ------------------------------------------------------------------------------- bad input
@bad_target
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_rejects_bad_target(target, options, error, text, backend):
    with pytest.raises(error, match=text):
        upsample_confusion(GOOD, target, **options, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize(
    ("labels", "target", "n_cls", "error", "text"),
    [
        (LABELS, LABELS[:, 1:], 3, ValueError, r"labels \(1, 8, 8\) and target \(1, 7, 8\) differ"),
        (LABELS.float(), LABELS, 3, TypeError, "labels must be uint8, .*got torch.float32"),
        (LABELS, LABELS.bool(), 3, TypeError, "target must be uint8, .*got torch.bool"),
        (LABELS, [0], 3, TypeError, "target must be a tensor, got list"),
        (LABELS, LABELS.to("meta"), 3, ValueError, "labels are on cpu and target is on meta"),
        (LABELS, LABELS + 5, 3, ValueError, r"64 pixels .*outside \[0, 3\).*: 5"),
        (LABELS + 3, LABELS, 3, ValueError, r"labels holds 3, outside \[0, 3\)"),
        (LABELS - 1, LABELS, 3, ValueError, r"labels holds -1, outside \[0, 3\)"),
        (LABELS, LABELS, 0, ValueError, "num_classes must be at least 1, got 0"),
    ],
)
def test_rejects_bad_input(labels, target, n_cls, error, text, backend):
    with pytest.raises(error, match=text):
        confusion_matrix(labels, target, n_cls, backend=backend)


def test_kernel_rejects_bad_input():
    good = {
        "labels_ptr": LABELS.data_ptr(), "labels_dtype": "int64", "target_ptr": LABELS.data_ptr(),
        "target_dtype": "int64", "pixels": 64, "K": 3, "ignore_index": 255, "threads": 1,
        "counts_ptr": torch.zeros(3, 3, dtype=torch.int64).data_ptr(),
    }  # fmt: skip
    for change, text in (
        ({"labels_dtype": "float32"}, 'labels_dtype: expected one of .*got "float32"'),
        ({"pixels": -1}, "expected pixels >= 0"),
        ({"K": 0}, "1 <= K"),
        ({"threads": 0}, "threads >= 1"),
        ({"counts_ptr": 0}, "expected pointers to labels, target and counts, got null"),
    ):
        with pytest.raises(ValueError, match=text):
            _C.confusion_matrix(**(good | change))


@pytest.mark.parametrize("function", [confusion_matrix, upsample_confusion])
def test_refuses_a_backend_that_cannot_run(function):
    arguments = (LABELS, LABELS, 3) if function is confusion_matrix else (GOOD, LABELS)
    with pytest.raises(BackendError, match="triton"):
        function(*arguments, backend="triton")
