"""Confusion counts in CUDA C++, called directly so that no other code can stand in."""

import pytest
import torch
from cuda_cases import if_built, if_no_gpu, on_gpu
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from segmenter_fast import _C
from segmenter_fast.ops.confusion import confusion_matrix_reference

CONFUSION = torch.ops.segmenter_fast.confusion_matrix_cuda
INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)


def blocks(shape: tuple[int, int], n_cls: int, seed: int, side: int = 6) -> Tensor:
    """A label map of blocks, as pictures have."""
    generator = torch.Generator().manual_seed(seed)
    coarse = [-(-size // side) for size in shape]
    fine = torch.randint(0, n_cls, coarse, generator=generator)
    fine = fine.repeat_interleave(side, 0).repeat_interleave(side, 1)
    return fine[: shape[0], : shape[1]].contiguous()


def counts_of(labels, target, n_cls, ignore_index=255, check=True):
    return CONFUSION(labels.cuda(), target.cuda(), n_cls, ignore_index, check).cpu()


# ------------------------------------------------------------------------------- on a GPU
@on_gpu
@pytest.mark.parametrize("labels_dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("target_dtype", INTEGERS, ids=str)
def test_matches_reference(labels_dtype, target_dtype):
    for n_cls in (1, 2, 19, 100):
        labels, target = blocks((331, 217), n_cls, 0), blocks((331, 217), n_cls, 1)
        target[5:90] = 255
        labels, target = labels.to(labels_dtype), target.to(target_dtype)
        expected = confusion_matrix_reference(labels, target, n_cls, 255)
        assert torch.equal(counts_of(labels, target, n_cls), expected)


@on_gpu
@pytest.mark.parametrize("n_cls", [150, 159, 160, 204, 205, 241, 242, 1500])
@pytest.mark.parametrize("side", [1, 50])
def test_counters_in_and_beyond_shared_memory(n_cls, side):
    labels, target = (blocks((1024, 999), n_cls, seed, side) for seed in (0, 1))
    labels[:, -1] = target[:, -1] = n_cls - 1
    expected = confusion_matrix_reference(labels, target, n_cls, 3)
    assert torch.equal(counts_of(labels, target, n_cls, 3), expected)


@on_gpu
@pytest.mark.parametrize("n_cls", [7, 700])
@pytest.mark.parametrize("check", [False, True])
def test_values_out_of_range(n_cls, check):
    labels, target = blocks((40, 50), n_cls, 0), blocks((40, 50), n_cls, 1)
    good = confusion_matrix_reference(labels, target, n_cls, -1)
    for tensor, text in ((target, "3 pixels .*outside"), (labels, "outside")):
        wrong = tensor.clone()
        wrong.view(-1)[[0, 777, 1999]] = torch.tensor([n_cls, -7, 2**40])
        pair = (labels, wrong) if tensor is target else (wrong, target)
        if check:
            with pytest.raises(ValueError, match=text):
                counts_of(*pair, n_cls, -1, check)
        else:
            kept = torch.ones(2000, dtype=torch.bool)
            kept[[0, 777, 1999]] = False
            flat = (labels.view(-1)[kept], target.view(-1)[kept])
            expected = confusion_matrix_reference(*flat, n_cls, -1)
            assert torch.equal(counts_of(*pair, n_cls, -1, check), expected)
    assert torch.equal(counts_of(labels, target, n_cls, -1, check), good)


@on_gpu
def test_every_pixel_is_counted_once():
    labels, target = blocks((512, 512), 150, 0), blocks((512, 512), 150, 1)
    target[blocks((512, 512), 4, 2) == 0] = 255
    counts = counts_of(labels, target, 150)
    valid = target != 255
    assert counts.sum() == valid.sum()
    assert torch.equal(counts.sum(0), torch.bincount(labels[valid], minlength=150))
    assert torch.equal(counts.sum(1), torch.bincount(target[valid], minlength=150))


@on_gpu
def test_strided_inputs():
    labels, target = blocks((60, 70), 5, 0), blocks((60, 70), 5, 1)
    expected = counts_of(labels[1::2, ::3], target[1::2, ::3], 5)
    wide = labels.cuda()[1::2, ::3]
    assert torch.equal(CONFUSION(wide, target.cuda()[1::2, ::3], 5, 255, True).cpu(), expected)
    odd = labels.byte().cuda().view(-1)[1:]  # an odd address
    assert CONFUSION(odd, target.cuda().view(-1)[1:], 5, 255, True).sum() == labels.numel() - 1


@on_gpu
def test_empty():
    nothing = torch.empty(0, 8, 9, dtype=torch.int64)
    assert counts_of(nothing, nothing, 3).eq(0).all()


@on_gpu
def test_opcheck():
    labels, target = blocks((9, 11), 5, 0).byte().cuda(), blocks((9, 11), 5, 1).cuda()
    torch.library.opcheck(CONFUSION, (labels, target, 5, 255, True))


@on_gpu
def test_compile_fullgraph():
    labels, target = blocks((9, 11), 5, 0).cuda(), blocks((9, 11), 5, 1).cuda()
    function = torch.compile(
        lambda x, y: CONFUSION(x + 0, y, 5, 255, False), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(function(labels, target).cpu(), counts_of(labels, target, 5))


@on_gpu
def test_graph_capture():
    """Without `check` nothing waits for the GPU."""
    labels, target = blocks((64, 64), 5, 0).cuda(), blocks((64, 64), 5, 1).cuda()
    CONFUSION(labels, target, 5, 255, False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counts = CONFUSION(labels, target, 5, 255, False)
    graph.replay()
    graph.replay()
    assert torch.equal(counts.cpu(), counts_of(labels, target, 5))


BAD_INPUT = (
    ({"target": torch.zeros(7)}, TypeError, "target must be uint8, .*got torch.float32"),
    ({"labels": torch.zeros(7).bool()}, TypeError, "labels must be uint8, .*got torch.bool"),
    ({"labels": torch.zeros(6).long()}, ValueError, r"labels \(6,\) and target \(7,\) differ"),
    ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
)


@on_gpu
@pytest.mark.parametrize(("change", "error", "text"), BAD_INPUT)
def test_rejects_bad_input(change, error, text):
    zeros = torch.zeros(7).long()
    case = {"labels": zeros, "target": zeros, "num_classes": 3} | change
    with pytest.raises(error, match=text):
        counts_of(case["labels"], case["target"], case["num_classes"])


# ------------------------------------------------------------------------------- without a GPU
def test_fake():
    with FakeTensorMode():
        labels = torch.empty(2, 5, 7, device="cuda", dtype=torch.uint8)
        counts = CONFUSION(labels, labels.long(), 13, 255, True)
    assert (counts.shape, counts.dtype, counts.device.type) == ((13, 13), torch.int64, "cuda")


def test_is_for_gpus_alone():
    labels = blocks((8, 8), 3, 0)
    with pytest.raises(NotImplementedError, match="'CPU' backend"):
        CONFUSION(labels, labels, 3, 255, True)


GOOD = {
    "labels_ptr": 16, "labels_dtype": "uint8", "target_ptr": 16, "target_dtype": "int64",
    "pixels": 64, "K": 3, "ignore_index": 255, "counts_ptr": 16, "errors_ptr": 16, "device": 0,
    "stream": 0,
}  # fmt: skip


@if_built
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"labels_dtype": "float32"}, 'labels_dtype: expected one of .*got "float32"'),
        ({"target_dtype": "bool"}, 'target_dtype: expected one of .*got "bool"'),
        ({"pixels": -1}, "expected pixels >= 0"),
        ({"K": 0}, "1 <= K"),
        ({"K": 2**31 + 1}, r"K <= 2\^31"),
        ({"counts_ptr": 0}, "pointers to labels, target, counts and errors, got null"),
        ({"errors_ptr": 0}, "got null"),
    ],
)
def test_kernel_rejects_bad_input(change, text):
    with pytest.raises(ValueError, match=text):
        _C.cuda.confusion_matrix(**(GOOD | change))


@if_built
def test_no_pixels_need_no_gpu():
    _C.cuda.confusion_matrix(**(GOOD | {"pixels": 0, "counts_ptr": 0}))


@if_built
@if_no_gpu
def test_failed_launch_says_what_cuda_says():
    with pytest.raises(RuntimeError, match=r'confusion_matrix: CUDA says ".+" \(cudaError\w+\)'):
        _C.cuda.confusion_matrix(**GOOD)
