"""Confusion counts in Triton against a plain count of keys."""

import pytest
import torch
from dense_cases import GOOD, LABELS, STRIDED_LAYOUTS, noise, random_target, strided_as
from torch import Tensor
from triton_cases import DEVICE, on_device

from segmenter_fast.ops import _triton, confusion_triton
from segmenter_fast.ops.confusion import confusion_matrix, upsample_confusion
from segmenter_fast.ops.upsample_argmax import upsample_argmax

pytestmark = on_device

COUNT = torch.ops.segmenter_fast.confusion_matrix_triton
INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)


def counts_of(labels: Tensor, target: Tensor, n_cls: int, ignore_index: int = 255) -> Tensor:
    return COUNT(labels.to(DEVICE), target.to(DEVICE), n_cls, ignore_index).cpu()


def plain(labels: Tensor, target: Tensor, n_cls: int, ignore_index: int = 255) -> Tensor:
    """The definition; what is out of range is left out."""
    labels, target = labels.flatten().long(), target.flatten().long()
    kept = (target != ignore_index) & (target >= 0) & (target < n_cls)
    kept &= (labels >= 0) & (labels < n_cls)
    counts = torch.bincount(target[kept] * n_cls + labels[kept], minlength=n_cls**2)
    return counts.view(n_cls, n_cls)


