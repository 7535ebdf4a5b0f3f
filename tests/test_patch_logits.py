"""PatchLogits: a value object in front of the functions of ops/upsample.py."""

import copy
import pickle

import pytest
import torch
from checks import assert_labels
from torch import Tensor
from torch.utils import _pytree as pytree

from segmenter_fast.backend import BackendError
from segmenter_fast.ops.confusion import upsample_confusion
from segmenter_fast.ops.upsample import upsample_logits
from segmenter_fast.ops.upsample_cross_entropy import upsample_cross_entropy
from segmenter_fast.ops.upsample_probabilities import upsample_probabilities
from segmenter_fast.patch_logits import PatchLogits

SIZE, CROP = (48, 64), (0, 0, 41, 59)


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(2, 7, 3, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def target() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(0, 7, (2, 41, 59), generator=generator)
    return target.masked_fill(torch.rand(2, 41, 59, generator=generator) < 0.2, 255)


@pytest.mark.parametrize("backend", ["auto", "reference", "native"])
def test_methods_are_the_functions(logits, target, backend):
    patch = PatchLogits(logits, SIZE, CROP, backend=backend)
    where = (SIZE, CROP)
    assert_labels(patch.labels(), logits, *where)
    assert torch.equal(patch.logits(), upsample_logits(logits, *where))
    assert torch.equal(
        patch.probabilities(), upsample_probabilities(logits, *where, backend=backend)
    )
    assert torch.equal(
        patch.probabilities(top1=True),
        upsample_probabilities(logits, *where, top1=True, backend=backend),
    )
    assert torch.equal(
        patch.confusion(target), upsample_confusion(logits, target, *where, backend=backend)
    )
    options = {"weight": torch.linspace(1, 2, 7), "label_smoothing": 0.1, "ignore_index": 3}
    every_label_valid = target % 7
    for reduction in ("mean", "sum", "none"):
        assert torch.equal(
            patch.cross_entropy(every_label_valid, reduction=reduction, **options),
            upsample_cross_entropy(
                logits,
                every_label_valid,
                *where,
                reduction=reduction,
                backend=backend,
                **options,
            ),
        )
    assert torch.equal(
        patch.confusion(every_label_valid, ignore_index=3),
        upsample_confusion(logits, every_label_valid, *where, ignore_index=3, backend=backend),
    )


def test_properties(logits):
    patch = PatchLogits(logits.bfloat16(), SIZE, CROP)
    assert patch.num_classes == 7
    assert patch.shape == (2, 7, 41, 59) == tuple(patch.logits().shape)
    assert patch.output_size == (41, 59)
    assert patch.grid_size == (3, 4)
    assert (patch.size, patch.crop) == (SIZE, CROP)
    assert patch.device == torch.device("cpu")
    assert patch.dtype == torch.bfloat16
    assert patch.backend == "auto"
    assert PatchLogits(logits, [48, 64]).crop == (0, 0, 48, 64)


def test_is_immutable(logits):
    patch = PatchLogits(logits, SIZE)
    for name in ("grid", "size", "crop", "backend", "device"):
        with pytest.raises(AttributeError):
            setattr(patch, name, None)
    with pytest.raises(AttributeError):
        patch.anything = 1


def test_repr_shows_shapes_and_no_numbers(logits):
    text = repr(PatchLogits(logits, SIZE, CROP))
    assert text == (
        "PatchLogits(grid=(2, 7, 3, 4), size=(48, 64), crop=(0, 0, 41, 59), float32, "
        "device='cpu', backend='auto')"
    )


def test_to_and_detach(logits):
    patch = PatchLogits(logits.requires_grad_(), SIZE, CROP, backend="reference")
    assert patch.logits().requires_grad
    assert not patch.detach().logits().requires_grad
    moved = patch.to("meta")
    assert moved.device.type == "meta"
    assert (moved.size, moved.crop, moved.backend) == (SIZE, CROP, "reference")
    assert moved.labels().shape == (2, 41, 59)


def test_gradient_reaches_the_logits(logits, target):
    PatchLogits(logits.requires_grad_(), SIZE, CROP).cross_entropy(target).backward()
    assert logits.grad.abs().max() > 0


def test_copies_and_pickles(logits):
    patch = PatchLogits(logits, SIZE, CROP, backend="reference")
    for other in (copy.deepcopy(patch), pickle.loads(pickle.dumps(patch))):
        assert torch.equal(other.grid, logits)
        assert repr(other) == repr(patch)


def test_pytree_round_trip(logits):
    patch = PatchLogits(logits, SIZE, CROP, backend="reference")
    doubled = pytree.tree_map(lambda x: 2 * x, {"out": patch})["out"]
    assert torch.equal(doubled.grid, 2 * logits)
    assert (doubled.size, doubled.crop, doubled.backend) == (SIZE, CROP, "reference")


def test_compile_fullgraph(logits, target):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def head(x: Tensor) -> PatchLogits:
        return PatchLogits(2 * x, SIZE, CROP)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def read(patch: PatchLogits, target: Tensor) -> tuple[Tensor, Tensor]:
        return patch.labels(), patch.cross_entropy(target)

    patch = head(logits)
    assert isinstance(patch, PatchLogits)
    assert torch.equal(patch.grid, 2 * logits)
    assert (patch.size, patch.crop) == (SIZE, CROP)
    labels, loss = read(patch, target)
    assert torch.equal(labels, patch.labels())
    assert torch.allclose(loss, patch.cross_entropy(target))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"logits": torch.zeros(3, 4, 4)}, ValueError, r"\(B, K, h, w\), got shape \(3, 4, 4\)"),
        ({"logits": torch.zeros(1, 3, 4, 4).int()}, TypeError, "got torch.int32"),
        ({"size": (0, 64)}, ValueError, "size must be positive"),
        ({"crop": (0, 0, 49, 64)}, ValueError, r"inside size \(48, 64\), got \(0, 0, 49, 64\)"),
        ({"backend": "gpu"}, ValueError, "backend must be one of .*got 'gpu'"),
    ],
)
def test_rejects_bad_input(logits, arguments, error, text):
    with pytest.raises(error, match=text):
        PatchLogits(**{"logits": logits, "size": SIZE, **arguments})


def test_refuses_what_the_backend_cannot_do(logits, target):
    with pytest.raises(BackendError, match="triton"):
        PatchLogits(logits, SIZE, backend="triton").labels()
    with pytest.raises(BackendError, match="input is on 'meta'"):
        PatchLogits(logits.to("meta"), SIZE, backend="native").labels()


def test_rejects_a_target_of_the_full_size(logits, target):
    with pytest.raises(ValueError, match=r"\(2, 41, 59\) .*got \(2, 48, 64\)"):
        PatchLogits(logits, SIZE, CROP).cross_entropy(torch.zeros(2, 48, 64, dtype=torch.int64))