def regions(shape: tuple[int, int], n_cls: int, run: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, n_cls, [-(-side // run) for side in shape], generator=generator)
    return coarse.repeat_interleave(run, 0).repeat_interleave(run, 1)[: shape[0], : shape[1]]


@pytest.mark.parametrize("run", [1, 3, 40])
@pytest.mark.parametrize("n_cls", [1, 2, 19, 100])
@pytest.mark.parametrize("size", [(1, 1), (31, 33), (32, 32), (47, 101)], ids=str)
def test_matches_reference(size, n_cls, run):
    """Less than a block of pixels, one exactly, and several, with runs across their borders."""
    labels, target = (regions(size, n_cls, run, seed) for seed in (0, 1))
    target = target.masked_fill(random_target((1, *size), 2)[0] == 255, 255)
    target.view(-1)[0] = 0
    counts = counts_of(labels, target, n_cls)
    assert counts.dtype == torch.int64
    assert torch.equal(counts, plain(labels, target, n_cls))
    assert counts.sum() == (target != 255).sum() > 0


@pytest.mark.parametrize("labels_dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("target_dtype", INTEGERS, ids=str)
def test_integer_types(labels_dtype, target_dtype):
    labels, target = (regions((23, 29), 11, 4, seed) for seed in (0, 1))
    expected = plain(labels, target, 11, 3)
    assert torch.equal(counts_of(labels.to(labels_dtype), target.to(target_dtype), 11, 3), expected)


def test_one_run_through_many_blocks():
    labels = torch.full((5, 1000), 6, dtype=torch.uint8)
    assert counts_of(labels, labels, 7)[6, 6] == 5000


@pytest.mark.parametrize("copies_bytes", [0, 1 << 23])
def test_copies_of_the_counters_add_up(copies_bytes, monkeypatch):
    monkeypatch.setattr(confusion_triton, "COPIES_BYTES", copies_bytes)
    labels, target = (regions((70, 90), 9, 5, seed) for seed in (0, 1))
    assert torch.equal(counts_of(labels, target, 9), plain(labels, target, 9))


@pytest.mark.parametrize("candidate", [0, 1])
def test_every_configuration(candidate):
    labels, target = (regions((47, 51), 9, 5, seed) for seed in (0, 1))
    with _triton.use_candidate(candidate):
        assert torch.equal(counts_of(labels, target, 9), plain(labels, target, 9))


def test_what_is_out_of_range_is_not_counted():
    generator = torch.Generator().manual_seed(0)
    labels, target = torch.randint(-3, 12, (2, 30, 31), generator=generator)
    target[0, :4] = torch.tensor([2**63 - 1, -(2**63), 2**31, -(2**31)])
    for ignore_index in (255, -1, 4, -(2**63)):
        assert torch.equal(
            counts_of(labels, target, 9, ignore_index), plain(labels, target, 9, ignore_index)
        )


def test_many_classes():
    labels = torch.tensor([2999, 0, 2999], dtype=torch.int32)
    target = torch.tensor([2999, 2999, 7], dtype=torch.int32)
    counts = counts_of(labels, target, 3000)
    assert counts[2999, 2999] == counts[2999, 0] == counts[7, 2999] == 1
    assert counts.sum() == 3


def test_values_are_checked_when_asked():
    labels, target = LABELS.to(DEVICE), (LABELS + 5).to(DEVICE)
    assert confusion_matrix(labels, target, 3, backend="triton").sum() == 0
    with pytest.raises(ValueError, match=r"64 pixels .*outside \[0, 3\).*: 5"):
        confusion_matrix(labels, target, 3, check=True, backend="triton")
    with pytest.raises(ValueError, match=r"labels holds 5, outside \[0, 3\)"):
        confusion_matrix(target, labels, 3, check=True, backend="triton")
    with pytest.raises(ValueError, match=r"64 pixels .*outside \[0, 3\).*: 5"):
        upsample_confusion(GOOD.to(DEVICE), target, check=True, backend="triton")


# ------------------------------------------------------------------------------- from patch logits
@pytest.mark.parametrize("layout", STRIDED_LAYOUTS)
def test_strided_inputs(layout):
    strided = strided_as(layout, noise((2, 11, 3, 2))).to(DEVICE)
    target = random_target((2, 13, 17), 11).to(DEVICE)
    labels = upsample_argmax(strided, (13, 17), backend="triton").cpu()
    expected = plain(labels, target.cpu(), 11)
    for each in (target, target.mT.contiguous().mT):
        assert torch.equal(upsample_confusion(strided, each, backend="triton").cpu(), expected)


def test_agrees_with_native():
    labels, target = (regions((30, 41), 19, 6, seed) for seed in (0, 1))
    assert torch.equal(counts_of(labels, target, 19), confusion_matrix(labels, target, 19))


def test_empty():
    target = torch.empty(0, 8, 9, dtype=torch.int64)
    assert counts_of(target, target, 3).eq(0).all()
    assert upsample_confusion(torch.empty(0, 5, 3, 4, device=DEVICE), target.to(DEVICE)).sum() == 0


# ------------------------------------------------------------------------------- machinery
def test_opcheck():
    labels, target = (regions((9, 11), 5, 2, seed).to(DEVICE) for seed in (0, 1))
    torch.library.opcheck(COUNT.default, (labels.byte(), target, 5, 255))


def test_compile_fullgraph():
    logits, target = noise((1, 5, 2, 3)).to(DEVICE), random_target((1, 13, 17), 5).to(DEVICE)

    def function(logits: Tensor, target: Tensor) -> Tensor:
        return upsample_confusion(logits, target, backend="triton")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, target), function(logits, target))


@pytest.mark.parametrize(
    ("labels", "target", "n_cls", "error", "text"),
    [
        (LABELS, LABELS[:, 1:], 3, ValueError, r"labels \(1, 8, 8\) and target \(1, 7, 8\) differ"),
        (LABELS.float(), LABELS, 3, TypeError, r"labels must be uint8, .*got torch.float32"),
        (LABELS, LABELS.to("meta"), 3, ValueError, r"labels are on .* and target is on meta"),
        (LABELS, LABELS, 0, ValueError, "num_classes must be at least 1, got 0"),
    ],
)
def test_rejects_bad_input(labels, target, n_cls, error, text):
    target = target if target.is_meta else target.to(DEVICE)
    with pytest.raises(error, match=text):
        confusion_matrix(labels.to(DEVICE), target, n_cls, backend="triton")
